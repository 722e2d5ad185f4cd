"""One training step of GLO."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.profiler import record_function as stage  # names the parts of a step for `vglann profile`

from vglann_fast.glo.average import GeneratorAverage
from vglann_fast.glo.batchnorm import RunningStatistics
from vglann_fast.glo.guard import Guard
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.losses import glo_loss
from vglann_fast.glo.optimizer import GeneratorOptimizer
from vglann_fast.glo.perceptual import FeatureLoss
from vglann_fast.options.training import TrainOptions

# Latents [B, d] -> (head [B, 4, T, H, W] or None for the background alone, background [B, 3, H, W]).
StepLogits = Callable[[Tensor], tuple[Tensor | None, Tensor]]


def glo_step(
    logits: StepLogits,
    latents: LatentTable,
    optimizer: GeneratorOptimizer,
    guard: Guard,
    statistics: RunningStatistics,
    batches: Iterable[Batch],
    options: TrainOptions,
    features: Mapping[str, FeatureLoss] | None = None,
    average: GeneratorAverage | None = None,
    *,
    with_video: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Latents -> generator -> loss -> gradients -> updates of generator and latents.

    Args:
        logits: `TwoStreamGenerator.logits`, also compiled or in another precision; or the background alone.
        statistics: the generator's; put back if the loss is not finite.
        batches: the clips of this update and the rows of their latents; one batch without --accumulate. Asked
            for one by one, each after the backward pass of the one before.
        features: of `load_features(options, ...)`, where the loss names a network.
        average: follows the generator.
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
            head, background = logits(z)
        with stage("loss"):
            loss, video = glo_loss(head, background, batch, options, features, with_video=with_video)
        with stage("backward"):
            shares.append(optimizer.backward(loss))
        zs.append(z)
        rows.append(batch.rows)

    with stage("update"), torch.no_grad():
        index, gradient = _joined(rows), _joined([z.grad for z in zs if z.grad is not None])  # [AB], [AB, d]
        own = shares[0] if len(shares) == 1 else torch.stack(shares).sum()
        loss, overflow = optimizer.gather(own, gradient)
        guard.watch(loss, own, index, overflow, statistics)
        optimizer.step(guard.skip, guard.found_inf)
        latents.step(index, gradient, guard.skip)
        if average is not None:
            average.update(guard.step, guard.skip)
    return loss.detach(), video


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
