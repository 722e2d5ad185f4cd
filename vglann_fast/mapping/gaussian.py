"""One normal distribution with the mean and covariance of the latents: what any other mapping has to beat.

Its samples are divided by their norms, as in the paper's author's sampler.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.mapping.base import LatentSampler, Log
from vglann_fast.mapping.projected_normal import log_projected_normal
from vglann_fast.options.mapping import GaussianOptions

log_line = logging.getLogger(__name__).warning


class Gaussian(LatentSampler[GaussianOptions]):
    """The mapping of kind "gaussian"; see `vglann_fast.mapping.base.LatentSampler` for what it can do."""

    kind = "gaussian"
    options_class = GaussianOptions

    mean: Tensor  # [d], float64
    factor: Tensor  # [d, d], float64: factor^T factor is the covariance

    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Take mean and unbiased covariance of latents [N, d]; warns when that has no inverse."""
        self.check_latents(latents)
        rows = latents.double()
        self.mean = rows.mean(0)
        centered = rows - self.mean
        _, values, axes = torch.linalg.svd(centered.T @ centered / (len(rows) - 1))
        self.factor = values.sqrt()[:, None] * axes
        density = self.log_density(latents)
        if density is None and self.latent_dim > 1:
            log_line(
                f"gaussian: the covariance of {len(rows)} latents in {self.latent_dim} dimensions is singular: "
                "samples stay in the span of the latents, and a likelihood does not exist"
            )
        loss = {} if density is None else {"loss": -density.mean().item()}
        self.note({"epoch": 0, **loss}, log)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d], unit rows."""
        size = (n, self.latent_dim)
        return self.from_noise(
            torch.randn(size, generator=generator, device=self.device, dtype=torch.float64)
        )

    def from_noise(self, noise: Tensor) -> Tensor:
        """Unit rows [n, d] from standard normal noise [n, d], float64."""
        return F.normalize(self.mean + noise @ self.factor, dim=1).to(self.dtype)

    def log_density(self, latents: Tensor) -> Tensor | None:
        """See `LatentSampler.log_density`; None where the covariance is singular, and in one dimension."""
        if self.latent_dim == 1:
            return None
        lower, failed = torch.linalg.cholesky_ex(self.factor.T @ self.factor)
        if failed or lower.diagonal().min() < 1e-7 * lower.diagonal().max():
            return None
        return log_projected_normal(F.normalize(latents.double(), dim=1), self.mean[None], lower[None])[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        """Mean and factor."""
        return {"mean": self.mean, "factor": self.factor}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take mean and factor."""
        mean, factor = tensors["mean"], tensors["factor"]
        if mean.shape != (self.latent_dim,) or factor.shape != (self.latent_dim, self.latent_dim):
            raise ValueError("mean or factor are of another size")
        self.mean, self.factor = mean.double(), factor.double()
