"""BatchNorm of the generator: the layers with their ReLU, and the re-estimation of their statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from vglann_kernels import batch_norm_relu
from vglann_kernels.batchnorm_relu.reference import batch_norm

from vglann_fast.runtime.distributed import Ranks

# Latents over which BatchNorm statistics are averaged.
RECOMPUTE_LATENTS = 2048


class _NormAndRelu(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm layer and, unless told otherwise, the ReLU that follows it: one op of the kernel library.

    processes: in train mode the statistics are taken over the batches of all of them.
    statistics: as `batch_norm_relu` takes them.
    """

    processes = 1

    def forward(
        self, x: Tensor, *, relu: bool = True, statistics: tuple[Tensor, int] | None = None
    ) -> Tensor:
        self._check_input_dim(x)
        tensors = (self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked)
        if not relu:
            options = (self.training, self.momentum, self.eps, self.processes)
            return batch_norm(x, *tensors, *options, relu=False)
        return batch_norm_relu(
            x,
            *tensors,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            processes=self.processes,
            statistics=statistics,
        )


class ImageNorm(_NormAndRelu, nn.BatchNorm2d):
    """BatchNorm2d with ReLU."""


class VideoNorm(_NormAndRelu, nn.BatchNorm3d):
    """BatchNorm3d with ReLU."""


def sync_batch_norms(generator: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm of `generator` take its statistics over the batches of all processes, in train mode.

    Batches are of one size in all processes.
    """
    for module in generator.modules():
        if isinstance(module, _NormAndRelu):
            module.processes = ranks.size


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

    The layers' buffers become views of one vector of 32-bit words, so that all of them are kept or put back at once.

    words [n] int32: where the layers look. kept [n] int32: what is kept, see `Guard.watch`.
    """

    @torch.no_grad()
    def __init__(self, generator: nn.Module) -> None:
        buffers = [
            (norm, name, buffer) for norm in batch_norms(generator) for name, buffer in norm.named_buffers()
        ]
        # The widest values first, so that each lies at a multiple of its size.
        buffers.sort(key=lambda found: -found[2].element_size())
        pieces = [buffer.reshape(-1).view(torch.int32) for *_, buffer in buffers]
        self.words = torch.cat(pieces)
        for (layer, name, buffer), part in zip(
            buffers, self.words.split(list(map(len, pieces))), strict=True
        ):
            # `data`, which counts its own writes: a layer's counter moves while autograd holds the others.
            setattr(layer, name, part.view(buffer.dtype).view(buffer.shape).data)
        self.kept = self.words.clone()

    def keep(self) -> None:
        """Keep the statistics as they are now."""
        self.kept.copy_(self.words)


def latent_batches(rows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches for `recompute_batchnorm`: at most 2,048 of the latents, evenly spaced, none alone in its batch.

    Neighbors are clips of one shot; they are dealt out to different batches, as the shuffle of the training does.
    """
    chosen = rows[:: -(-len(rows) // RECOMPUTE_LATENTS)]
    count = max(1, len(chosen) // batch_size)
    yield from (chosen[first::count] for first in range(count))
