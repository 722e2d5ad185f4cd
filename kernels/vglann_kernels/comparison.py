"""Shapes, printed lines and limits of errors of `verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import interpreted


@dataclass(frozen=True)
class Line:
    """One compared quantity; `ok` is error <= limit (NaN is not ok), with half of the values compared at least."""

    op: str
    case: str
    quantity: str
    error: float
    reference_error: float
    limit: float
    left_out: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error <= self.limit and self.left_out <= 0.5

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        if self.left_out:
            verdict += f", {self.left_out:.2%} left out"
        numbers = f"{self.error:9.2e} {self.reference_error:9.2e} {self.limit:9.2e}"
        return f"{self.op:20} {self.case:34} {self.quantity:16} {numbers}  {verdict}"


@dataclass(frozen=True)
class Shapes:
    """The shapes to verify: `batch` videos of `frames` frames of `size` x `size`, latents, a database of `rows`
    rows (500 on a CPU) that a 25th as many queries search, and the loss's options.

    `dtype` is the one dtype of the videos to verify; "" stands for all. `impl` is what is compared with float64:
    "triton", or "reference" alone. `seed` draws the random inputs.
    """

    batch: int = 4
    frames: int = 8
    size: int = 64
    levels: int = 3
    blur: str = "binomial"
    latent_dim: int = 100
    rows: int = 10_000
    device: str = "cuda"
    impl: str = "triton"
    seed: int = 0
    dtype: str = ""


def relative_l2(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||; the plain norm of the difference where `exact` is 0."""
    x, exact = x.detach(), exact.detach().double()
    return float((x.double() - exact).norm() / (exact.norm() if exact.norm() > 0 else 1))


def error_of_sums(count: int) -> float:
    """Return the relative error that float32 sums of `count` values may have, in whatever order.

    Each addition rounds at random, so the error of a sum grows with its length as a random walk does: one value after
    the other costs about a fifth of sqrt(count) rounding steps, and sums in blocks cost less.
    """
    return 0.5 * count**0.5 * torch.finfo(torch.float32).eps


def lines(
    op: str, case: str, names: str, impl: str, run: Callable[[str, Any], list[Tensor]],
    ignored: dict[str, Tensor] | None = None, extra: float = 0.0,
) -> Iterator[Line]:  # fmt: skip
    """`run(impl, float64 or None)` gives the quantities `names`; compares `impl`, reference and exact.

    `ignored` says which values of a quantity are left out. What the reference does to the others within one rounding
    step of the dtype counts as its error: where it rounds the video on the way to a loss it turns signs by itself.
    `extra` is added to each limit, for sums of many values and for products of fewer digits than the dtype has.
    """
    exact, reference = run("reference", torch.float64), run("reference", None)
    step = max(torch.finfo(value.dtype).eps for value in reference)
    compared = reference if impl == "reference" else run(impl, None)
    for name, good, plain, ours in zip(names.split(), exact, reference, compared, strict=True):
        out = (ignored or {}).get(name)
        if out is not None:
            good, plain, ours = (value[~out] for value in (good, plain, ours))
        reference_error = relative_l2(plain, good)
        allowed = reference_error if out is None else min(reference_error, step)
        limit = 16 * step if impl == "reference" else 2 * allowed + 8 * torch.finfo(torch.float32).eps
        left_out = 0.0 if out is None else out.double().mean().item()
        yield Line(op, case, name, relative_l2(ours, good), reference_error, limit + extra, left_out)


def dtypes(shapes: Shapes) -> list[torch.dtype]:
    if shapes.dtype:
        return [getattr(torch, shapes.dtype)]
    half = [torch.float16] if interpreted() else [torch.bfloat16, torch.float16]
    return [torch.float32, *half]


def leaf(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.detach().to(dtype or x.dtype).requires_grad_()


def gradients_of(*leaves: Tensor) -> list[Tensor]:
    for leaf in leaves:
        assert leaf.grad is not None
    return [leaf.grad for leaf in leaves if leaf.grad is not None]
