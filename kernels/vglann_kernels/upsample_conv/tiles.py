"""Sizes of the tiles of `upsample_conv`, from the sizes of a layer."""

from __future__ import annotations

from functools import cache
from typing import Any

# Up to this many output channels, all phases (or taps) stand side by side in the columns of a tile.
FEW_OUTPUTS = 8
# Two stages of a pipeline, not three: what is left of a multiprocessor's memory caches what the shifts share.
STAGES = 2
# Programs that share the positions of a weight gradient, together: several for each multiprocessor of a large GPU.
WEIGHT_PROGRAMS, MAX_SPLITS = 512, 128


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def within(least: int, n: int, most: int) -> int:
    """Return the power of two for n, at least `least` and at most `most`."""
    return min(most, max(least, power_of_2(n)))


def tile_rows(wide: bool) -> int:
    """Return the positions of a tile of y and of the gradient by x."""
    return 64 if wide else 128


@cache
def forward_tiles(dims: int, channels: int, outputs: int, wide: bool) -> dict[str, Any]:
    """Return the constants of the forward kernel and its launch options; `wide` tensors are float32."""
    joined = outputs <= FEW_OUTPUTS
    columns = 2**dims * within(16 // 2**dims, outputs, FEW_OUTPUTS) if joined else within(16, outputs, 64)
    tile = {"M": tile_rows(wide), "N": columns, "K": within(16, channels, 32 if wide else 64)}
    return {"DIMS": dims, "JOINED": joined, **tile, "num_warps": 4, "num_stages": STAGES}


@cache
def input_gradient_tiles(dims: int, channels: int, outputs: int, wide: bool) -> dict[str, Any]:
    """Return the constants of the kernel of the input's gradient and its launch options."""
    most = 32 if wide else 64
    joined, depth = 0, within(16, outputs, most)
    if outputs <= FEW_OUTPUTS:
        # A step of 64 columns, with an address for each tap, does not fit in the registers.
        joined = min(16, 32 // power_of_2(outputs))
        depth = joined * power_of_2(outputs)
    tile = {"M": tile_rows(wide), "N": within(16, channels, 64 if wide else 128), "K": depth}
    warps = 8 if tile["N"] > 64 else 4
    return {"DIMS": dims, "JOINED": joined, **tile, "num_warps": warps, "num_stages": STAGES}


@cache
def weight_gradient_tiles(dims: int, channels: int, outputs: int, wide: bool) -> dict[str, Any]:
    """Return the constants of the kernel of the weights' gradient and its launch options.

    TAPS places of the kernel, each with COLUMNS outputs, stand side by side in the N columns of a tile.
    """
    most = 64 if wide else 128
    columns = min(64, power_of_2(outputs))
    taps = min(4**dims, most // columns)
    rows = within(16, channels, most)
    tile = {"M": rows, "N": max(16, taps * columns), "P": 32 if wide else 64}
    warps = 8 if rows * tile["N"] > 8192 else 4
    return {"DIMS": dims, "TAPS": taps, **tile, "num_warps": warps, "num_stages": STAGES}


def splits_of(positions: int, programs: int, rows: int) -> int:
    """Return how many programs share the positions, where `programs` of `rows` positions a step make all weights."""
    return max(1, min(MAX_SPLITS, WEIGHT_PROGRAMS // programs, -(-positions // (4 * rows))))
