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


@dataclass(frozen=True)
class Configuration:
    """A kernel and the arguments of one launch of it; a pointer is given as "*fp32" and so on."""

    op: str
    name: str
    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3


def configurations(target: int | str) -> list[Configuration]:
    """Return what is compiled for a target: per op the defaults of the presets `modern` and `paper`, B = 256.

    The search is tuned for each target. It and the convolutions are left out on the informational targets.
    """
    compiled = [*_composite(), *_laplacian(), *_composite_laplacian(), *_latent_adam()]
    compiled += [*_batchnorm_relu(), *_step_guard()]
    if target != LARGE_TARGET:
        compiled = [c for c in compiled if LARGE not in c.name]
    if target in INFORMATIONAL:
        return compiled
    return [*compiled, *_upsample_conv(), *_nearest(divmod(int(target), 10))]


def _composite() -> Iterator[Configuration]:
    from .composite import kernel

    area, frames = 64 * 64, 32
    for layout, last in (("contiguous", False), ("channels-last", True)):
        pixels, warps = kernel.TILES[last]
        constants = {"PIXELS": pixels, "CHANNELS_LAST": last}
        head = 1 if last else frames * area
        back = (1, 3) if last else (area, 1)
        forward = (*["*bf16"] * 3, "*fp32", frames, frames, area, head, *back)
        grad = (3 * frames * area, frames * area, area, 1)
        backward = (
            *["*bf16"] * 3,
            "*fp32",
            "*bf16",
            "*bf16",
            frames,
            frames,
            area,
            head,
            *back,
            *back,
            *grad,
        )
        for name, function, arguments in (
            ("forward", kernel._composite_fwd_kernel, forward),
            ("backward", kernel._composite_bwd_kernel, backward),
        ):
            yield Configuration("composite", f"{name} bf16 {layout}", function, arguments, constants, warps)


def _pyramid(blur: str, pixels: float = 0.0) -> Any:
    from .laplacian.pyramid import Pyramid

    return Pyramid(3, blur, 2.0, (1.0,) * 4, (-1.0, 1.0), "mean", pixels, pixels)


