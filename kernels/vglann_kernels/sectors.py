"""Count the sectors that the kernels' loads and stores touch: `python -m vglann_kernels.sectors [--target 90]`.

A GPU moves memory in sectors of 32 bytes, and a load or store of a warp asks for all sectors that its lanes touch.
This executes the compiler's last IR above machine code (see `semantics`), where each tensor has its layout: so it is
known which lane holds which address. An access is as wide as the addresses of a thread allow, up to 16 bytes.
Printed per kernel: accesses of a warp; sectors of each, 16 at best with 16 bytes a lane; the bytes of all those
sectors; and the bytes of different addresses. The cache next to the multiprocessor answers a part of plain loads. It
passes stores on, and many copies go around it. Loads that the compiler turns into asynchronous copies to shared
memory are "copy". Scalars are not counted. Needs ttsem, as `proof` does.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from . import semantics
from .batchnorm_relu.op import batch_norm_relu
from .composite.op import mask_composite
from .composite_laplacian.op import composite_laplacian_loss
from .laplacian.op import laplacian_pyramid_loss
from .latent_adam.op import latent_adam_step, latent_flush, latent_gather
from .latent_adam.state import latent_adam_state
from .nearest.op import nearest_rows
from .step_guard.op import guard_step
from .upsample_conv.op import upsample_convolution, upsample_convolution_statistics

SECTOR, WIDEST = 32, 16
ACCESSES = {"tt.load": "load", "tt.store": "store", "ttg.async_copy_global_to_local": "copy"}
Key = tuple[str, str]


class Sectors:
    """Counts by (kernel, "load", "store" or "copy"); an instance is the `seen` of `semantics.executed`."""

    def __init__(self) -> None:
        self.requests: Counter[Key] = Counter()
        self.sectors: Counter[Key] = Counter()
        self._touched: dict[Key, list[np.ndarray]] = {}
        self._layouts: dict[tuple[str, tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, kernel: str, operation: Any, addresses: Any, mask: Any, itemsize: int) -> None:
        pointers = operation.operand_types[0]
        if not pointers.encoding:
            return
        key = kernel, ACCESSES[operation.name]
        shape = tuple(pointers.shape)
        place, repeated = self._places(pointers.encoding, shape, key[1] != "load")
        active = np.broadcast_to(True if mask is None else np.asarray(mask, bool), shape).reshape(-1)
        at = np.broadcast_to(np.asarray(addresses, np.int64), shape).reshape(-1)
        if active.any():
            self._touched.setdefault(key, []).append(np.unique(at[active]) * 16 + itemsize)
        count, lines = requests_of(at[place], active[place] & ~repeated, itemsize)
        self.requests[key] += count
        self.sectors[key] += lines

    def _places(self, encoding: str, shape: tuple[int, ...], once: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return, [warps,registers,lanes], the number of the value in its tensor, and where it is one held twice.

        Of values held twice by a thread one is loaded; of those held by several threads one is stored or copied.
        """
        from ttsem.layouts import parse_encoding, to_linear_layout
        from ttsem.races import apply_many

        known = f"{encoding} {once}", shape
        if known not in self._layouts:
            layout = to_linear_layout(parse_encoding(encoding), shape)
            sizes = [layout.get_in_dim_size(name) for name in ("warp", "register", "lane")]
            warp, register, lane = np.meshgrid(*map(np.arange, sizes), indexing="ij")
            index = apply_many(layout, {"warp": warp, "register": register, "lane": lane})
            place = np.ravel_multi_index([index[f"dim{i}"] for i in range(len(shape))], shape)
            free = layout.free_variable_masks()
            repeated = (register & free["register"]) != 0
            if once:
                repeated |= (lane & free["lane"]) + (warp & free["warp"]) != 0
            self._layouts[known] = place, repeated
        return self._layouts[known]

    def unique_bytes(self, key: Key) -> int:
        """Return the bytes of different addresses."""
        coded = np.unique(np.concatenate(self._touched[key]))
        return int((coded % 16).sum())


