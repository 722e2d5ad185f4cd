"""Implicit maximum likelihood estimation: a network from noise to latents, fitted by exact nearest neighbors.

Each epoch draws a pool of noise, maps it, finds for every latent the nearest mapped noise vector, and regresses
the network from these noise vectors to their latents. Every latent is matched, so no mode is dropped.
Li and Malik, "Implicit Maximum Likelihood Estimation", 2018; on latents of a generator: Hoshen, Li and Malik,
"Non-Adversarial Image Synthesis with Generative Latent Nearest Neighbors", 2019.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler, Log, learning_rate_factor
from vglann_fast.mapping.match import match, same_everywhere
from vglann_fast.mapping.regression import Regression
from vglann_fast.options.mapping import ImleOptions
from vglann_fast.runtime.numerics import seeded

MAPPED_AT_ONCE = 1 << 16  # noise vectors of the pool; a CPU takes fewer, which stay in its cache
MAPPED_AT_ONCE_ON_CPU = 1 << 11


class MappingNetwork(nn.Module):
    """noise [B, noise_dim] -> latents [B, latent_dim]: two hidden layers without biases, BatchNorm and ReLU."""

    def __init__(self, noise_dim: int, hidden: int, latent_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(noise_dim, hidden, bias=False)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.out = nn.Linear(hidden, latent_dim, bias=False)

    def forward(self, noise: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.linear1(noise)))
        x = F.relu(self.norm2(self.linear2(x)))
        return self.out(x)

    @torch.no_grad()
    def forward_blocks(self, noise: Tensor) -> Tensor:
        """noise [blocks, B, noise_dim] -> [blocks, B, latent_dim]: `forward` of block after block in train mode,
        computed at once."""
        x = F.relu(_normalized_by_block(self.linear1(noise), self.norm1))
        x = F.relu(_normalized_by_block(self.linear2(x), self.norm2))
        return self.out(x)


def _normalized_by_block(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """`norm` of each block of x [blocks, B, C] by the block's own statistics, which `norm` remembers in order."""
    assert norm.momentum is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    blocks, size, _ = x.shape
    mean = x.mean(dim=1)  # [blocks, C]
    centered = x - mean[:, None]
    variance = centered.square().mean(dim=1)
    age = torch.arange(blocks - 1, -1, -1, device=x.device, dtype=x.dtype)
    share = norm.momentum * (1 - norm.momentum) ** age  # of each block in what is remembered after the last
    unbiased = variance * (size / (size - 1))
    for running, values in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.mul_((1 - norm.momentum) ** blocks).add_(share @ values)
    norm.num_batches_tracked += blocks
    scale = norm.weight * (variance + norm.eps).rsqrt()  # [blocks, C]
    return torch.addcmul(norm.bias, centered, scale[:, None])


@dataclass(frozen=True)
class Matches:
    """The input of the regression on latents: noise [N, noise_dim], its distance when matched [N], the number
    of that noise vector among all that were drawn [N], and the share of latents matched in this epoch."""

    noise: Tensor
    distance: Tensor
    source: Tensor
    share: float = 1.0


