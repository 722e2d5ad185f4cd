"""Compile the kernels ahead of time, on a machine without a GPU, and table what they take.

    python -m vglann_kernels.resources [--out FILE] [--check]

writes `kernels/RESOURCES.md`: registers per thread, stack bytes per thread (spills), shared memory and warps
per program, matrix-unit instructions, for each of `configurations(target)` on each target. `--check` compares
with the committed table instead and exits with 1 when a row got worse or the table belongs to other sources.
Needs triton, whose wheel brings the assembler and `cuobjdump`; must not run under TRITON_INTERPRET=1.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TARGETS = (80, 86, 89, 90, 100, 120)
INFORMATIONAL = (75, "gfx942")  # below the minimum, and another vendor: nothing is promised for them
TOO_LARGE = "128x128"  # left out there: on 75 each such configuration compiles for minutes, into spills
DEFAULT_TABLE = Path(__file__).parents[1] / "RESOURCES.md"
COLUMNS = ("op", "configuration", "target", "registers", "stack", "shared", "warps", "mma")
MATRIX_UNIT = r"[HU]\w*MMA"  # HMMA up to 89 and on 120, HGMMA on 90, UTCHMMA on 100


@dataclass(frozen=True)
class Row:
    """One line of the table; `target` is a compute capability such as "90", or "gfx942" (registers -1).

    `mma` counts the instructions of the disassembly that run on the matrix units, loops once.
    """

    op: str
    configuration: str
    target: str
    registers: int
    stack: int
    shared: int
    warps: int
    mma: int


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

    The search is tuned for each target, and left out on the informational targets.
    """
    compiled = [*_composite(), *_laplacian(), *_composite_laplacian(), *_latent_adam()]
    if target in INFORMATIONAL:
        return [c for c in compiled if TOO_LARGE not in c.name]
    return [*compiled, *_nearest(divmod(int(target), 10))]


def _composite() -> Iterator[Configuration]:
    from .composite import kernel

    area, frames = 64 * 64, 32
    for layout, last in (("contiguous", False), ("channels-last", True)):
        constants = {"PIXELS": kernel.PIXELS, "CHANNELS_LAST": last}
        head = 1 if last else frames * area
        back, out = ((1, 3), (1, 3)) if last else ((area, 1), (frames * area, 1))
        forward = (*["*bf16"] * 3, "*fp32", frames, frames, area, head, *back, *out)
        grad = (3 * frames * area, *((1, 3 * area, 3) if last else (frames * area, area, 1)))
        backward = (*["*bf16"] * 3, "*fp32", *["*bf16"] * 2, frames, area, head, *back, *grad)
        for name, function, arguments in (
            ("forward", kernel._composite_fwd_kernel, forward),
            ("backward", kernel._composite_bwd_kernel, backward),
        ):
            yield Configuration("composite", f"{name} bf16 {layout}", function, arguments, constants)


def _laplacian() -> Iterator[Configuration]:
    import torch

    from .laplacian import kernel

    for size, blur, dtype in (
        *((size, blur, "bf16") for blur in ("binomial", "paper") for size in (32, 64, 128)),
        (64, "binomial", "fp32"),
        (64, "paper", "fp32"),
    ):
        strides = (96 * size * size, 32 * size * size, size * size, size, 1)
        pointers = (f"*{dtype}", "*u8", f"*{dtype}", "*fp32", "*fp16", "*fp32")
        options = kernel.kernel_options(blur, torch.float32 if dtype == "fp32" else torch.bfloat16)
        yield Configuration(
            "laplacian",
            f"{blur} {dtype} {size}x{size}",
            kernel._laplacian_fwd_kernel,
            (*pointers, 3, 32, *strides * 3, -1.0, 2 / 255, 0.5, 0),
            {"N": size, "LEVELS": 3, "WITH_GRAD": True, **options},
            kernel.warps(size, blur),
        )
    yield Configuration(
        "laplacian",
        "scaling bf16",
        kernel._scale_kernel,
        ("*bf16", "*bf16", "*fp32", 0.5, 1 << 20),
        {"IN_PLACE": True, "BLOCK": kernel.SCALE_BLOCK},
    )


