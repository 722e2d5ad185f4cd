"""BatchNorm of the generator: the layer with its ReLU, its statistics over processes, and their re-estimation."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.runtime.distributed import Ranks

# Latents over which BatchNorm statistics are averaged.
RECOMPUTE_LATENTS = 2048


class _SumOverProcesses(torch.autograd.Function):
    """y = sum of x over all processes; the gradient of a sum of all processes' losses by x is a sum, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y = gradients[0].contiguous().clone()
        dist.all_reduce(y)
        return y


def sync_batch_norms(generator: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm of `generator` take its statistics over the batches of all processes, in train mode.

    Batches are of one size in all processes. torch's own SyncBatchNorm has no CPU version; this one is plain
    tensor arithmetic and reads a layer's input twice.
    """
    for module in generator.modules():
        if ranks.size > 1 and isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.forward = _SyncedForward(module, ranks.size)  # type: ignore[method-assign,assignment]


@dataclass
class _SyncedForward:
    norm: nn.BatchNorm2d | nn.BatchNorm3d
    size: int

    def __call__(self, x: Tensor, **relu: bool) -> Tensor:
        norm = self.norm
        if not norm.training:
            return type(norm).forward(norm, x, **relu)
        shape = [1, -1] + [1] * (x.ndim - 2)
        over = [0, *range(2, x.ndim)]
        wide = x.double() if x.dtype == torch.float64 else x.float()
        mean = _SumOverProcesses.apply(wide.mean(over)) / self.size  # [C]
        centered = wide - mean.view(shape)
        variance = _SumOverProcesses.apply(centered.square().mean(over)) / self.size  # [C]
        if norm.num_batches_tracked is not None:  # None inside `frozen_statistics`
            self._remember(mean.detach(), variance.detach(), self.size * x.numel() // x.shape[1])
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        y = (centered * scale.view(shape) + norm.bias.view(shape)).to(x.dtype)
        return F.relu(y) if isinstance(norm, VideoNorm) and relu.get("relu", True) else y

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        share = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.item()
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (count / max(1, count - 1)), share)


class VideoNorm(nn.BatchNorm3d):
    """BatchNorm3d and the ReLU that follows it, by way of the 2-D one, for which PyTorch has tuned kernels.

    Joining time and rows of a dense tensor is a view in either memory format. Forward and backward of 4 videos on
    one CPU core, channels-last: 64 x 16 x 32 x 32 in 49.5 ms against 52.1 ms, 128 x 8 x 16 x 16 in 6.7 ms against
    10.3 ms. On a GPU not measured.
    """

    def forward(self, x: Tensor, *, relu: bool = True) -> Tensor:
        flat = super().forward(x.flatten(2, 3))  # [B, C, T H, W]
        if (
            relu
        ):  # in place: nothing needs the values before it, and no second tensor is kept for the backward pass
            flat = F.relu(flat, inplace=True)
        return flat.unflatten(2, x.shape[2:4])

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected a video with time and rows joined, got {input.dim()} dimensions")


def batch_norms(generator: nn.Module) -> Iterator[nn.BatchNorm2d | nn.BatchNorm3d]:
    """The BatchNorm layers of a generator, each once."""
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            yield module


@contextmanager
def frozen_statistics(generator: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode uses the statistics of its batch and leaves the running ones alone."""
    # Not by track_running_stats: without running tensors a layer saves fewer for its backward pass, and activation
    # checkpointing, which runs layers again in here, insists on the same ones.
    norms = list(batch_norms(generator))
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


@torch.no_grad()
def recompute_batchnorm(generator: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running BatchNorm statistics by plain averages over `batches` of latents [B, d].

    The running averages of training belong to parameters and latents that have since moved; sampling in eval
    mode is only as good as these statistics. Leaves the generator in the mode it was in.

    Args:
        generator: a `TwoStreamGenerator`.

    Raises:
        ValueError: no batches.
    """
    logits = cast(Callable[[Tensor], object], generator.logits)
    norms = list(batch_norms(generator))
    momenta = [norm.momentum for norm in norms]
    was_training = generator.training
    seen = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
        generator.train()
        for z in batches:
            logits(z)
            seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        generator.train(was_training)
    if not seen:
        raise ValueError("batches: expected at least one batch of latents, got none")


class RunningStatistics:
    """BatchNorm's running statistics as the last step left them that counted: a forward pass moves them before
    anyone knows its loss.

    The layers' buffers become views of one vector for each dtype, so that all of them are kept or put back by two
    operations.
    """

    @torch.no_grad()
    def __init__(self, generator: nn.Module) -> None:
        buffers: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
        for norm in batch_norms(generator):
            for name, buffer in norm.named_buffers():
                buffers.setdefault(buffer.dtype, []).append((norm, name, buffer))
        self._vectors: list[tuple[Tensor, Tensor]] = []  # (where the layers look, what is kept)
        for group in buffers.values():
            vector = torch.cat([buffer.reshape(-1) for *_, buffer in group])
            parts = vector.split([buffer.numel() for *_, buffer in group])
            for (layer, name, buffer), part in zip(group, parts, strict=True):
                setattr(layer, name, part.view(buffer.shape))
            self._vectors.append((vector, vector.clone()))

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the statistics as they are now."""
        for vector, kept in self._vectors:
            kept.copy_(vector)

    @torch.no_grad()
    def settle(self, frozen: Tensor) -> None:
        """Keep the statistics a step has left, or where `frozen` [] is true put those before it back."""
        for vector, kept in self._vectors:
            torch.where(frozen, kept, vector, out=kept)
            vector.copy_(kept)


def latent_batches(rows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches for `recompute_batchnorm`: at most 2,048 of the latents, evenly spaced, none alone in its batch.

    Neighbors are clips of one shot; they are dealt out to different batches, as the shuffle of the training does.
    """
    chosen = rows[:: -(-len(rows) // RECOMPUTE_LATENTS)]
    count = max(1, len(chosen) // batch_size)
    yield from (chosen[first::count] for first in range(count))
