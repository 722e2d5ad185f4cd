"""Drifting: a network from noise to latents, moved toward the latents and away from its own samples.

Deng, Li, Li, Du and He, "Generative Modeling via Drifting", 2026 (arXiv 2602.04770). At every step the samples x of a
batch of noise get a drift V, and the loss is |x - stop_gradient(x + V)|². Where samples and latents have one
distribution attraction and repulsion cancel, and V is 0 on average. Compared with IMLE a sample is also repelled by
its neighbors, so samples do not gather in the middle. Sampling takes one evaluation of the network.

A temperature is the distance over which a latent attracts. It is given as a multiple of the median distance from a
latent to its nearest other latent; drifts of several temperatures are added.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler, Log, learning_rate_factor
from vglann_fast.mapping.perceptron import Perceptron, perceptron_sizes
from vglann_fast.options.mapping import DriftingOptions
from vglann_fast.runtime.numerics import seeded

BETAS = (0.9, 0.95)
MOST_MEASURED = 4096  # latents whose nearest distance is looked at
_CHUNK, _OTHERS = 512, 4096  # latents compared at a time, and with how many
_LEAST = 1e-6  # of a temperature, for latents that are all equal; unit rows lie up to 2 apart


class Drifting(LatentSampler[DriftingOptions]):
    """The mapping of kind "drifting"; see `LatentSampler` for its interface."""

    kind = "drifting"
    options_class = DriftingOptions

    def __init__(
        self,
        latent_dim: int,
        options: DriftingOptions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_dim, options, device, dtype, seed)
        with seeded(seed):
            network = Perceptron(options.noise_dim, options.hidden, latent_dim)
        self.network = network.to(device, dtype)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), options.lr, BETAS,
            weight_decay=options.weight_decay, fused=self.device.type == "cuda",
        )  # fmt: skip

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
        temperatures = [max(multiple * scale, _LEAST) for multiple in self.options.multiples]
        for epoch in range(self.options.epochs):
            order = torch.randperm(len(rows), generator=generator, device=self.device)
            self.note(self.train_epoch(rows[order], temperatures, generator, epoch), log)

    def train_epoch(
        self, rows: Tensor, temperatures: Sequence[float], generator: torch.Generator, epoch: int
    ) -> dict[str, Any]:
        """One pass over unit rows [N, d] in their order, the rest of a batch left out, as many samples in each step.

        Returns a row for the log: the mean loss, which is the mean squared length of the drift. Raises `VglannError`
        when it is not finite.
        """
        options = self.options
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * learning_rate_factor("cosine", epoch, options.epochs)
        batch = min(options.batch_size, len(rows))
        steps = len(rows) // batch
        total = torch.zeros((), device=self.device, dtype=self.dtype)  # read once, after the epoch
        for near in rows.split(batch)[:steps]:
            samples = self(self._noise(batch, generator))
            with torch.no_grad():
                target = samples + drift(samples, near, temperatures)
            loss = (samples - target).square().sum(1).mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            total += loss.detach()
        mean = (total / steps).item()
        if not mean < float("inf"):
            raise VglannError(f"drifting: the loss is not finite in epoch {epoch}; lower --lr")
        return {"epoch": epoch, "loss": mean}

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        size = (n, self.options.noise_dim)
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d], unit rows: one evaluation of the network."""
        return self(self._noise(n, generator))

    @classmethod
    def sizes(cls, latent_dim: int, options: DriftingOptions) -> Iterable[tuple[str, tuple[int, ...]]]:
        """The three layers."""
        return perceptron_sizes(options.noise_dim, options.hidden, latent_dim)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the network."""
        return self.network.state_dict()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the parameters of the network."""
        self.network.load_state_dict(tensors)


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
