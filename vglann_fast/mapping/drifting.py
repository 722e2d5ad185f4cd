"""Drifting: a network from noise to latents, moved toward the latents and away from its own samples.

Deng, Li, Li, Du and He, "Generative Modeling via Drifting", 2026 (arXiv 2602.04770). At every step the samples x of a
batch of noise get a drift V, and the loss is |x - stop_gradient(x + V)|². Where samples and latents have one
distribution attraction and repulsion cancel, and V is 0 on average. Compared with IMLE a sample is also repelled by
its neighbors, so samples do not gather in the middle. Sampling takes one evaluation of the network.

A temperature is the distance over which a latent attracts. It is given as a multiple of the median distance from a
latent to its nearest other latent; drifts of several temperatures are added.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.mapping.base import Log
from vglann_fast.mapping.perceptron import PerceptronSampler
from vglann_fast.options.mapping import DriftingOptions

MOST_MEASURED = 4096  # latents whose nearest distance is looked at
_CHUNK, _OTHERS = 512, 4096  # latents compared at a time, and with how many
_LEAST = 1e-6  # of a temperature, for latents that are all equal; unit rows lie up to 2 apart


class Drifting(PerceptronSampler[DriftingOptions]):
    """The mapping of kind "drifting"; see `LatentSampler` for its interface."""

    kind = "drifting"
    options_class = DriftingOptions
    betas = (0.9, 0.95)
    _temperatures: Sequence[float]

    @staticmethod
    def inputs(latent_dim: int, options: DriftingOptions) -> int:
        """Return the numbers of a noise vector."""
        return options.noise_dim

    def __call__(self, noise: Tensor) -> Tensor:
        """noise [B, noise_dim] -> unit rows [B, d]."""
        return F.normalize(self.network(noise), dim=1)

    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Fit to the directions of latents [N, d]; nothing is chosen by `held_out`."""
        self.check_latents(latents)
        rows = F.normalize(latents.to(self.dtype), dim=1)
        scale = median_nearest_distance(rows)
        self._temperatures = [max(multiple * scale, _LEAST) for multiple in self.options.multiples]
        for epoch in range(self.options.epochs):
            order = torch.randperm(len(rows), generator=generator, device=self.device)
            self.note(self.train_epoch(rows[order], generator, epoch), log)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean squared length [] of the drift of as many samples as there are unit rows [B, d]."""
        samples = self(self.normal(len(rows), self.options.noise_dim, generator))
        with torch.no_grad():
            target = samples + drift(samples, rows, self._temperatures)
        return (samples - target).square().sum(1).mean()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n latents [n, d], unit rows: one evaluation of the network."""
        return self(self.normal(n, self.options.noise_dim, generator))


def drift(samples: Tensor, latents: Tensor, temperatures: Sequence[float]) -> Tensor:
    """The drift V [n, d] of samples [n, d] toward latents [m, d], n >= 2, summed over the temperatures.

    Affinities are the geometric mean of two softmaxes of -distance / T, over all latents and samples that a sample
    sees and over all samples that see one of these. With A+ and A- the affinities to latents and to other samples,

        V_i = sum over j and k of A+_ij A-_ik (latent_j - sample_k)

    so what attracts and what repels have equal weight.
    """
    n, m = len(samples), len(latents)
    others = torch.cat([latents, samples])
    distance = torch.cdist(samples, others)
    # A sample does not repel itself.
    distance[:, m:].fill_diagonal_(float("inf"))
    total = torch.zeros_like(samples)
    for temperature in temperatures:
        logits = -distance / temperature
        affinity = (logits.softmax(1) * logits.softmax(0)).sqrt()
        attracting, repelling = affinity.split([m, n], dim=1)
        total += (attracting * repelling.sum(1, keepdim=True)) @ latents
        total -= (repelling * attracting.sum(1, keepdim=True)) @ samples
    return total


def median_nearest_distance(rows: Tensor) -> float:
    """The median distance from one of rows [N, d] to its nearest other row.

    Of more than 4,096 rows evenly spaced ones are measured, each against all rows: neighbors in order may be clips of
    one shot. Equal rows are not counted as neighbors; 0 if all are equal.
    """
    measured = rows[:: -(-len(rows) // MOST_MEASURED)]
    nearest = []
    for chunk in measured.split(_CHUNK):
        least = torch.full((len(chunk),), float("inf"), device=rows.device, dtype=rows.dtype)
        for others in rows.split(_OTHERS):
            distance = torch.cdist(chunk, others, compute_mode="donot_use_mm_for_euclid_dist")
            least = least.minimum(distance.where(distance > 0, float("inf")).amin(1))
        nearest.append(least)
    found = torch.cat(nearest)
    found = found[found.isfinite()]
    return found.median().item() if len(found) else 0.0
