"""A mixture of normal distributions with full covariances, fitted by EM.

Its samples are not sorted by component, and are divided by their norms as a generator would do.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler, Log
from vglann_fast.mapping.em import (
    Mixture,
    Regularization,
    clusters,
    expectation_maximization,
    maximize,
)
from vglann_fast.mapping.projected_normal import log_projected_normal
from vglann_fast.options.mapping import GmmOptions

log_line = logging.getLogger(__name__).warning


class GMM(LatentSampler[GmmOptions]):
    """The mapping of kind "gmm"; see `vglann_fast.mapping.base.LatentSampler` for what it can do."""

    kind = "gmm"
    options_class = GmmOptions
    mixture: Mixture

    @property
    def most_epochs(self) -> int:
        """Of all starts and numbers of components together."""
        return self.options.epochs * self.options.starts * len(self.options.sizes)

    def check_latents(self, latents: Tensor) -> None:
        """As `LatentSampler.check_latents`; raises for more components than latents, too."""
        super().check_latents(latents)
        if min(self.options.sizes) > len(latents):
            raise VglannError(
                f"--components {self.options.components}: more than there are latents, {len(latents)}"
            )

    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Fit to latents [N, d]. Of several numbers of components, `held_out` [n, d] decides; those above N are
        left out. Raises `VglannError` for more components than latents, or a singular covariance."""
        self.check_latents(latents)
        sizes = [size for size in self.options.sizes if size <= len(latents)]
        if len(sizes) > 1 and held_out is None:
            raise VglannError(
                "--components: several numbers need held-out latents to choose by; raise --holdout-fraction"
            )
        if len(sizes) > 1 and self.latent_dim == 1:
            raise VglannError("--components: expected one number for latents of one dimension")
        rows, least = latents.double(), float("inf")
        for size in sizes:
            mixture, epochs = self._fit_size(rows, size, generator, log)
            loss = epochs[-1]["loss"]
            if held_out is not None and self.latent_dim > 1:
                loss = -_log_density(mixture, held_out).mean().item()
                epochs[-1]["held_out_loss"] = loss
            if size == sizes[0] or loss < least:
                least, self.mixture, self.epochs = loss, mixture, epochs
        self._warn_of_flat_components(len(latents))

    def _fit_size(
        self, latents: Tensor, size: int, generator: torch.Generator, log: Log | None
    ) -> tuple[Mixture, list[dict[str, Any]]]:
        """The likeliest mixture of `size` components from all starts, and the rows of its epochs."""
        best: tuple[Mixture, list[dict[str, Any]]] | None = None
        for start in range(self.options.starts):
            mixture, epochs = self._fit_once(latents, size, start, generator, log)
            if best is None or epochs[-1]["loss"] < best[1][-1]["loss"]:
                best = mixture, epochs
        assert best is not None
        return best

    def _fit_once(
        self, latents: Tensor, size: int, start: int, generator: torch.Generator, log: Log | None
    ) -> tuple[Mixture, list[dict[str, Any]]]:
        options = self.options
        shape = torch.cov(latents.T, correction=0)
        regularization = Regularization(options.floor, options.prior, shape.reshape(2 * latents.shape[1:]))
        mixture = maximize(latents, clusters(latents, size, generator), regularization)
        rounds = expectation_maximization(
            latents, mixture, regularization, rounds=options.epochs, tolerance=options.tolerance
        )
        epochs: list[dict[str, Any]] = []
        for step, bound in rounds:
            mixture = step
            epochs.append({"epoch": len(epochs), "loss": -bound, "components": size, "start": start})
            if log is not None:
                log(epochs[-1])
        return mixture, epochs

    def _warn_of_flat_components(self, count: int) -> None:
        """Warn of a component of d latents or fewer: without a prior it is flat, except for the floor."""
        flat = int((self.mixture.weights * count <= self.latent_dim).sum())
        if flat and self.options.prior == 0:
            log_line(
                f"gmm: {flat} of {len(self.mixture.weights)} components have no more latents than the "
                f"{self.latent_dim} dimensions: their covariances are singular except for --floor "
                f"{self.options.floor:g}, and their samples stay beside those latents; use a --prior above 0"
            )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d], unit rows, their components in random order."""
        mixture, size = self.mixture, (n, self.latent_dim)
        component = torch.multinomial(mixture.weights, n, replacement=True, generator=generator)
        noise = torch.randn(size, generator=generator, device=self.device, dtype=torch.float64)
        latents = torch.empty_like(noise)
        for k, factor in enumerate(mixture.factors()):
            rows = (component == k).nonzero()[:, 0]
            latents[rows] = mixture.means[k] + noise[rows] @ factor.T
        return F.normalize(latents, dim=1).to(self.dtype)

    def log_density(self, latents: Tensor) -> Tensor | None:
        """See `LatentSampler.log_density`; None in one dimension."""
        return _log_density(self.mixture, latents) if self.latent_dim > 1 else None

    def tensors(self) -> dict[str, Tensor]:
        """Weights, means and covariances."""
        mixture = self.mixture
        return {
            "weights": mixture.weights,
            "means": mixture.means,
            "covariances": mixture.covariances,
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take weights, means and covariances."""
        mixture = Mixture(*(tensors[name].double() for name in ("weights", "means", "covariances")))
        k, d = mixture.weights.numel(), self.latent_dim
        shapes = [tuple(tensor.shape) for tensor in (mixture.weights, mixture.means, mixture.covariances)]
        if shapes != [(k,), (k, d), (k, d, d)]:
            raise ValueError("weights, means and covariances do not fit together")
        if not (mixture.weights >= 0).all() or not mixture.weights.sum() > 0:
            raise ValueError("weights are negative, or all zero")
        self.mixture = mixture


def _log_density(mixture: Mixture, latents: Tensor) -> Tensor:
    """[n]: of the directions of its samples at the directions of latents [n, d]; see `LatentSampler.log_density`."""
    directions = F.normalize(latents.double(), dim=1)
    densities = log_projected_normal(directions, mixture.means, mixture.factors())
    return torch.logsumexp(densities + mixture.weights.log(), 1)
