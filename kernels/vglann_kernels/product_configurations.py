"""The launches of the ops that multiply matrices: `upsample_conv` and `nearest`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .configurations import LATENT, VIDEOS, Configuration, Work

# Channels in and out of each transposed convolution of the generator, and the grid that it reads: both streams of
# variant `original`, width 64, for a video of 32 x 64 x 64.
LAYERS = {
    "conv2": (512, 256, (2, 4, 4)),
    "conv3": (256, 128, (4, 8, 8)),
    "conv4": (128, 64, (8, 16, 16)),
    "head": (64, 4, (16, 32, 32)),
    "background conv2": (512, 256, (4, 4)),
    "background conv3": (256, 128, (8, 8)),
    "background conv4": (128, 64, (16, 16)),
    "background head": (64, 3, (32, 32)),
}


def convolutions() -> Iterator[Configuration]:
    """Yield all passes of each layer in bfloat16, of conv4 also rectifying and in float32, and the sums."""
    from .upsample_conv import kernel, tiles, weight_gradient

    for layer, (channels, outputs, grid) in LAYERS.items():
        for dtype, rectifying in (("bf16", False), ("bf16", True), ("fp32", False)):
            if layer == "conv4" or (dtype, rectifying) == ("bf16", False):
                yield from _passes(layer, channels, outputs, grid, dtype, rectifying)
    channels, outputs, grid = LAYERS["conv4"]
    tile = tiles.weight_gradient_tiles(len(grid), channels, outputs, False)
    programs = 64 // tile["TAPS"] * (outputs * tile["TAPS"] // tile["N"]) * (channels // tile["M"])
    splits = tiles.splits_of(VIDEOS * grid[0] * grid[1] * grid[2], programs, tile["P"])
    weights, block = 64 * channels * outputs, 512
    yield Configuration(
        "upsample_conv",
        "sum of parts",
        weight_gradient._sum_kernel,
        ("*fp32", "*bf16", "*fp32", splits, weights, weights),
        {"SPLITS": tiles.power_of_2(splits), "BLOCK": block},
        Work(weights // block, "weight", weights, weights * (4 * splits + 2)),
        stages=1,
    )
    positions, at_once, block = VIDEOS * grid[0] * grid[1] * grid[2], 128, 16
    all_tiles = positions // tiles.tile_rows(False)
    moved = all_tiles * 8 * 2 * outputs * 4
    loops = ((all_tiles // kernel.PARTS * 8 // at_once, 2 * at_once * block * 4 // 128),)
    yield Configuration(
        "upsample_conv",
        "join statistics",
        kernel._join_kernel,
        ("*fp32", "*fp32", positions, all_tiles, all_tiles // kernel.PARTS, outputs),
        {"PHASES": 8, "M": tiles.tile_rows(False), "AT_ONCE": at_once, "CHANNELS": block},
        Work(kernel.PARTS * outputs // block, "video", VIDEOS, moved, loops),
        stages=1,
    )


def _passes(
    layer: str, channels: int, outputs: int, grid: tuple[int, ...], dtype: str, rectifying: bool
) -> Iterator[Configuration]:
    """Yield the forward pass and both gradients of a layer; conv2 to conv4 have no bias, and statistics instead."""
    from .upsample_conv import kernel, tiles, weight_gradient

    dims, wide = len(grid), dtype == "fp32"
    size, phases, taps = 4 if wide else 2, 2**dims, 4**dims
    depth, height, width = (1, *grid)[-3:]
    positions = VIDEOS * depth * height * width
    sizes = (positions, depth, height, width, channels, outputs)
    of, shape, end = "*" + dtype, (dims, channels, outputs, wide), " rectifying" if rectifying else ""
    vectors = ("*fp32", "*fp32") if rectifying else (None, None)
    x, y, weights = positions * channels, positions * phases * outputs, channels * taps * outputs

    def launch(
        name: str, function: Any, options: dict[str, Any], arguments: tuple[Any, ...],
        programs: int, values: float, sums: float, trips: float, step: int,
    ) -> Configuration:  # fmt: skip
        """Return a launch. step: values of the two tiles that a trip loads; values, sums: all that is moved."""
        constants = {name: value for name, value in options.items() if not name.startswith("num_")}
        # What is None is a constant.
        missing = [n for n, value in zip(function.arg_names, arguments) if value is None]
        threads = 32 * options["num_warps"]
        loaded = step * size // threads
        if rectifying and function is not kernel._input_gradient_kernel:
            # Scale and shift of a channel.
            loaded += 8
        work = Work(programs, "video", VIDEOS, values * size + sums * 4, ((trips, loaded),))
        return Configuration(
            "upsample_conv", f"{name} {layer} {dtype}{end}", function, arguments,
            {"PRECISION": "ieee", **constants, **dict.fromkeys(missing)}, work,
            options["num_warps"], options["num_stages"],
        )  # fmt: skip

    rows = tiles.tile_rows(wide)
    all_tiles = positions // rows
    options = tiles.forward_tiles(*shape)
    n, k = options["N"], options["K"]
    with_bias = "head" in layer
    bias, statistics = ("*fp32", None) if with_bias else (None, "*fp32")
    pointers: tuple[Any, ...] = (of, of, bias, *vectors, of, statistics)
    programs = all_tiles if options["JOINED"] else all_tiles * phases * -(-outputs // n)
    trips = (3 if options["JOINED"] else 2) ** dims * -(-channels // k)
    sums = 0 if with_bias else all_tiles * phases * 2 * outputs
    yield launch(
        "forward", kernel._forward_kernel, options, (*pointers, *sizes),
        programs, x + weights + y, sums, trips, rows * k + k * n,
    )  # fmt: skip
    options = tiles.input_gradient_tiles(*shape)
    n, k = options["N"], options["K"]
    pointers = (of, of, of, *vectors, of, "*fp32" if rectifying else None)
    trips = taps // options["JOINED"] if options["JOINED"] else taps * -(-outputs // k)
    yield launch(
        "input gradient", kernel._input_gradient_kernel, options, (*pointers, *sizes),
        all_tiles * -(-channels // n), y + weights + (2 if rectifying else 1) * x,
        2 * all_tiles * channels if rectifying else 0, trips, rows * k + k * n,
    )  # fmt: skip
    options = tiles.weight_gradient_tiles(*shape) | {"SUMS": int(with_bias)}
    m, n, p = options["M"], options["N"], options["P"]
    programs = taps // options["TAPS"] * -(-outputs * options["TAPS"] // n) * -(-channels // m)
    splits = tiles.splits_of(positions, programs, p)
    each = -(-positions // splits)
    yield launch(
        "weight gradient", weight_gradient._weight_gradient_kernel, options,
        (of, of, *vectors, "*fp32", positions, each, *sizes[1:]), programs * splits,
        x + y, splits * (weights + options["SUMS"] * taps * outputs), -(-each // p), p * (m + n),
    )  # fmt: skip


def nearest(capability: tuple[int, int]) -> Iterator[Configuration]:
    """Yield the launches of a search at d = 100, 128 and 512: a portion of the queries, 1,000,000 rows."""
    from .nearest import kernel, tiles
    from .nearest.search import MAXIMA_BYTES

    sizes = (77, 77, 77)  # neither 1 nor a multiple of 16: no launch makes these arguments special
    rows = 1_000_000
    groups = -(-rows // kernel.GROUP_ROWS)
    shares = -(-groups // kernel.PER_PROGRAM)

    def portion(tile: int) -> int:
        return MAXIMA_BYTES // (4 * groups) // tile * tile

    for name, d, parts in (
        ("scan d=100", 100, 1),
        ("scan d=128", 128, 1),
        ("scan d=512", 512, 1),
        ("wider scan d=100", 100, 2),
        ("wider scan d=512", 512, 2),
    ):
        k = tiles.packed_columns(d, parts)
        options = tiles.scan_options(capability, k, parts)
        threads, stages, tile = 32 * options["num_warps"], options["num_stages"], options["QUERIES"]
        constants = {"K": k, **{name: value for name, value in options.items() if name.isupper()}}
        queries = portion(tile)
        # Each pass loads a group's columns and stores the maxima of its products.
        stored = 4 * tile // options.get("AT_ONCE", tile)
        loops: tuple[tuple[float, int], ...] = (
            (groups / shares, kernel.GROUP_ROWS * 2 * k // threads + stored),
        )
        if parts == 1 and k <= tiles.RESIDENT:
            scan, values, constants["COUNT"] = kernel._scan_kernel, 2, tiles.tiles_of(k)
        else:
            scan, values, constants["PARTS"] = kernel._stepped_scan_kernel, 4, parts
            steps = k // tiles.STEP_COLUMNS
            step = 2 * parts * tiles.STEP_COLUMNS * (kernel.GROUP_ROWS + tile) // threads
            # A group begins with the loads of its first steps, one less than there are stages.
            loops = ((groups / shares, (stages - 1) * step + 4), (steps, step))
            if capability >= (9, 0) or steps < 8:
                # All steps in one.
                loops = ((groups / shares, (stages - 1 + steps) * step + 4),)
        moved = 2 * parts * k * (queries + groups * kernel.GROUP_ROWS) + 4 * queries * groups
        work = Work(queries // tile * shares, "query and group", queries * groups, moved, loops)
        yield Configuration(
            "nearest", name, scan, (*["*fp16"] * values, "*fp32", *sizes), constants, work,
            options["num_warps"], stages,
        )  # fmt: skip
    packed = ("*fp32", "*fp64", "*fp16", "*fp16", *["*fp32"] * 4, *sizes)
    queries = portion(128)
    for name, parts, is_query in (("rows", 1, False), ("queries", 1, True), ("rows, two parts", 2, False)):
        k = tiles.packed_columns(LATENT, parts)
        constants = {"K": k, "PARTS": parts, "QUERIES": is_query}
        slots = queries if is_query else groups * kernel.GROUP_ROWS
        # 16 columns of a row and of the offset, which has float64; then what is packed of them.
        loops = ((-(-LATENT // 16), 128), (k // 16, 128 + 32 * parts))
        moved = slots * (4 * LATENT + 2 * k * parts)
        work = Work(slots // kernel.GROUP_ROWS, "row", slots, moved, loops)
        yield Configuration("nearest", f"pack {name}", kernel._pack_kernel, packed, constants, work)
    select = ("*fp32", "*fp32", "*fp32", "*i32", "*i32", 77, 77)
    trips, tile = -(-groups // kernel.SELECT["GROUPS"]), kernel.SELECT["QUERIES"]
    work = Work(queries // tile, "query", queries, 4 * queries * groups, ((trips, 320), (trips, 400)))
    constants = {"MAX_GROUPS": 16, **kernel.SELECT}
    yield Configuration("nearest", "select", kernel._select_kernel, select, constants, work)
    tables = ("*fp32", "*fp32", "*i32", "*i32", "*i64", "*i32", 77, 77)
    # Groups of a query among random unit rows; queries share some of them.
    kept, columns = 1.05, (-(-LATENT // 16), 17 * 4)
    read = groups * (1 - (1 - 1 / groups) ** (kept * queries))
    loops = ((kept, 4), columns, (kept, 4 + 8), columns)
    work = Work(queries, "query", queries, (read * kernel.GROUP_ROWS + queries) * 4 * LATENT, loops)
    constants = {"MAX_GROUPS": 16}
    yield Configuration("nearest", "decide", kernel._decide_kernel, tables, constants, work)
