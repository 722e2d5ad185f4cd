"""The launches whose resources are tabled: per op the defaults of the presets, at B = 256."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TARGETS = (80, 86, 89, 90, 100, 120)
# Below the minimum, and another vendor: nothing is promised for them.
INFORMATIONAL = (75, "gfx942")
# Compiles for minutes, into spills: tabled for one target only.
LARGE, LARGE_TARGET = "128x128", 90
# Multiprocessors of the GPUs that bounds are computed for: RTX 4090 and H200.
PROCESSORS: dict[int | str, int] = {89: 128, 90: 132}
# Sizes of the launches that bounds are computed for.
VIDEOS, FRAMES, LATENT = 256, 32, 100
PLANES = VIDEOS * 3 * FRAMES


@dataclass(frozen=True)
class Work:
    """A launch at B = 256: its programs, the trips of its loops, and its bytes.

    programs: programs of the launch. units: how many of `unit`, such as planes, they do together. bytes: of all
    tensors that the launch reads or writes, each once. loops: for each loop in the order of the machine code its
    trips each time it is entered, 0 for a loop that usually has none, and the bytes of global memory that loads
    and stores of a thread move in a trip, outside of inner loops, masked or not. The bytes show how many trips
    the compiler does in one pass.
    """

    programs: int
    unit: str
    units: float
    bytes: float
    loops: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Configuration:
    """A kernel and the arguments of one launch of it; a pointer is given as "*fp32" and so on."""

    op: str
    name: str
    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    work: Work
    warps: int = 4
    stages: int = 3


def configurations(target: int | str) -> list[Configuration]:
    """Return what is compiled for a target: per op the defaults of the presets `modern` and `paper`, B = 256.

    The search is tuned for each target. It and the convolutions are left out on the informational targets.
    """
    from .product_configurations import convolutions, nearest

    compiled = [
        *_composite(),
        *_laplacian(PROCESSORS.get(target, 132)),
        *_composite_laplacian(),
        *_latent_adam(),
    ]
    compiled += [*_batchnorm_relu(), *_step_guard()]
    if target != LARGE_TARGET:
        compiled = [c for c in compiled if LARGE not in c.name]
    if target in INFORMATIONAL:
        return compiled
    return [*compiled, *convolutions(), *nearest(divmod(int(target), 10))]


def _composite() -> Iterator[Configuration]:
    from .composite import kernel

    area, frames = 64 * 64, FRAMES
    for layout, last in (("contiguous", False), ("channels-last", True)):
        pixels, warps = kernel.TILES[last]
        constants = {"PIXELS": pixels, "CHANNELS_LAST": last}
        head = 1 if last else frames * area
        back = (1, 3) if last else (area, 1)
        forward = (*["*bf16"] * 3, "*fp32", frames, frames, area, head, *back)
        grad = (3 * frames * area, frames * area, area, 1)
        pointers = (*["*bf16"] * 3, "*fp32", "*bf16", "*bf16")
        backward = (*pointers, frames, frames, area, head, *back, *back, *grad)
        # Values of a pixel and frame, and of a pixel of the background.
        for name, function, arguments, values, still in (
            ("forward", kernel._composite_fwd_kernel, forward, 4 + 3, 3),
            ("backward", kernel._composite_bwd_kernel, backward, 4 + 3 + 4, 3 + 3),
        ):
            moved = 2 * VIDEOS * area * (frames * values + still)
            loops = ((frames, 2 * values * (pixels // (32 * warps))),)
            work = Work(VIDEOS * area // pixels, "frame", VIDEOS * frames, moved, loops)
            yield Configuration(
                "composite", f"{name} bf16 {layout}", function, arguments, constants, work, warps
            )


def _pyramid(blur: str, pixels: float = 0.0) -> Any:
    from .laplacian.pyramid import Pyramid

    return Pyramid(3, blur, 2.0, (1.0,) * 4, (-1.0, 1.0), "mean", pixels, pixels)


def _laplacian(processors: int) -> Iterator[Configuration]:
    from .laplacian import kernel

    for size, blur, dtype, pixels in (
        *((size, blur, "bf16", 0.0) for blur in ("binomial", "paper") for size in (32, 64, 128)),
        (64, "binomial", "fp32", 0.0),
        (64, "paper", "fp32", 0.0),
        (64, "binomial", "bf16", 0.5),
    ):
        strides = (96 * size * size, 32 * size * size, size * size, size, 1)
        pointers = (f"*{dtype}", "*u8", f"*{dtype}", "*fp32")
        constants = kernel.tile_options(size, _pyramid(blur, pixels))
        warps = constants.pop("num_warps")
        moved = PLANES * size * size * (9 if dtype == "fp32" else 5)
        yield Configuration(
            "laplacian",
            f"{blur} {dtype} {size}x{size}" + (" l1 l2" if pixels else ""),
            kernel._laplacian_fwd_kernel,
            (*pointers, 0.5, 0.5, 0.5, (0.5,) * 6, (0.5,) * 6, 3, 32, *strides * 3, -1.0, 2 / 255, 0),
            {"N": size, "WITH_GRAD": True, **constants},
            Work(PLANES, "plane", PLANES, moved),
            warps,
        )
    # A gradient of 64x64, by programs that take blocks in turn; the second gradient is empty.
    block = kernel.SCALE_BLOCK
    trips, moved = PLANES * 4096 / block / (4 * processors), 4 * block // 128
    yield Configuration(
        "laplacian",
        "scaling bf16",
        kernel._scale_kernel,
        ("*bf16", "*bf16", "*fp32", 0.5, 1 << 20, 1 << 16),
        {"BLOCK": block},
        Work(4 * processors, "plane", PLANES, PLANES * 4096 * 4, ((trips, moved), (0, moved))),
    )


def _composite_laplacian() -> Iterator[Configuration]:
    from .composite_laplacian import kernel
    from .laplacian.kernel import tile_options

    layout = {"HEAD_LAST": True, "BACK_LAST": True}
    for blur in ("binomial", "paper"):
        for size in (32, 64, 128):
            constants = tile_options(size, _pyramid(blur))
            warps = constants.pop("num_warps")
            constants |= {"N": size, "WITH_GRAD": True, "WITH_VIDEO": False, **layout}
            pointers = ("*bf16", "*bf16", "*u8", "*i64", "*bf16", "*bf16", *["*fp32"] * 3)
            weights = (0.5, 0.5, 0.5, (0.5,) * 6, (0.5,) * 6)
            frames, area, tile = kernel.MAX_FRAMES, size * size, constants["T"] ** 2
            groups, blocks = FRAMES // frames, area // (128 * warps)
            # Logits and their gradients, clip, background, partials of its gradient.
            moved = VIDEOS * area * (FRAMES * (8 + 8 + 3) + 6 + 12 * groups)
            # The mask, 4 pixels of a thread; a plane: mask, background, logit, clip and gradient, then its loss.
            mask, plane = (blocks, 4 * 6), (3, tile * 13 + 4)
            frame = ((frames, 0), mask, plane) if size > 32 else ((frames, blocks * 24), plane)
            loops = ((blocks, 4 * 18), *frame, (blocks, 4 * 24), (frames, 4 * 24))
            yield Configuration(
                "composite_laplacian",
                f"{blur} bf16 channels-last {size}x{size}",
                kernel._composite_laplacian_kernel,
                (*pointers, *weights, 50000, 32, 32, kernel.MAX_FRAMES, 1, 1, -1.0, 2 / 255, 0.5, 0),
                {**constants, "PIXELS": 128 * warps},
                Work(VIDEOS * groups, "plane", PLANES, moved, loops),
                warps,
            )
    block, area, groups, planes = kernel.SUM_BLOCK, 64 * 64, FRAMES // kernel.MAX_FRAMES, PLANES
    programs, masks = area // block * 3 * VIDEOS, VIDEOS * groups
    # Partials, several in one pass of the code and the rest of them; one program alone adds losses and masks.
    trips = (groups, 0, planes / block / programs, masks / block / programs)
    loops = tuple((each, block * 4 // 128) for each in trips)
    yield Configuration(
        "composite_laplacian",
        "sum of parts bf16",
        kernel._sums_kernel,
        (*["*fp32"] * 3, "*bf16", "*fp32", groups, planes, masks, 0.5, 0.5, 1, 3),
        {"AREA": area, "WITH_GRAD": True, "BLOCK": block},
        Work(programs, "plane", PLANES, VIDEOS * 3 * area * (4 * groups + 2) + 4 * planes, loops),
    )


def _latent_adam() -> Iterator[Configuration]:
    """Yield the launches for 256 of 50,000 rows that were not used for at least as many steps as matter."""
    from .latent_adam import kernel

    tables, moments = ("*fp32",) * 3, (0.5, 0.99, 0.5, 0.01, -0.7, -0.001, 1e-8)
    rows, terms, row_bytes = 50_000, 30, 4 * LATENT
    logs, d, batch = (-0.7, -0.001, 1e-8, terms), {"D": 128}, {"BATCH": 256, "TERMS": 8, "D": 128}
    counters = ("*i64", "*i64", "*i32")
    series = (-(-terms // 8), 0)

    def launch(
        name: str, function: Any, arguments: tuple[Any, ...], constants: dict[str, Any],
        programs: int, units: int, moved: int, *loops: tuple[float, int],
    ) -> Configuration:  # fmt: skip
        work = Work(programs, "row", units, moved, loops)
        return Configuration("latent_adam", name, function, arguments, constants, work)

    lookup = ("*fp32", *tables, "*i64", "*i64", "*i64", "*fp32", rows, LATENT, *logs)
    gather = {"LAZY": True, "TERMS": 8, **d}
    read = 4 * VIDEOS * row_bytes
    yield launch("gather lazy", kernel._gather_kernel, lookup, gather, VIDEOS, VIDEOS, read, series)
    batched = ("*i64", "*fp32", "*fp32", "*i1", rows, VIDEOS, LATENT, *moments)
    # The batch is compared once: without duplicates the second loop has no trip, nor has the loop within it.
    compared = ((1, 16), (0, 4), (1, 16))
    moved = 7 * VIDEOS * row_bytes
    for name, lazy, sphere in (("sparse sphere", False, True), ("lazy", True, False)):
        flags = {"LAZY": lazy, "SPHERE": sphere, "BALL": False, "SKIP": True, **batch}
        arguments = (*tables, *counters, *batched, terms)
        loops = (*compared, series) if lazy else compared
        yield launch(
            f"step {name}", kernel._rows_step_kernel, arguments, flags, VIDEOS, VIDEOS, moved, *loops
        )
    dense = (*tables, *counters[1:], *batched)
    constants = {"SKIP": True, "ROWS": kernel.DENSE_ROWS, **d}
    moved, programs = (6 * rows + VIDEOS) * row_bytes, rows // kernel.DENSE_ROWS
    looked_up = (VIDEOS, 12)
    yield launch("step dense", kernel._dense_step_kernel, dense, constants, programs, rows, moved, looked_up)
    flush = (*tables, *counters[:2], "*fp32", LATENT, *logs)
    moved = 6 * rows * row_bytes
    yield launch("flush", kernel._flush_kernel, flush, {"TERMS": 8, **d}, rows, rows, moved, series)


def _batchnorm_relu() -> Iterator[Configuration]:
    """Yield the launches of the last layer of the video stream, and of the first one at B = 15."""
    from .batchnorm_relu import kernel

    for name, channels, rows, parts in (
        ("bf16 64 channels", 64, 256 << 14, 128),
        ("bf16 few rows", 512, 480, 0),
    ):
        block = kernel.MANY_CHANNELS if parts else kernel.FEW_CHANNELS
        vectors, saved = ("*fp32",) * 2, ("*fp32",) * 2
        sizes = (rows, rows // parts if parts else kernel.FEW_TILE // block, channels)
        shared = {"CHANNELS": block, "TRAINING": True, "PARTS": parts}

        def tile(values: int, block: int = block, parts: int = parts) -> int:
            return (values if parts else kernel.FEW_TILE) // block

        launches: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
            (
                "forward",
                kernel._forward_kernel,
                ("*bf16", *["*fp32"] * 5, "*i64", "*bf16", *saved, *sizes, rows, parts, rows, 0.1, 1e-5),
                {**shared, "CUMULATIVE": False, "ROWS": tile(kernel.FORWARD_TILE)},
            ),
            (
                "backward",
                kernel._backward_kernel,
                ("*bf16", "*bf16", *vectors, *saved, "*fp32", "*bf16", *vectors, *sizes, rows, parts),
                {**shared, "ROWS": tile(kernel.GRADIENT_TILE)},
            ),
        ]
        if parts:
            launches += [
                (
                    "statistics",
                    kernel._statistics_kernel,
                    ("*bf16", "*fp32", *sizes),
                    {"CHANNELS": block, "ROWS": tile(kernel.STATISTICS_TILE)},
                ),
                (
                    "gradient sums",
                    kernel._gradient_sums_kernel,
                    ("*bf16", "*bf16", *vectors, *saved, "*fp32", *sizes),
                    {"CHANNELS": block, "ROWS": tile(kernel.GRADIENT_TILE)},
                ),
            ]
        for kind, function, arguments, constants in launches:
            # Tensors of a pass over the rows; with all rows the statistics or sums are a first pass over its inputs.
            tensors = {"statistics": 1, "forward": 2, "gradient sums": 2, "backward": 3}[kind]
            # Programs that share the rows; twice as many normalize.
            shares = max(1, 2 * parts if kind == "forward" else parts)
            programs, trips = shares * channels // block, -(-rows // (shares * constants["ROWS"]))
            values = 2 * constants["ROWS"] * block // (32 * kernel.WARPS)
            loops: tuple[tuple[float, int], ...] = ((trips, tensors * values),)
            if not parts:
                loops = ((trips, (tensors - 1) * values), *loops)
            work = Work(programs, "row", rows, 2 * tensors * rows * channels, loops)
            yield Configuration(
                "batchnorm_relu",
                f"{kind} {name}",
                function,
                arguments,
                constants,
                work,
                kernel.WARPS,
                stages=1,
            )


def _step_guard() -> Iterator[Configuration]:
    from .step_guard import kernel

    flags = ("*i1", "*i1", "*i64", "*i64", "*i1", "*fp32", "*i32", "*i32")
    batch, words = 15, 3856
    arguments = ("*fp32", "*fp32", "*i64", None, *flags, batch, words)
    # Indices, and words in either direction.
    loops = ((1, 16 * kernel.BLOCK // (32 * kernel.WARPS)),) * 2
    yield Configuration(
        "step_guard",
        "15 rows",
        kernel._guard_kernel,
        arguments,
        {"overflow_ptr": None, "BLOCK": kernel.BLOCK},
        Work(1, "step", 1, 8 * words + 16 * batch, loops),
        kernel.WARPS,
    )
