"""The moments and counters of Adam over a table of latents, for one of its three modes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_shape, check_tensor

MODES = ("sparse", "lazy", "dense")
FORMER_MODES = {"row": "sparse", "catchup": "lazy"}


def mode_name(mode: str) -> str:
    """Return the name of a mode today; earlier names are accepted, without a warning that would break a graph."""
    return FORMER_MODES.get(mode, mode)


@dataclass
class LatentAdamState:
    """State of N latents of d numbers; tensors are on the latents' device and updated in place.

    exp_avg     [N,d]  first moment, float32 (float64 for float64 latents)
    exp_avg_sq  [N,d]  second moment, same dtype
    row_step    [N]    int64. sparse: updates of this row. lazy: the step that this row is up to date with.
    step        []     int64. lazy and dense: steps taken by the whole table. sparse: unused, stays 0.
    arrived     []     int32. Scratch of the Triton step (programs that have read `step`), 0 between calls; not
                       part of a checkpoint.
    """

    mode: str
    exp_avg: Tensor
    exp_avg_sq: Tensor
    row_step: Tensor
    step: Tensor
    arrived: Tensor

    def __post_init__(self) -> None:
        self.mode = mode_name(self.mode)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: name -> tensor (not copies). Zeroing them all restarts Adam."""
        names = ("exp_avg", "exp_avg_sq", "row_step", "step")
        return {name: getattr(self, name) for name in names}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy a checkpoint's tensors into this state, in place.

        Raises ValueError on a missing name or a wrong shape.
        """
        for name, mine in self.tensors().items():
            if name not in tensors:
                raise ValueError(f"latent Adam state: {name!r} is missing; got {sorted(tensors)}")
            check_tensor(name, tensors[name], (mine.dtype,))
            check_shape(name, tensors[name], tuple(mine.shape))
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])


def latent_adam_state(latents: Tensor, mode: str = "sparse") -> LatentAdamState:
    """Return a new state for `latents` [N,d] (float32 or float64).

    mode  "sparse"  each row has its own step count; rows outside a batch do not change at all
          "dense"   what torch.optim.Adam does to the whole table: untouched rows move on old momentum
          "lazy"    the trajectory of "dense", computed only when a row is read or written
          "row" and "catchup", the earlier names of "sparse" and "lazy", are accepted
    Raises TypeError on another dtype, ValueError on another rank or mode.
    """
    check_tensor("latents", latents, (torch.float32, torch.float64))
    check_shape("latents", latents, ("N", "d"))
    if mode_name(mode) not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    return LatentAdamState(
        mode=mode,
        exp_avg=torch.zeros_like(latents, requires_grad=False, memory_format=torch.contiguous_format),
        exp_avg_sq=torch.zeros_like(latents, requires_grad=False, memory_format=torch.contiguous_format),
        row_step=torch.zeros(len(latents), dtype=torch.int64, device=latents.device),
        step=torch.zeros((), dtype=torch.int64, device=latents.device),
        arrived=torch.zeros((), dtype=torch.int32, device=latents.device),
    )
