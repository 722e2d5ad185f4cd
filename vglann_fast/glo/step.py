"""One training step of GLO."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function as stage  # names the parts of a step for `vglann profile`

from vglann_fast.glo.data import Batch
from vglann_fast.glo.generator import batch_norms
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.losses import glo_loss
from vglann_fast.glo.optimizer import GeneratorAdam
from vglann_fast.glo.perceptual import FeatureLoss
from vglann_fast.glo.precision import Logits
from vglann_fast.options.training import TrainOptions


@dataclass
class Guard:
    """Freezes all updates from the first non-finite loss on, without the host having to look at each loss.

    frozen [] bool; mine [] bool: whether this process's own loss did it; step [] int64 and rows [B] int64: where
    it happened. Read when logging.
    """

    frozen: Tensor
    mine: Tensor
    step: Tensor
    rows: Tensor

    @classmethod
    def new(cls, batch_size: int, device: torch.device) -> "Guard":
        """A guard that has seen nothing yet."""
        return cls(
            frozen=torch.zeros((), dtype=torch.bool, device=device),
            mine=torch.zeros((), dtype=torch.bool, device=device),
            step=torch.zeros((), dtype=torch.int64, device=device),
            rows=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    @torch.no_grad()
    def watch(self, loss: Tensor, own: Tensor, index: Tensor) -> Tensor:
        """Count this step; freeze if `loss`, of all processes, is not finite. Returns `frozen`.

        `own` [] is the loss of this process alone: whether the cause is among its rows `index`.
        """
        first = ~self.frozen & ~torch.isfinite(loss)
        self.rows.copy_(torch.where(first, index, self.rows))
        self.mine |= first & ~torch.isfinite(own)
        self.frozen |= first
        self.step += ~self.frozen
        return self.frozen


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


def glo_step(
    logits: Logits,
    latents: LatentTable,
    optimizer: GeneratorAdam,
    guard: Guard,
    batches: Iterable[Batch],
    options: TrainOptions,
    features: Mapping[str, FeatureLoss] | None = None,
    *,
    with_video: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Latents -> generator -> loss -> gradients -> updates of generator and latents.

    Args:
        logits: `TwoStreamGenerator.logits`, or that in another precision or compiled.
        batches: the clips of this update and the rows of their latents; one batch but for --accumulate. Asked
            for one by one, each after the backward pass of the one before.
        features: of `load_features(options, ...)`, where the loss names a network.
        with_video: whether the videos of the last batch are wanted.

    Returns:
        (mean loss [] over all batches of all processes, video [B, 3, T, H, W] or None), both detached.
    """
    optimizer.zero_grad()
    shares, zs, rows = [], [], []
    video = None
    for batch in batches:
        with stage("generator"):
            z = latents.gather(batch.rows)  # [B, d]
            head, background = logits(z)  # [B, 4, T, H, W], [B, 3, H, W]
        with stage("loss"):
            loss, video = glo_loss(head, background, batch, options, features, with_video=with_video)
        with stage("backward"):
            shares.append(optimizer.backward(loss))
        zs.append(z)
        rows.append(batch.rows)

    with stage("update"), torch.no_grad():
        index, gradient = _joined(rows), _joined([z.grad for z in zs if z.grad is not None])  # [AB], [AB, d]
        own = torch.stack(shares).sum()
        loss, overflow = optimizer.gather(own, gradient)
        frozen = guard.watch(loss, own, index)
        optimizer.step(skip=frozen | overflow)
        latents.step(index, gradient, skip=frozen | overflow)
    return loss.detach(), video


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
