"""The guard of a training step: it freezes all updates from the first loss that is not finite."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vglann_kernels import guard_step

from vglann_fast.glo.batchnorm import RunningStatistics


@dataclass
class Guard:
    """Freezes all updates from the first non-finite loss on, without the host having to look at each loss.

    frozen [] bool; mine [] bool: whether this process's own loss did it; step [] int64 and rows [B] int64: where
    it happened. Read when logging. skip [] bool: whether the newest step is to change nothing, because all are frozen
    or because float16 overflowed in this one; found_inf [] float32: the same as 0 or 1, for fused Adam.
    """

    frozen: Tensor
    mine: Tensor
    step: Tensor
    rows: Tensor
    skip: Tensor
    found_inf: Tensor

    @classmethod
    def new(cls, batch_size: int, device: torch.device) -> "Guard":
        """A guard that has seen nothing yet."""
        return cls(
            frozen=torch.zeros((), dtype=torch.bool, device=device),
            mine=torch.zeros((), dtype=torch.bool, device=device),
            step=torch.zeros((), dtype=torch.int64, device=device),
            rows=torch.zeros(batch_size, dtype=torch.int64, device=device),
            skip=torch.zeros((), dtype=torch.bool, device=device),
            found_inf=torch.zeros((), dtype=torch.float32, device=device),
        )

    def watch(
        self, loss: Tensor, own: Tensor, index: Tensor, overflow: Tensor | None, statistics: RunningStatistics
    ) -> None:
        """Count this step; freeze if `loss`, of all processes, is not finite.

        `own` [] is the loss of this process alone: whether the cause is among its rows `index`. `overflow` [] bool
        skips this step alone. `statistics` of a frozen step are put back.
        """
        guard_step(
            loss,
            own,
            index,
            overflow=overflow,
            frozen=self.frozen,
            mine=self.mine,
            step=self.step,
            rows=self.rows,
            skip=self.skip,
            found_inf=self.found_inf,
            words=statistics.words,
            kept=statistics.kept,
        )
