"""`latent_gather`, `latent_adam_step`, `latent_flush`: Adam over a table, a few rows a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import impl as switch
from ..checks import FLOATS, check_index, check_same_device, check_shape, check_tensor
from ..launch import operator, why_no_triton
from . import reference
from .state import LatentAdamState, mode_name

RETRACTIONS = (None, "sphere", "ball")

switch.register("latent_adam", "reference")
switch.register("latent_adam", "triton", why_no_triton)


def _launch_gather(
    latents: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, row_step: Tensor, step: Tensor,
    index: Tensor, lr: Tensor | None, betas: Sequence[float], eps: float, lazy: bool,
) -> Tensor:  # fmt: skip
    from . import kernel

    rates = ((betas[0], betas[1]), eps)
    return kernel.gather(latents, (exp_avg, exp_avg_sq), (row_step, step), index, lr, *rates, lazy)


def _launch_step(
    latents: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, row_step: Tensor, step: Tensor, arrived: Tensor,
    index: Tensor, grad: Tensor, lr: Tensor, betas: Sequence[float], eps: float,
    state_mode: str, retraction: str | None, skip: Tensor | None,
) -> None:  # fmt: skip
    from . import kernel

    moments, counters, rates = (exp_avg, exp_avg_sq), (row_step, step, arrived), ((betas[0], betas[1]), eps)
    kernel.step(latents, moments, counters, index, grad, lr, *rates, state_mode, retraction, skip)
    _count_write(latents)


def _launch_flush(
    latents: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, row_step: Tensor, step: Tensor,
    lr: Tensor, betas: Sequence[float], eps: float,
) -> None:  # fmt: skip
    from . import kernel

    kernel.flush(latents, (exp_avg, exp_avg_sq), (row_step, step), lr, (betas[0], betas[1]), eps)
    _count_write(latents)


def _count_write(latents: Tensor) -> None:
    """Tell autograd that the table was written, so that a graph that saved it fails instead of using new values."""
    if not latents.is_inference():
        torch.autograd.graph.increment_version(latents)


_TABLES = "Tensor{0} latents, Tensor{1} exp_avg, Tensor{2} exp_avg_sq, Tensor{3} row_step"
_READ = _TABLES.format("", "", "", "")
_WRITTEN = _TABLES.format("(a!)", "(b!)", "(c!)", "(d!)")

_gather = operator(
    f"latent_gather({_READ}, Tensor step, Tensor index, Tensor? lr, float[] betas, float eps, bool lazy) -> Tensor",
    _launch_gather,
    lambda latents, *arguments: latents.new_empty(arguments[4].shape[0], latents.shape[1]),
)
_step = operator(
    f"latent_adam_step({_WRITTEN}, Tensor(e!) step, Tensor(f!) arrived, Tensor index, Tensor grad, Tensor lr,"
    " float[] betas, float eps, str state_mode, str? retraction, Tensor? skip) -> ()",
    _launch_step,
    lambda *arguments: None,
)
_flush = operator(
    f"latent_flush({_WRITTEN}, Tensor step, Tensor lr, float[] betas, float eps) -> ()",
    _launch_flush,
    lambda *arguments: None,
)


def _triton_refuses(latents: Tensor) -> str | None:
    if latents.dtype != torch.float32:
        return "latents: expected float32, got float64"
    return None if latents.is_contiguous() else "latents: expected a contiguous table"


def _check_table(latents: Tensor, state: LatentAdamState, betas: tuple[float, float], eps: float) -> None:
    check_tensor("latents", latents, (torch.float32, torch.float64))
    check_shape("latents", latents, tuple(state.exp_avg.shape))
    check_same_device("state", state.exp_avg, "latents", latents)
    check_tensor("state.exp_avg", state.exp_avg, (latents.dtype,))
    if not (0 <= betas[0] < 1 and 0 < betas[1] < 1):
        raise ValueError(f"betas: expected 0 <= beta1 < 1 and 0 < beta2 < 1, got {betas}")
    if state.mode == "lazy" and betas[0] ** 2 >= betas[1]:
        raise ValueError(
            f"betas: lazy mode needs beta1 < sqrt(beta2) for its series to converge, got {betas}"
        )
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")


def _check_rows(latents: Tensor, index: Tensor) -> None:
    check_tensor("index", index, (torch.int64,))
    check_shape("index", index, ("B",))
    check_same_device("latents", latents, "index", index)
    check_index("index", index, latents.shape[0])


def _check_lr(latents: Tensor, lr: Tensor) -> None:
    check_tensor("lr", lr, (torch.float32, torch.float64))
    check_shape("lr", lr, ())
    check_same_device("latents", latents, "lr", lr)


@torch.no_grad()
def latent_gather(
    latents: Tensor,
    state: LatentAdamState,
    index: Tensor,
    *,
    lr: Tensor | None = None,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-8,
    impl: str | None = None,
) -> Tensor:
    """Return z [B,d], the rows `index` (int64 [B], duplicates allowed) of `latents` [N,d], as a leaf without
    gradient.

    In lazy mode the rows are first brought up to the current step, with `lr`, `betas` and `eps` as given
    to `latent_adam_step` (`lr` is required there); the table itself is not written. In the other modes this
    is `latents[index]`. Call `z.requires_grad_()`, and hand `z.grad` to `latent_adam_step`.
    Raises TypeError or ValueError on a wrong dtype, shape, device, option or index (see
    `vglann_kernels.checks`).
    """
    _check_table(latents, state, betas, eps)
    _check_rows(latents, index)
    if lr is None:
        if state.mode == "lazy":
            raise ValueError("lr: latent_gather needs it in lazy mode")
    else:
        _check_lr(latents, lr)
    if switch.chosen("latent_adam", impl, latents.device, _triton_refuses(latents)) == "triton":
        tables = (latents, state.exp_avg, state.exp_avg_sq, state.row_step, state.step)
        lazy = state.mode == "lazy"
        return _gather(*tables, index, lr, betas, eps, lazy)
    return reference.gather(latents, state, index, lr, betas, eps)


@torch.no_grad()
def latent_adam_step(
    latents: Tensor,
    state: LatentAdamState,
    index: Tensor,
    grad: Tensor,
    *,
    lr: Tensor,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-8,
    mode: str | None = None,
    retraction: str | None = None,
    skip: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Take one Adam step of the table, in place, with gradient `grad` [B,d] for the rows `index` (int64 [B]).

    Gradients of a row that occurs more than once are summed. `state` comes from `latent_adam_state(latents,
    mode)`.
    sparse  each row in the batch takes the next of its own steps; all other rows stay bit-identical
    dense   the whole table takes one step of torch.optim.Adam (rows outside the batch have gradient zero)
    lazy    the rows in the batch are brought up to date and take this step; others later, when they are read
            (`latent_gather`), written, or flushed. Same trajectory as dense. Call `latent_flush` before
            every change of `lr`, `betas` or `eps`, and before reading or normalizing the table itself.

    lr          0-d tensor on the latents' device (a tensor, so that a captured graph sees its changes)
    mode        None, or the mode of `state`, repeated as a check
    retraction  after the update, sparse mode only: "sphere" z/|z|, "ball" z/max(1,|z|), None
    skip        0-d bool tensor: where true nothing changes, counters included (a step with a non-finite loss)

    latents float32 or float64; grad any floating dtype, converted to the latents' one.
    Raises TypeError or ValueError on a wrong dtype, shape, device, option or index.
    """
    _check_table(latents, state, betas, eps)
    _check_rows(latents, index)
    check_tensor("grad", grad, FLOATS)
    check_shape("grad", grad, (index.shape[0], latents.shape[1]))
    check_same_device("latents", latents, "grad", grad)
    _check_lr(latents, lr)
    if mode is not None and mode_name(mode) != state.mode:
        raise ValueError(f"mode: the state was made for {state.mode!r}, got {mode!r}")
    if retraction not in RETRACTIONS:
        raise ValueError(f"retraction: expected one of 'sphere', 'ball' or None, got {retraction!r}")
    if retraction is not None and state.mode != "sparse":
        raise ValueError(f"retraction: only in sparse mode, got {retraction!r} in {state.mode} mode")
    if skip is not None:
        check_tensor("skip", skip, (torch.bool,))
        check_shape("skip", skip, ())
        check_same_device("latents", latents, "skip", skip)
    if switch.chosen("latent_adam", impl, latents.device, _triton_refuses(latents)) == "triton":
        _step(
            latents, state.exp_avg, state.exp_avg_sq, state.row_step, state.step, state.arrived,
            index, grad, lr, betas, eps, state.mode, retraction, skip,
        )  # fmt: skip
        return
    if skip is None:
        skip = torch.zeros((), dtype=torch.bool, device=latents.device)
    reference.step(latents, state, index, grad, lr, betas, eps, retraction, skip)


@torch.no_grad()
def latent_flush(
    latents: Tensor,
    state: LatentAdamState,
    *,
    lr: Tensor,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-8,
    impl: str | None = None,
) -> None:
    """Bring every row of `latents` up to the current step, in place (lazy; nothing to do in other modes).

    `lr`, `betas` and `eps` are the values of the steps since the last flush. Raises as `latent_gather`.
    """
    _check_table(latents, state, betas, eps)
    _check_lr(latents, lr)
    if state.mode != "lazy":
        return
    if switch.chosen("latent_adam", impl, latents.device, _triton_refuses(latents)) == "triton":
        tables = (latents, state.exp_avg, state.exp_avg_sq, state.row_step, state.step)
        _flush(*tables, lr, betas, eps)
    else:
        reference.flush(latents, state, lr, betas, eps)