class IMLE(LatentSampler[ImleOptions]):
    """The mapping of kind "imle"; see `vglann_fast.mapping.base.LatentSampler` for what it can do."""

    kind = "imle"
    options_class = ImleOptions

    def __init__(
        self,
        latent_dim: int,
        options: ImleOptions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_dim, options, device, dtype, seed)
        with seeded(seed):
            network = MappingNetwork(options.noise_dim, options.hidden, latent_dim)
        self.network = network.to(device, dtype)
        self._regression = Regression(self.network, self, options.lr, options.weight_decay)
        self._matched: Matches | None = None

    def __call__(self, noise: Tensor) -> Tensor:
        """noise [B, noise_dim] -> latents [B, d], unit rows if `options.normalize`."""
        mapped = self.network(noise)
        return F.normalize(mapped, dim=1) if self.options.normalize else mapped

    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Fit to latents [N, d]; nothing is chosen by `held_out`."""
        self.check_latents(latents)
        self._matched = None  # of other latents, should this object have been fitted before
        for epoch in range(self.options.epochs):
            same_everywhere([*self.network.parameters(), *self.network.buffers()])
            order = torch.randperm(len(latents), generator=generator, device=latents.device)
            self.note(self.train_epoch(latents, self.draw_pool(len(latents), generator), order, epoch), log)
        self.network.eval()

    def draw_pool(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """The noise of one epoch over n latents: blocks [block, noise_dim], pool_factor * n vectors in all."""
        block = min(self.options.batch_size, n * self.options.pool_factor)
        weight = self.network.out.weight
        return [
            torch.randn(
                block, self.options.noise_dim, generator=generator, device=weight.device, dtype=weight.dtype
            )
            for _ in range(n * self.options.pool_factor // block)
        ]

    def train_epoch(self, latents: Tensor, blocks: list[Tensor], order: Tensor, epoch: int) -> dict[str, Any]:
        """Match latents [N, d] to the mapped `blocks` of noise, then regress in `order` (a permutation of N).

        Returns a row for the log: mean loss of the steps, mean Euclidean distance of the matches, match_diversity,
        the number of distinct noise vectors matched over N.
        """
        options = self.options
        if options.adam_state == "per-epoch":
            self._regression.restart()
        self._regression.set_rate(options.lr * learning_rate_factor(options.schedule, epoch, options.epochs))
        self.network.train()
        pool = torch.stack(blocks)  # [blocks, B, noise_dim]
        matched = self._match(latents, pool, epoch)
        loss = self._regression.run(matched.noise, latents, order, min(options.batch_size, len(latents)))
        row = {
            "epoch": epoch,
            "loss": loss.item(),
            "match_distance": matched.distance.mean().item(),
            "match_diversity": matched.source.unique().numel() / len(latents),
        }
        return row if options.rematch == 1 else {**row, "rematched": matched.share}

    def _match(self, latents: Tensor, pool: Tensor, epoch: int) -> Matches:
        """The noise of each latent, from `pool` [blocks, B, noise_dim] or kept from an earlier epoch.

        A latent keeps its noise until the network has brought that to `rematch` of its distance:
        Aghabozorgi, Peng and Li, "Adaptive IMLE for Few-shot Image Synthesis", 2023.
        """
        options, kept = self.options, self._matched
        vectors = pool.flatten(0, 1)
        if options.rematch == 1 or kept is None or len(kept.noise) != len(latents):
            index, distance = match(latents, self._map_pool(pool).flatten(0, 1), options.reject_quantile)
            self._matched = Matches(vectors[index], distance, index + epoch * len(vectors))
            return self._matched
        with self._regression.nothing_happened():  # looking is not training
            now = (self._map_pool(kept.noise[None])[0] - latents).norm(dim=1)
        near = now <= options.rematch * kept.distance
        same_everywhere([near])  # processes that differ by rounding would search for different latents
        due = near.nonzero()[:, 0]
        if len(due):
            mapped = self._map_pool(pool).flatten(0, 1)
            index, distance = match(latents[due], mapped, options.reject_quantile, latents)
            kept = Matches(
                kept.noise.index_copy(0, due, vectors[index]),
                kept.distance.index_copy(0, due, distance),
                kept.source.index_copy(0, due, index + epoch * len(vectors)),
            )
        self._matched = replace(kept, share=len(due) / len(latents))
        return self._matched

    @torch.no_grad()
    def _map_pool(self, pool: Tensor) -> Tensor:
        """Map pool [blocks, B, noise_dim] to latents [blocks, B, d], each block with its own BatchNorm statistics.

        Raises `VglannError` when they are not finite.
        """
        at_once = MAPPED_AT_ONCE if pool.is_cuda else MAPPED_AT_ONCE_ON_CPU
        parts = pool.split(max(1, at_once // pool.shape[1]))
        mapped = torch.cat([self.network.forward_blocks(part) for part in parts])
        if not torch.isfinite(mapped).all():
            raise VglannError("imle: the network's latents are not finite; lower --lr")
        return F.normalize(mapped, dim=2) if self.options.normalize else mapped

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d]; with batchnorm="train" in blocks of the batch size, as the author samples."""
        weight = self.network.out.weight
        noise = torch.randn(
            n, self.options.noise_dim, generator=generator, device=weight.device, dtype=weight.dtype
        )
        if self.options.batchnorm == "eval":
            self.network.eval()
            return self(noise)
        if n < 2:
            raise VglannError("-n: this mapping needs at least 2 samples (BatchNorm in train mode)")
        # The running statistics are not the samples' statistics: keep them as the training left them.
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        self.network.train()
        chunks = torch.tensor_split(noise, max(1, n // self.options.batch_size))
        samples = torch.cat([self(chunk) for chunk in chunks])
        for name, buffer in self.network.named_buffers():
            buffer.copy_(buffers[name])
        return samples

    @classmethod
    def sizes(cls, latent_dim: int, options: ImleOptions) -> Iterable[tuple[str, tuple[int, ...]]]:
        """The three layers."""
        yield "linear1.weight", (options.hidden, options.noise_dim)
        yield "linear2.weight", (options.hidden, options.hidden)
        yield "out.weight", (latent_dim, options.hidden)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and statistics of the network."""
        return self.network.state_dict()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the parameters and statistics of the network."""
        self.network.load_state_dict(tensors)
        self.network.eval()
