"""The guard of a training step: it freezes all updates from the first loss that is not finite."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