def _composite_laplacian() -> Iterator[Configuration]:
    import torch

    from .composite_laplacian import kernel
    from .laplacian.kernel import kernel_options, warps

    for blur in ("binomial", "paper"):
        for size in (32, 64, 128):
            pointers = (
                "*bf16",
                "*bf16",
                "*u8",
                "*i64",
                "*bf16",
                "*bf16",
                *["*fp32"] * 3,
                "*i32",
                "*fp16",
                "*fp32",
            )
            constants = {
                "GROUP": kernel.GROUP, "N": size, "LEVELS": 3, "WITH_GRAD": True, "WITH_VIDEO": False,
                "HEAD_LAST": True, "BACK_LAST": True, "PIXELS": kernel.PIXELS,
                **kernel_options(blur, torch.bfloat16),
            }  # fmt: skip
            yield Configuration(
                "composite_laplacian",
                f"{blur} bf16 channels-last {size}x{size}",
                kernel._composite_laplacian_kernel,
                (*pointers, 50000, 32, 32, 1, 1, 1, -1.0, 2 / 255, 0.5, 0.5, 0),
                constants,
                warps(size, blur),
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


def _nearest(capability: tuple[int, int]) -> Iterator[Configuration]:
    """Yield the launches of a search at d = 100, 128 and 512."""
    from .nearest import kernel

    sizes = (77, 77, 77)  # neither 1 nor a multiple of 16: no launch makes these arguments special
    for name, d, parts in (
        ("scan d=100", 100, 1),
        ("scan d=128", 128, 1),
        ("scan d=512", 512, 1),
        ("wider scan d=100", 100, 2),
        ("wider scan d=512", 512, 2),
    ):
        k = kernel.packed_columns(d, parts)
        options = kernel.scan_options(capability, k, parts)
        tuned = {"warps": options["num_warps"], "stages": options["num_stages"]}
        constants = {"K": k, "QUERIES": options["QUERIES"]}
        if parts == 1 and k <= kernel.RESIDENT:
            scan, values, constants["COUNT"] = kernel._scan_kernel, 2, kernel.tiles_of(k)
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


def compile_one(configuration: Configuration, target: int | str) -> Row:
    """Compile for one target as a launch with these arguments would and read the resources of the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[Any, Any] = dict(configuration.constants)
    attributes: dict[Any, Any] = {}
    names = configuration.kernel.arg_names  # type: ignore[attr-defined]
    for place, name in enumerate(names):
        if name in configuration.constants:
            signature[name] = "constexpr"
            continue
        value = configuration.arguments[place]
        if place in configuration.kernel.constexprs:  # type: ignore[attr-defined]
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, str):
            signature[name] = value
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value == 1 and isinstance(value, int):  # a launch makes ones constants
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=configuration.kernel, signature=signature, constexprs=constants, attrs=attributes)
    amd = isinstance(target, str)
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", target, 32)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    made = triton.compile(source, target=gpu, options=options)
    registers, stack, mma = (-1, -1, -1) if amd else _usage(made.asm["cubin"])
    named = (configuration.op, configuration.name, str(target))
    return Row(*named, registers, stack, made.metadata.shared, configuration.warps, mma)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers and stack bytes per thread, matrix-unit instructions), from `cuobjdump` of triton's own wheel."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage, listing = (
            subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return int(found[1]), int(found[2]), len(re.findall(rf"\s{MATRIX_UNIT}\b", listing))


def source_hash() -> str:
    """sha256 (16 digits) of the kernels in the table."""
    ops = sorted({configuration.op for configuration in configurations(TARGETS[0])})
    files = [Path(__file__).parent / op / "kernel.py" for op in ops]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def write_table(rows: list[Row], path: Path) -> None:
    """The table as Markdown; `read_table` reads it back."""
    import triton

    head = (
        "# What the kernels take\n\n"
        "Registers and stack bytes per thread, shared memory bytes and warps per program, and the instructions\n"
        "for the matrix units in the code (mma), compiled ahead of time. A stack over 0 is spilling.\n"
        "Made by `python -m vglann_kernels.resources`. Targets 75 (no bfloat16 units, below the minimum) and\n"
        "gfx942 (registers, stack and mma not read: -1) are for information, without planes of 128x128 and the\n"
        "search; no kernel was run on either.\n\n"
        f"triton {triton.__version__}, sources {source_hash()}\n\n"
    )
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(getattr(row, name)) for name in COLUMNS)} |" for row in rows]
    path.write_text(head + "\n".join(lines) + "\n")


def read_table(path: Path = DEFAULT_TABLE) -> tuple[str, list[Row]]:
    """(the line that names triton and the sources, the rows) of a table."""
    text = path.read_text()
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    cells = [c for c in cells if len(c) == len(COLUMNS) and c[2] not in ("target", "---")]
    rows = [Row(c[0], c[1], c[2], *map(int, c[3:])) for c in cells]
    stamp = next(line for line in text.splitlines() if line.startswith("triton "))
    return stamp, rows


def _job(job: tuple[str, int | str]) -> Row:
    name, target = job
    (configuration,) = (c for c in configurations(target) if f"{c.op} {c.name}" == name)
    return compile_one(configuration, target)


def compile_all(targets: tuple[int | str, ...] = TARGETS, only: str = "") -> list[Row]:
    """Every configuration whose "op name" contains `only`, for every target, in two processes."""
    compiled = {target: [f"{c.op} {c.name}" for c in configurations(target)] for target in targets}
    names = [name for name in max(compiled.values(), key=len) if only in name]
    jobs = [(name, target) for name in names for target in targets if name in compiled[target]]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_job, jobs))


def worse(rows: list[Row], committed: list[Row]) -> list[str]:
    """Return what got worse than the committed rows.

    More stack or shared memory, fewer matrix-unit instructions, or a row that is missing there.
    """
    known = {(row.op, row.configuration, row.target): row for row in committed}
    found = []
    for row in rows:
        before = known.get((row.op, row.configuration, row.target))
        if before is None or row.stack > before.stack or row.shared > before.shared or row.mma < before.mma:
            found.append(f"{row} was {before}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vglann_kernels.resources", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_TABLE, help="the table to write or compare with")
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("resources: unset TRITON_INTERPRET; the interpreter compiles nothing", file=sys.stderr)
        return 2
    rows = compile_all((*TARGETS, *INFORMATIONAL))
    if not options.check:
        write_table(rows, options.out)
        print(f"{len(rows)} rows written to {options.out}")
        return 0
    stamp, committed = read_table(options.out)
    found = worse(rows, committed)
    if source_hash() not in stamp:
        found.append(f"the table is of other sources ({stamp}); write it again without --check")
    print("\n".join(found) or f"{len(rows)} rows, none worse")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
