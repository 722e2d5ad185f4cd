"""`upsample_conv` in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import compute_dtype


def upsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Return the transposed convolution of x, or of max(0, scale x + shift): kernel 4, stride 2, padding 1."""
    if scale is not None and shift is not None:
        x = scaled_and_rectified(x, scale, shift)
    convolve = F.conv_transpose2d if x.ndim == 4 else F.conv_transpose3d
    bias = None if bias is None else bias.to(x.dtype)
    return convolve(x, weight.to(x.dtype), bias, stride=2, padding=1)


def scaled_and_rectified(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return max(0, scale x + shift) by channel, computed in float32 (float64 for float64), in the dtype of x."""
    shape, wide = [1, -1] + [1] * (x.ndim - 2), compute_dtype(x)
    value = x.to(wide) * scale.to(wide).view(shape) + shift.to(wide).view(shape)
    return F.relu(value).to(x.dtype)


def statistics(y: Tensor) -> Tensor:
    """Return [1,2,C]: mean of each channel of y, and its sum of squared differences from it."""
    values = y.detach().to(compute_dtype(y)).movedim(1, 0).flatten(1)  # [C,R]
    mean = values.mean(dim=1)
    return torch.stack([mean, (values - mean[:, None]).square().sum(dim=1)])[None]
