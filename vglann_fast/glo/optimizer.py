"""Adam, and Muon if asked for, over the generator's parameters, and what surrounds an update: all processes'
gradients, float16's scale."""

import math

import torch
from torch import Tensor
from torch.optim.adam import adam

from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.latents import BETAS
from vglann_fast.glo.muon import Muon, matrix_parameters
from vglann_fast.glo.precision import LossScale
from vglann_fast.options.training import TrainOptions
from vglann_fast.runtime.distributed import Ranks


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
        self.state = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=first.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for name, parameter in self.parameters.items()
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

    @torch.no_grad()
    def step(self, skip: Tensor, found_inf: Tensor | None = None) -> None:
        """Update the parameters; nothing at all where `skip` [] is true. `found_inf` [] is the same as float32."""
        taking = [(p, p.grad, self.state[name]) for name, p in self.parameters.items() if p.grad is not None]
        # As a function: to construct the class imports torch.compile, which takes a second and is not used.
        adam(
            [parameter for parameter, _, _ in taking],
            [gradient for _, gradient, _ in taking],
            [state["exp_avg"] for _, _, state in taking],
            [state["exp_avg_sq"] for _, _, state in taking],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for _, _, state in taking],
            # It reads rates and counters on the device, so it can be captured in a CUDA graph.
            fused=True,
            # Where this is 1, the update is skipped.
            found_inf=skip.float() if found_inf is None else found_inf,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
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
            for state in self.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: "<moment>.<parameter>", "lr", for Muon "momentum.<parameter>" and "lr_muon", and
        for float16 "loss_scale.<name>"."""
        found = {f"{key}.{name}": t for name, state in self.state.items() for key, t in state.items()}
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
        return self.state[name]["exp_avg"], self.state[name]["exp_avg_sq"]


def learning_rate_factor(options: TrainOptions, epoch: int) -> float:
    """Return the factor of the starting rates in `epoch`, counted from 0: 1 while the background alone learns,
    then the schedule over the passes that are left."""
    done, passes = epoch - options.background_passes, options.full_passes
    if done < 0:
        return 1.0
    if options.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done / passes))
    return 0.5 ** (done * 10 // passes)
