"""Adam, and Muon if asked for, over the generator's parameters, and what surrounds an update: all processes'
gradients, float16's scale."""

import math

import torch
from torch import Tensor

from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.latents import BETAS
from vglann_fast.glo.muon import Muon, matrix_parameters
from vglann_fast.glo.precision import LossScale
from vglann_fast.options.training import TrainOptions
from vglann_fast.runtime.distributed import Ranks

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class GeneratorOptimizer:
    """Fused Adam whose learning rate, counters and moments are tensors on the device that keep their place, so
    that a captured step sees them change. With optimizer="muon", `Muon` takes the transposed convolutions.

    A parameter without a gradient, which has no part in the update, stays as it is and so does its state. A batch's
    loss counts 1 / (batches that make an update, in all processes). `loss_scale` is for float16.
    """

    def __init__(
        self,
        generator: TwoStreamGenerator,
        options: TrainOptions,
        ranks: Ranks,
        loss_scale: LossScale | None = None,
    ) -> None:
        every = dict(generator.named_parameters())
        matrices = matrix_parameters(generator) if options.optimizer == "muon" else {}
        self.muon = Muon(matrices, options.lr_muon) if matrices else None
        self.every = list(every.values())
        self.parameters = {name: parameter for name, parameter in every.items() if name not in matrices}
        first = generator.stem.weight
        self.ranks = ranks
        self.loss_scale = loss_scale
        self.share = 1.0 / (ranks.size * options.accumulate)
        self.lr = torch.tensor(options.lr_generator, dtype=first.dtype, device=first.device)
        self.adam = torch.optim.Adam(
            self.parameters.values(), self.lr, betas=BETAS, fused=True, capturable=first.is_cuda
        )
        for parameter in self.parameters.values():
            self.adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=first.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def zero_grad(self) -> None:
        """Forget the gradients of the update before."""
        for parameter in self.every:
            parameter.grad = None

    def backward(self, loss: Tensor) -> Tensor:
        """Add the gradients of one batch's `loss` []; returns its share of the update's mean loss, detached."""
        share = loss if self.share == 1.0 else loss * self.share
        (share if self.loss_scale is None else share * self.loss_scale.scale).backward()
        return share.detach()

    def gather(self, share: Tensor, latent_gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """All processes' gradients, and no scale any more. Returns (mean loss [], whether to leave the step out
        because float16 overflowed: a bool [], or None without a scale). `latent_gradient` [B, d] is unscaled in
        place.
        """
        loss = self.ranks.sum_gradients(self.every, share)
        if self.loss_scale is None:
            return loss, None
        gradients = [p.grad for p in self.every if p.grad is not None]
        return loss, self.loss_scale.unscale([*gradients, latent_gradient])

    def step(self, skip: Tensor, found_inf: Tensor | None = None) -> None:
        """Update the parameters; nothing at all where `skip` [] is true. `found_inf` [] is the same as float32."""
        # Fused Adam skips its update where this is 1.
        self.adam.found_inf = skip.float() if found_inf is None else found_inf  # type: ignore[attr-defined]
        self.adam.step()
        if self.muon is not None:
            self.muon.step(skip)

    @torch.no_grad()
    def begin_epoch(self, options: TrainOptions, factor: float, *, forget: bool) -> None:
        """Set the learning rates to `factor` of the options' own; with `forget`, clear all moments and counters."""
        self.lr.fill_(options.lr_generator * factor)
        if self.muon is not None:
            self.muon.lr.fill_(options.lr_muon * factor)
        if forget:
            if self.muon is not None:
                self.muon.forget()
            for name in self.parameters:
                for tensor in self._state(name).values():
                    tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: "<moment>.<parameter>", "lr", for Muon "momentum.<parameter>" and "lr_muon", and
        for float16 "loss_scale.<name>"."""
        found = {f"{key}.{name}": t for name in self.parameters for key, t in self._state(name).items()}
        muon = self.muon.tensors() if self.muon is not None else {}
        scale = self.loss_scale.tensors() if self.loss_scale is not None else {}
        return {**found, "lr": self.lr, **muon, **{f"loss_scale.{name}": t for name, t in scale.items()}}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave. The loss scale is reset if the run had none."""
        for name, mine in self.tensors().items():
            if name in tensors:
                mine.copy_(tensors[name])
            elif not name.startswith("loss_scale."):
                raise ValueError(f"optimizer: {name} is missing")

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Adam's two moments of a parameter, each of its shape."""
        state = self._state(name)
        return state["exp_avg"], state["exp_avg_sq"]

    def _state(self, name: str) -> dict[str, Tensor]:
        state = self.adam.state[self.parameters[name]]
        return {key: state[key] for key in MOMENTS}


def learning_rate_factor(options: TrainOptions, epoch: int) -> float:
    """Return the factor of the starting rates in `epoch`, counted from 0: 1 while the background alone learns,
    then the schedule over the passes that are left."""
    done, passes = epoch - options.background_passes, options.full_passes
    if done < 0:
        return 1.0
    if options.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done / passes))
    return 0.5 ** (done * 10 // passes)