def _laplacian() -> Iterator[Configuration]:
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
        yield Configuration(
            "laplacian",
            f"{blur} {dtype} {size}x{size}" + (" l1 l2" if pixels else ""),
            kernel._laplacian_fwd_kernel,
            (*pointers, 0.5, 0.5, 0.5, (0.5,) * 6, (0.5,) * 6, 3, 32, *strides * 3, -1.0, 2 / 255, 0),
            {"N": size, "WITH_GRAD": True, **constants},
            warps,
        )
    yield Configuration(
        "laplacian",
        "scaling bf16",
        kernel._scale_kernel,
        ("*bf16", "*bf16", "*fp32", 0.5, 1 << 20, 1 << 16),
        {"BLOCK": kernel.SCALE_BLOCK},
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
            yield Configuration(
                "composite_laplacian",
                f"{blur} bf16 channels-last {size}x{size}",
                kernel._composite_laplacian_kernel,
                (*pointers, *weights, 50000, 32, 32, kernel.MAX_FRAMES, 1, 1, -1.0, 2 / 255, 0.5, 0),
                {**constants, "PIXELS": 128 * warps},
                warps,
            )


def _latent_adam() -> Iterator[Configuration]:
    from .latent_adam import kernel

    tables, moments = ("*fp32",) * 3, (0.5, 0.99, 0.5, 0.01, -0.7, -0.001, 1e-8)
    logs, d, batch = (-0.7, -0.001, 1e-8, 30), {"D": 128}, {"BATCH": 256, "TERMS": 8, "D": 128}
    counters = ("*i64", "*i64", "*i32")
    lookup = ("*fp32", *tables, "*i64", "*i64", "*i64", "*fp32", 50000, 100, *logs)
    gather = {"LAZY": True, "TERMS": 8, **d}
    yield Configuration("latent_adam", "gather lazy", kernel._gather_kernel, lookup, gather)
    rows = (*tables, *counters, "*i64", "*fp32", "*fp32", "*i1", 50000, 256, 100, *moments, 30)
    for name, lazy, sphere in (("sparse sphere", False, True), ("lazy", True, False)):
        flags = {"LAZY": lazy, "SPHERE": sphere, "BALL": False, "SKIP": True}
        yield Configuration("latent_adam", f"step {name}", kernel._rows_step_kernel, rows, {**flags, **batch})
    dense = (*tables, *counters[1:], "*i64", "*fp32", "*fp32", "*i1", 50000, 256, 100, *moments)
    constants = {"SKIP": True, "ROWS": kernel.DENSE_ROWS, **d}
    yield Configuration("latent_adam", "step dense", kernel._dense_step_kernel, dense, constants)
    flush = (*tables, *counters[:2], "*fp32", 100, *logs)
    yield Configuration("latent_adam", "flush", kernel._flush_kernel, flush, {"TERMS": 8, **d})


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
            yield Configuration(
                "batchnorm_relu", f"{kind} {name}", function, arguments, constants, kernel.WARPS, stages=1
            )


def _step_guard() -> Iterator[Configuration]:
    from .step_guard import kernel

    flags = ("*i1", "*i1", "*i64", "*i64", "*i1", "*fp32", "*i32", "*i32")
    arguments = ("*fp32", "*fp32", "*i64", None, *flags, 15, 3856)
    yield Configuration(
        "step_guard",
        "15 rows",
        kernel._guard_kernel,
        arguments,
        {"overflow_ptr": None, "BLOCK": kernel.BLOCK},
        kernel.WARPS,
    )


def _upsample_conv() -> Iterator[Configuration]:
    """Yield the launches of the two narrow layers of the video stream, and some variants of them."""
    from .upsample_conv import kernel, tiles, weight_gradient

    def launch(
        name: str, function: Any, options: dict[str, Any], arguments: tuple[Any, ...], **none: None
    ) -> Configuration:
        constants = {name: value for name, value in options.items() if not name.startswith("num_")}
        tuned = {"warps": options["num_warps"], "stages": options["num_stages"]}
        return Configuration("upsample_conv", name, function, arguments, {**constants, **none}, **tuned)

    for layer, channels, outputs, grid in (
        ("conv4", 128, 64, (8, 16, 16)),
        ("head", 64, 4, (16, 32, 32)),
        ("background head", 64, 3, (32, 32)),
    ):
        dims = len(grid)
        depth, height, width = (1, *grid)[-3:]
        positions = 256 * depth * height * width
        sizes = (positions, depth, height, width, channels, outputs)
        none = {"scale_ptr": None, "shift_ptr": None}
        for dtype, wide in (("bf16", False), ("fp32", True)):
            if wide and layer != "conv4":
                continue
            of, shape = "*" + dtype, (dims, channels, outputs, wide)
            precise = {"PRECISION": "ieee"}
            forward = tiles.forward_tiles(*shape) | precise
            end = ("*fp32", None) if layer != "conv4" else (None, "*fp32")
            bias = {"partials_ptr": None} if layer != "conv4" else {"bias_ptr": None}
            pointers: tuple[Any, ...] = (of, of, end[0], None, None, of, end[1])
            name = f"forward {layer} {dtype}"
            yield launch(name, kernel._forward_kernel, forward, (*pointers, *sizes), **none, **bias)
            if layer == "background head":
                continue
            if (layer, wide) == ("conv4", False):
                pointers = (of, of, None, "*fp32", "*fp32", of, "*fp32")
                name += " rectifying"
                yield launch(name, kernel._forward_kernel, forward, (*pointers, *sizes), **bias)
            backward = tiles.input_gradient_tiles(*shape) | precise
            pointers = (of, of, of, None, None, of, None)
            name = f"input gradient {layer} {dtype}"
            yield launch(
                name, kernel._input_gradient_kernel, backward, (*pointers, *sizes), **none, partials_ptr=None
            )
            by_weight = tiles.weight_gradient_tiles(*shape) | precise | {"SUMS": int(layer == "head")}
            pointers = (of, of, None, None, "*fp32", positions, positions // 8, *sizes[1:])
            name = f"weight gradient {layer} {dtype}"
            yield launch(name, weight_gradient._weight_gradient_kernel, by_weight, pointers, **none)
    summed = ("*fp32", "*bf16", "*fp32", 8, 128 * 64 * 64, 128 * 64 * 64)
    tile = {"SPLITS": 8, "BLOCK": 512, "num_warps": 4, "num_stages": 1}
    yield launch("sum of parts", weight_gradient._sum_kernel, tile, summed)
    joined = ("*fp32", "*fp32", 256 << 11, 4096, 64, 64)
    tile = {"PHASES": 8, "M": 128, "AT_ONCE": 128, "CHANNELS": 16, "num_warps": 4, "num_stages": 1}
    yield launch("join statistics", kernel._join_kernel, tile, joined)


def _nearest(capability: tuple[int, int]) -> Iterator[Configuration]:
    """Yield the launches of a search at d = 100, 128 and 512."""
    from .nearest import kernel, tiles

    sizes = (77, 77, 77)  # neither 1 nor a multiple of 16: no launch makes these arguments special
    for name, d, parts in (
        ("scan d=100", 100, 1),
        ("scan d=128", 128, 1),
        ("scan d=512", 512, 1),
        ("wider scan d=100", 100, 2),
        ("wider scan d=512", 512, 2),
    ):
        k = tiles.packed_columns(d, parts)
        options = tiles.scan_options(capability, k, parts)
        tuned = {"warps": options["num_warps"], "stages": options["num_stages"]}
        constants = {"K": k, **{name: value for name, value in options.items() if name.isupper()}}
        if parts == 1 and k <= tiles.RESIDENT:
            scan, values, constants["COUNT"] = kernel._scan_kernel, 2, tiles.tiles_of(k)
        else:
            scan, values, constants["PARTS"] = kernel._stepped_scan_kernel, 4, parts
        pointers = (*["*fp16"] * values, "*fp32")
        yield Configuration("nearest", name, scan, (*pointers, *sizes), constants, **tuned)
    packed = ("*fp32", "*fp64", "*fp16", "*fp16", *["*fp32"] * 4, *sizes)
    for name, parts, queries in (("rows", 1, False), ("queries", 1, True), ("rows, two parts", 2, False)):
        constants = {"K": 112, "PARTS": parts, "QUERIES": queries}
        yield Configuration("nearest", f"pack {name}", kernel._pack_kernel, packed, constants)
    select = ("*fp32", "*fp32", "*fp32", "*i32", "*i32", 77, 77)
    yield Configuration(
        "nearest", "select", kernel._select_kernel, select, {"MAX_GROUPS": 16, **kernel.SELECT}
    )
    tables = ("*fp32", "*fp32", "*i32", "*i32", "*i64", "*i32", 77, 77)
    yield Configuration("nearest", "decide", kernel._decide_kernel, tables, {"MAX_GROUPS": 16})