def requests_of(at: np.ndarray, active: np.ndarray, itemsize: int) -> tuple[int, int]:
    """Return (accesses of warps, sectors of all of them) for addresses [warps,registers,lanes]."""
    width = WIDEST // itemsize
    while width > 1 and not _is_wide(at, active, itemsize, width):
        width //= 2
    warps, registers, lanes = at.shape
    first = at.reshape(warps * (registers // width), width, lanes)[:, 0]
    taken = active.reshape(warps * (registers // width), width, lanes)[:, 0]
    # A wide access of an aligned address stays within its sector.
    sectors = [len(np.unique(first[i][taken[i]] // SECTOR)) for i in range(len(first))]
    return int(taken.any(axis=1).sum()), sum(sectors)


def _is_wide(at: np.ndarray, active: np.ndarray, itemsize: int, width: int) -> bool:
    """Return True if each `width` neighboring registers are neighbors in memory, aligned, and all of them active."""
    warps, registers, lanes = at.shape
    if registers % width:
        return False
    groups = at.reshape(warps, registers // width, width, lanes)
    together = active.reshape(groups.shape)
    steps = groups - groups[:, :, :1]
    neighbors = steps == itemsize * np.arange(width)[None, None, :, None]
    aligned = groups[:, :, 0] % (itemsize * width) == 0
    same = together == together[:, :, :1]
    return bool((neighbors | ~together).all() and (aligned | ~together[:, :, 0]).all() and same.all())


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (op, call of it with its gradients), small; videos are bfloat16 and channels-last, as the generator's."""
    torch.manual_seed(0)
    bf16 = torch.bfloat16
    head = torch.randn(1, 4, 4, 64, 64).to(bf16).contiguous(memory_format=torch.channels_last_3d)
    background = torch.randn(1, 3, 64, 64).to(bf16).contiguous(memory_format=torch.channels_last)
    clips = torch.randint(0, 256, (1, 3, 4, 64, 64), dtype=torch.uint8)
    x = torch.randn(2, 64, 2, 32, 32).to(bf16).contiguous(memory_format=torch.channels_last_3d)
    video = torch.randn(1, 3, 1, 64, 64).to(bf16)
    leaves = [t.requires_grad_() for t in (head, background, x, video)]
    ones = [torch.ones(64, requires_grad=True) for _ in range(2)]
    index = torch.zeros(1, dtype=torch.int64)

    def composite() -> None:
        made, mean = mask_composite(leaves[0], leaves[1], impl="triton")
        (made.float().sum() + mean.sum()).backward()

    yield "composite", composite
    yield "batchnorm_relu", lambda: batch_norm_relu(leaves[2], *ones, impl="triton").sum().backward()
    yield "laplacian", lambda: laplacian_pyramid_loss(leaves[3], clips[:, :, :1], impl="triton").backward()

    def joint() -> None:
        loss = composite_laplacian_loss(leaves[0], leaves[1], clips, index, impl="triton")
        assert isinstance(loss, torch.Tensor)
        loss.backward()

    yield "composite_laplacian", joint
    yield "upsample_conv conv4", partial(_convolution, 128, 64, 16)
    yield "upsample_conv head", partial(_convolution, 64, 4, 32)
    for mode in ("sparse", "lazy", "dense"):
        yield f"latent_adam {mode}", partial(_latent_step, mode)
    yield "step_guard", _guarded_step
    rows = torch.nn.functional.normalize(torch.randn(1256, 100), dim=1)
    yield "nearest", lambda: nearest_rows(rows[:256], rows[256:], impl="triton")


def _convolution(channels: int, outputs: int, size: int) -> None:
    """Run a layer of the video stream on two frames; the norm that follows conv4 wants statistics."""
    x = torch.randn(1, channels, 2, size, size).to(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    weight = torch.randn(channels, outputs, 4, 4, 4).to(torch.bfloat16).requires_grad_()
    bias = torch.zeros(outputs, requires_grad=True)
    if outputs > 4:
        y, _ = upsample_convolution_statistics(x, weight, impl="triton")
    else:
        y = upsample_convolution(x, weight, bias, impl="triton")
    y.backward(torch.ones_like(y))


def _latent_step(mode: str) -> None:
    """Read 64 rows of a table, 100 wide, take a step of them, and flush the table."""
    table, index, grad = torch.randn(512, 100), torch.randperm(512)[:64], torch.randn(64, 100)
    state, lr = latent_adam_state(table, mode), torch.tensor(0.01)
    latent_gather(table, state, index, lr=lr, impl="triton")
    retraction = "sphere" if mode == "sparse" else None
    latent_adam_step(table, state, index, grad, lr=lr, retraction=retraction, impl="triton")
    latent_flush(table, state, lr=lr, impl="triton")


def _guarded_step() -> None:
    """Decide whether a step of 15 rows counts, and keep 4,096 words of it."""
    loss, words, index = torch.tensor(1.0), torch.zeros(4096, dtype=torch.int32), torch.arange(15)
    flags = {name: torch.tensor(False) for name in ("frozen", "mine", "skip")}
    numbers = {"step": torch.tensor(0), "found_inf": torch.tensor(0.0), "rows": torch.zeros_like(index)}
    kept = torch.zeros_like(words)
    guard_step(loss, loss, index, **flags, **numbers, words=words, kept=kept, impl="triton")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vglann_kernels.sectors", description=__doc__)
    parser.add_argument(
        "--target", type=int, default=90, help="compute capability without its dot; default 90"
    )
    target = parser.parse_args(arguments).target
    if find_spec("ttsem") is None:
        print("sectors: skipped, ttsem is not installed; make proof installs it", file=sys.stderr)
        return 2
    from .composite_laplacian import kernel

    columns = (
        "op",
        "kernel",
        "access",
        "of a warp",
        "sectors each",
        "bytes of sectors",
        "bytes touched",
        "ratio",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    # As with 256 videos: four frames for a program.
    with patch.object(kernel, "frames_of_a_program", lambda *_: 4):
        for op, call in calls():
            counted = Sectors()
            with semantics.executed("ttgir", target, counted):
                call()
            for key in sorted(counted.requests):
                moved, unique = SECTOR * counted.sectors[key], counted.unique_bytes(key)
                each = counted.sectors[key] / counted.requests[key]
                name = key[0].strip("_").removesuffix("_kernel")
                cells = (
                    op,
                    name,
                    key[1],
                    f"{counted.requests[key]:,}",
                    f"{each:.1f}",
                    f"{moved:,}",
                    f"{unique:,}",
                )
                print(f"| {' | '.join(cells)} | {moved / unique:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
