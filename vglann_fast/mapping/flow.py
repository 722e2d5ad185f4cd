"""Invertible flows: noise becomes latents through invertible steps, so every latent has an exact likelihood.

"flow" couples halves of the dimensions by monotonic splines: Durkan, Bekasov, Murray and Papamakarios, "Neural
Spline Flows", 2019; quick both ways. "autoregressive" makes each dimension from all before it: Papamakarios,
Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation", 2017; it samples one dimension at a
time. The networks are zuko's (extra `flow`).

Latents lie on the unit sphere, where no density in d dimensions exists: trained on them as they are, a flow makes
its likelihood as high as it likes by flattening itself onto the sphere. So in each step a latent is given a random
norm, as standard normal noise in d dimensions has over sqrt(d). Latents spread over the whole sphere would then be
normal noise, and what a flow learns is where theirs differ. Samples are divided by their norms again.
The latents are whitened before, and the steps begin as the identity: a flow begins as the Gaussian mapping.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler, Log, learning_rate_factor
from vglann_fast.options.mapping import AutoregressiveOptions, FlowOptions
from vglann_fast.runtime.numerics import seeded

RADII = 33  # norms over which a density is summed
HELD_OUT_DRAWS = 4  # norms given to each held-out latent
LARGEST_GRADIENT = 5.0
AT_ONCE = 1 << 13  # rows whose density is computed at once

log_line = logging.getLogger(__name__).warning


class _Flow(LatentSampler[AutoregressiveOptions]):
    """Base of both kinds of flow; see `vglann_fast.mapping.base.LatentSampler`."""

    def __init__(
        self,
        latent_dim: int,
        options: AutoregressiveOptions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_dim, options, device, dtype, seed)
        if latent_dim < 2:
            raise VglannError(f"--kind {self.kind}: latents of one dimension have no flow; take imle or gmm")
        try:
            import zuko
        except ImportError as error:
            raise VglannError(f"--kind {self.kind}: pip install 'vglann-fast[flow]'") from error
        with seeded(seed):
            network = self._network(zuko.flows)
        for transform in network.transform.transforms:
            nn.init.zeros_(transform.hyper[-1].weight)
            nn.init.zeros_(transform.hyper[-1].bias)
        self.network = network.to(self.device, dtype)
        self.mean = torch.zeros(latent_dim, device=self.device, dtype=dtype)
        self.factor = torch.eye(latent_dim, device=self.device, dtype=dtype)

    @abstractmethod
    def _network(self, flows: Any) -> Any:
        """The flow on whitened latents; `flows` is zuko's module of them."""

    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Fit to latents [N, d]. With `held_out` [n, d] the epoch is kept in which these were likeliest.

        Raises `VglannError` when the loss is not finite.
        """
        self.check_latents(latents)
        if held_out is None:
            log_line(
                f"{self.kind}: no latents are held out, so nothing shows overfitting; use --holdout-fraction 0.1"
            )
        options, directions = self.options, F.normalize(latents.to(self.dtype), dim=1)
        self._whiten(directions)
        unseen = None if held_out is None else self._unseen(held_out, generator)
        optimizer = torch.optim.AdamW(
            self.network.parameters(), options.lr,
            weight_decay=options.weight_decay, fused=self.device.type == "cuda",
        )  # fmt: skip
        least, best = math.inf, None
        for epoch in range(options.epochs):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * learning_rate_factor("cosine", epoch, options.epochs)
            row = {"epoch": epoch, "loss": self._train_epoch(directions, generator, optimizer)}
            if not math.isfinite(row["loss"]):
                raise VglannError(f"{self.kind}: the loss is not finite in epoch {epoch}; lower --lr")
            if unseen is not None:
                row["held_out_loss"] = self._loss(unseen).item()
                if row["held_out_loss"] < least:
                    least, best = row["held_out_loss"], _copy(self.network)
            self.note(row, log)
        if best is not None:
            self.network.load_state_dict(best)

    def _whiten(self, directions: Tensor) -> None:
        """Mean and Cholesky factor of the covariance of `directions` [N, d] with random norms.

        The covariance is shrunk toward a multiple of the identity, the more the fewer latents there are: it has an
        inverse also for N < d.
        """
        n, d = directions.shape
        u = directions.double()
        norm = math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2)) * math.sqrt(2 / d)  # its mean
        mean = norm * u.mean(0)
        covariance = u.T @ u / n - mean[:, None] * mean  # the mean of a squared norm is 1
        covariance *= n / (n + d)
        covariance.diagonal().add_(covariance.diagonal().mean() * d / n)
        self.mean = mean.to(self.dtype)
        self.factor = torch.linalg.cholesky(covariance).to(self.dtype).contiguous()  # as it is when loaded

    def _white(self, latents: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, (latents - self.mean).T, upper=False).T

    def _with_norms(self, directions: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(directions.shape, generator=generator, device=self.device, dtype=self.dtype)
        return directions * noise.norm(dim=1, keepdim=True) / math.sqrt(self.latent_dim)

    def _unseen(self, held_out: Tensor, generator: torch.Generator) -> Tensor:
        """The held-out latents, several times with other norms, white."""
        directions = F.normalize(held_out.to(self.dtype), dim=1).repeat(HELD_OUT_DRAWS, 1)
        return self._white(self._with_norms(directions, generator))

    @torch.no_grad()
    def _loss(self, white: Tensor) -> Tensor:
        """Mean negative log-likelihood [] of whitened latents [n, d], in nats."""
        flow = self.network()
        return -torch.cat([flow.log_prob(rows) for rows in white.split(AT_ONCE)]).mean()

    def _train_epoch(
        self, directions: Tensor, generator: torch.Generator, optimizer: torch.optim.Optimizer
    ) -> float:
        """One pass over unit rows [N, d] in random order, the rest of a batch left out; returns the mean loss."""
        order = torch.randperm(len(directions), generator=generator, device=self.device)
        batch = min(self.options.batch_size, len(directions))
        white = self._white(self._with_norms(directions, generator))
        total = torch.zeros((), device=self.device, dtype=self.dtype)  # read once, after the epoch
        steps = len(directions) // batch
        for rows in order.split(batch)[:steps]:
            loss = -self.network().log_prob(white[rows]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            total += loss.detach()
        return (total / steps).item()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d], unit rows."""
        size = (n, self.latent_dim)
        noise = torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)
        inverse = self.network().transform.inv
        white = torch.cat([inverse(rows) for rows in noise.split(AT_ONCE)])
        return F.normalize(self.mean + white @ self.factor.T, dim=1)

    @torch.no_grad()
    def log_density(self, latents: Tensor) -> Tensor:
        """See `LatentSampler.log_density`.

        The mean over the norms r that latents are trained with of p(r u) / N(r u; 0, I/d): numerator and
        denominator are densities in d dimensions, and the denominator's directions are uniform.
        """
        d = self.latent_dim
        s = math.sqrt(d) + torch.linspace(-4.5, 4.5, RADII, device=self.device, dtype=self.dtype) / math.sqrt(
            2
        )
        s = s[s > 0]
        log_weight = ((d - 1) * s.log() - 0.5 * s.square()).log_softmax(0)
        log_volume = self.factor.diagonal().log().sum() + d / 2 * math.log(d)
        flow, found = self.network(), []
        for u in F.normalize(latents.to(self.dtype), dim=1).split(max(1, AT_ONCE // RADII)):
            x = (u[:, None] * (s / math.sqrt(d))[:, None]).flatten(0, 1)  # [n * radii, d]
            log_p = flow.log_prob(self._white(x)).unflatten(0, (len(u), -1)) - log_volume
            log_normal = -0.5 * s.square() - d / 2 * math.log(2 * math.pi)
            found.append(torch.logsumexp(log_weight + log_p - log_normal, 1))
        return torch.cat(found)

    @classmethod
    def sizes(cls, latent_dim: int, options: AutoregressiveOptions) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Every layer of every step: as there may be many steps, none may be missing."""
        yield "factor", (latent_dim, latent_dim)
        for step in range(options.transforms):
            layers = f"transform.transforms.{step}.hyper"
            yield f"{layers}.0.weight", (options.hidden, latent_dim)
            yield f"{layers}.2.weight", (options.hidden, options.hidden)
            yield f"{layers}.4.weight", (latent_dim * cls._numbers(options), options.hidden)

    @staticmethod
    @abstractmethod
    def _numbers(options: Any) -> int:
        """Return the count of numbers that say what a step does to one dimension."""

    def tensors(self) -> dict[str, Tensor]:
        """The flow's state, and mean and factor of the whitening."""
        return {**_copy(self.network), "mean": self.mean, "factor": self.factor}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the flow's state and the whitening."""
        state = dict(tensors)
        mean, factor = state.pop("mean"), state.pop("factor")
        if mean.shape != self.mean.shape or factor.shape != self.factor.shape:
            raise ValueError("mean or factor are of another size")
        self.mean, self.factor = mean.to(self.dtype), factor.to(self.dtype)
        self.network.load_state_dict(state)
        self.network()  # raises ValueError where it would when sampling


class SplineFlow(_Flow):
    """The mapping of kind "flow": neural spline couplings."""

    kind = "flow"
    options_class = FlowOptions

    @staticmethod
    def _numbers(options: FlowOptions) -> int:
        return 3 * options.bins - 1  # widths, heights, and the slopes between them

    def _network(self, flows: Any) -> Any:
        options = self.options
        assert isinstance(options, FlowOptions)
        return flows.NSF(
            self.latent_dim, transforms=options.transforms, bins=options.bins,
            hidden_features=(options.hidden, options.hidden), passes=2, randperm=True,
        )  # fmt: skip


class AutoregressiveFlow(_Flow):
    """The mapping of kind "autoregressive": masked autoregressive affine steps."""

    kind = "autoregressive"
    options_class = AutoregressiveOptions

    @staticmethod
    def _numbers(options: AutoregressiveOptions) -> int:
        return 2  # shift and scale

    def _network(self, flows: Any) -> Any:
        options = self.options
        return flows.MAF(
            self.latent_dim, transforms=options.transforms,
            hidden_features=(options.hidden, options.hidden), randperm=True,
        )  # fmt: skip


def _copy(network: nn.Module) -> dict[str, Tensor]:
    """Its state, sharing no memory with it."""
    return {name: value.clone() for name, value in network.state_dict().items()}
