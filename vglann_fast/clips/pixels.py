"""Pixel values of clips: 8-bit values to the range of a generator and back, and their PSNR."""

import torch
from torch import Tensor


def to_range(clips: Tensor, dtype: torch.dtype, limits: tuple[float, float]) -> Tensor:
    """uint8 clips of any shape -> floating, with 0 mapped to limits[0] and 255 to limits[1].

    Floating-point clips are in that range already.
    """
    if clips.is_floating_point():
        return clips
    low, high = limits
    return clips.to(dtype) * ((high - low) / 255.0) + low


def to_uint8(video: Tensor, limits: tuple[float, float]) -> Tensor:
    """The inverse of `to_range`, rounded and clipped to 0..255."""
    low, high = limits
    return ((video.float() - low) * (255.0 / (high - low))).round_().clamp_(0, 255).byte()


def psnr(made: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip: uint8 [B, ...] against uint8 [B, ...] -> float64 [B].

    10 log10(255^2 / mean squared difference) over all values of a clip; infinite for equal clips.
    """
    error = (made.double() - real.double()).square().flatten(1).mean(1)
    return 10.0 * (255.0**2 / error).log10()
