"""One training step of GLO."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vglann_kernels import mask_composite

from vglann_fast.config import TrainOptions
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.losses import reconstruction_loss


@dataclass
class Guard:
    """Freezes all updates from the first non-finite loss on, without the host having to look at each loss.

    frozen [] bool; step [] int64 and rows [B] int64: where it happened. Read when logging.
    """

    frozen: Tensor
    step: Tensor
    rows: Tensor

    @classmethod
    def new(cls, batch_size: int, device: torch.device) -> "Guard":
        """A guard that has seen nothing yet."""
        return cls(
            frozen=torch.zeros((), dtype=torch.bool, device=device),
            step=torch.zeros((), dtype=torch.int64, device=device),
            rows=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    @torch.no_grad()
    def watch(self, loss: Tensor, index: Tensor) -> Tensor:
        """Count this step; freeze if its loss is not finite. Returns `frozen`."""
        first = ~self.frozen & ~torch.isfinite(loss)
        self.rows.copy_(torch.where(first, index, self.rows))
        self.frozen |= first
        self.step += ~self.frozen
        return self.frozen


def glo_step(
    generator: TwoStreamGenerator,
    latents: LatentTable,
    optimizer: torch.optim.Adam,
    guard: Guard,
    clips: Tensor,
    index: Tensor,
    options: TrainOptions,
) -> tuple[Tensor, Tensor]:
    """Latents -> generator -> loss -> gradients -> updates of generator and latents.

    Args:
        clips: [B, 3, T, H, W] uint8.
        index: [B] int64, the rows of `latents` that belong to these clips.
        optimizer: Adam with `fused=True` over the generator's parameters.

    Returns:
        (loss [], video [B, 3, T, H, W]), both detached.
    """
    z = latents.gather(index)
    head, background = generator.logits(z)
    video, mask_mean = mask_composite(head, background)
    loss = reconstruction_loss(video, clips, options)
    if options.mask_weight:
        loss = loss + options.mask_weight * mask_mean.mean()

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    assert z.grad is not None

    frozen = guard.watch(loss, index)
    optimizer.found_inf = frozen.float()  # type: ignore[attr-defined]  # fused Adam skips its update where this is 1
    optimizer.step()
    latents.step(index, z.grad, skip=frozen)
    return loss.detach(), video.detach()
