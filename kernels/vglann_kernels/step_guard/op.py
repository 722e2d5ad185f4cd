"""`guard_step`: whether a training step counts, and what is put back when it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import check_same_device, check_shape, check_tensor, not_contiguous
from ..launch import operator, why_no_triton
from . import reference

switch.register("step_guard", "reference")
switch.register("step_guard", "triton", why_no_triton)


def _launch(*tensors: Any) -> None:
    from . import kernel

    kernel.guard(*tensors)
    for written in tensors[4:]:
        if written is not None and not written.is_inference():
            # Tell autograd that it was written, so that a graph that saved it fails instead of using new values.
            torch.autograd.graph.increment_version(written)


_guard = operator(
    "step_guard(Tensor loss, Tensor own, Tensor index, Tensor? overflow, Tensor(a!) frozen, Tensor(b!) mine,"
    " Tensor(c!) step, Tensor(d!) rows, Tensor(e!) skip, Tensor(f!) found_inf, Tensor(g!)? words,"
    " Tensor(h!)? kept) -> ()",
    _launch,
    lambda *tensors: None,
)


@torch.no_grad()
def guard_step(
    loss: Tensor,
    own: Tensor,
    index: Tensor,
    *,
    frozen: Tensor,
    mine: Tensor,
    step: Tensor,
    rows: Tensor,
    skip: Tensor,
    found_inf: Tensor,
    overflow: Tensor | None = None,
    words: Tensor | None = None,
    kept: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Decide whether a step counts, without the host having to look at its loss. All results are written in place.

    loss       []   float; a loss that is not finite freezes all steps from this one on
    own        []   float; this process's part of the loss
    index      [B]  int64, the rows of this step
    overflow   []   bool; true skips this step alone. None: false
    frozen     []   bool; true from the first loss that was not finite
    mine       []   bool; whether this process's own part was not finite then
    step       []   int64; counts the steps that are not frozen
    rows       [B]  int64; `index` of the step that froze, and as before until then
    skip       []   bool; frozen or overflow
    found_inf  []   float32; `skip` as 0 or 1, as torch's fused optimizers take it
    words      [n]  int32, and `kept` of the same shape: any values as bits. Where frozen, words is put back to kept,
               else kept becomes words. Both or neither.

    The Triton kernel takes contiguous tensors and no float64; with others "auto" takes the reference.
    `impl`: "auto", "triton" or "reference"; None takes the process default (see `vglann_kernels.impl`).
    Raises TypeError on a wrong dtype, ValueError on a wrong shape or mixed devices.
    """
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    expected: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...], tuple[int | str, ...]]] = {
        "loss": (loss, floats, ()),
        "own": (own, floats, ()),
        "index": (index, (torch.int64,), ("B",)),
        "overflow": (overflow, (torch.bool,), ()),
        "frozen": (frozen, (torch.bool,), ()),
        "mine": (mine, (torch.bool,), ()),
        "step": (step, (torch.int64,), ()),
        "rows": (rows, (torch.int64,), tuple(index.shape)),
        "skip": (skip, (torch.bool,), ()),
        "found_inf": (found_inf, (torch.float32,), ()),
        "words": (words, (torch.int32,), ("n",)),
        "kept": (kept, (torch.int32,), ("n",) if words is None else tuple(words.shape)),
    }
    for name, (value, dtypes, shape) in expected.items():
        if value is not None:
            check_tensor(name, value, dtypes)
            check_shape(name, value, shape)
            check_same_device("loss", loss, name, value)
    if (words is None) != (kept is None):
        raise ValueError("words, kept: expected both or neither, got one of them")
    tensors = (loss, own, index, overflow, frozen, mine, step, rows, skip, found_inf, words, kept)
    unsupported = not_contiguous(rows=rows, words=words, kept=kept)
    for name, value in (("loss", loss), ("own", own)):
        if value.dtype == torch.float64:
            unsupported = f"{name}: expected a 16- or 32-bit float, got float64"
    if switch.chosen("step_guard", impl, loss.device, unsupported) == "triton":
        _guard(*tensors)
    else:
        reference.guard_step(*tensors)
