"""Argument checks shared by the ops: every message names the argument, the expected value and the actual one.

Shapes, dtypes and devices are always checked. Values (index range, finiteness) are checked on the CPU, and on
CUDA only with `VGLANN_CHECK=1`, because reading a value there waits for the device.
"""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless `value` is a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {str(value.dtype).removeprefix('torch.')}")


def check_shape(name: str, value: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the shape matches; a string in `expected` names a size that may be anything."""
    shape = tuple(value.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(size, str) or size == actual for size, actual in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = f"({', '.join(map(str, expected))}{',' if len(expected) == 1 else ''})"
        raise ValueError(f"{name}: expected shape {wanted}, got {shape}")


def check_whole(name: str, value: Any, least: int, most: int) -> int:
    """Return `value` as an int. Raises ValueError unless it is an integer, also of NumPy, from `least` to `most`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {value!r}")
    return number


def check_same_device(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if first.device != value.device:
        raise ValueError(f"{name}: expected device {first.device} (as {first_name}), got {value.device}")


def not_contiguous(**written: Tensor | None) -> str | None:
    """Return the reason why a kernel cannot write to one of these tensors in place, or None where it can."""
    for name, value in written.items():
        if value is not None and not value.is_contiguous():
            return f"{name}: expected a contiguous tensor, got strides {value.stride()}"
    return None


def values_are_checked(value: Tensor) -> bool:
    """Return True if the values of this tensor may be read for a check. Never inside a traced graph."""
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or os.environ.get("VGLANN_CHECK") == "1"


def check_index(name: str, index: Tensor, rows: int) -> None:
    """Raise ValueError unless every value of `index` is in [0, rows). Negative values do not count from the end."""
    if index.numel() == 0 or not values_are_checked(index):
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= rows:
        raise ValueError(f"{name}: expected values in [0, {rows}), got values from {low} to {high}")


def compute_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype that references compute in: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32
