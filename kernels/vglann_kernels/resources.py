"""Compile the kernels ahead of time, on a machine without a GPU, and table what they take.

    python -m vglann_kernels.resources [--out FILE] [--check] [--only TEXT]

writes a table with one row for each of `configurations(target)` on each target, and a table of `bounds` for two of
them. The tables of the Triton version that the tests pin are in `kernels/RESOURCES.md`; any other version writes
`kernels/RESOURCES-<version>.md` for these two targets, for example with `PYTHONPATH=<folder with triton 3.6>`.
`--check` compares with the tables of the installed version instead and exits with 1 when a resource or a bound got
worse or the tables belong to other sources. A row of bounds is "-", and the exit code 1, where the code is not what
`work` of its configuration describes. Needs triton, whose wheel brings the assembler and `cuobjdump`; must
not run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from . import bounds
from .configurations import INFORMATIONAL, TARGETS, Configuration, configurations
from .sass import MATRIX_UNIT, CodeError, instructions_of
from .sources import sources

FOLDER = Path(__file__).parents[1]
DEFAULT_TABLE = FOLDER / "RESOURCES.md"
# The version in DEFAULT_TABLE, major and minor.
DEFAULT_VERSION = "3.9"
# What is compiled with any other version.
FEW_TARGETS = (89, 90)
COLUMNS = (
    "op", "configuration", "target", "registers", "stack", "shared", "warps", "programs", "instructions", "mma",
)  # fmt: skip

# Per multiprocessor: (warps, programs, KB of shared memory). Each of its four parts has 16,384 registers, which are
# given out in 256 per warp.
MULTIPROCESSORS = {
    "75": (32, 16, 64),
    "80": (64, 32, 164),
    "86": (48, 16, 100),
    "89": (48, 24, 100),
    "90": (64, 32, 228),
    "100": (64, 32, 228),
    "120": (48, 24, 100),
}
PARTS, REGISTERS, REGISTER_UNIT, RESERVED_SHARED = 4, 16_384, 256, 1024


@dataclass(frozen=True)
class Row:
    """One line of the table; `target` is a compute capability such as "90", or "gfx942" (what is not read is -1).

    registers and stack bytes are per thread, shared bytes and warps per program. `programs` fit on a multiprocessor
    at once. `instructions` counts the disassembly, loops once, and `mma` those that run on the matrix units.
    """

    op: str
    configuration: str
    target: str
    registers: int
    stack: int
    shared: int
    warps: int
    programs: int
    instructions: int
    mma: int


def compile_kernel(configuration: Configuration, target: int | str) -> Any:
    """Compile for one target as a launch with these arguments would; returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .launch import LAUNCH

    signature: dict[str, Any] = {}
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
        elif value == 1 and isinstance(value, int):
            # A launch makes ones constants.
            signature[name], constants[name] = "constexpr", 1
        elif isinstance(value, tuple):
            signature[name] = ("fp32",) * len(value)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=configuration.kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages, **LAUNCH}
    return triton.compile(source, target=gpu, options=options)


def compile_one(configuration: Configuration, target: int | str) -> tuple[Row, str]:
    """Compile for one target; return the resources and the disassembly, "" for another vendor."""
    compiled = compile_kernel(configuration, target)
    shared, warps = compiled.metadata.shared, configuration.warps
    named = (configuration.op, configuration.name, str(target))
    if isinstance(target, str):
        return Row(*named, -1, -1, shared, warps, -1, -1, -1), ""
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(cubin, "--dump-resource-usage"))
    if usage is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    registers, stack = int(usage[1]), int(usage[2])
    text = cuobjdump(cubin, "-sass")
    opcodes = [instruction.opcode for instruction in instructions_of(text) if instruction.opcode != "NOP"]
    mma = sum(MATRIX_UNIT.match(opcode) is not None for opcode in opcodes)
    programs = programs_at_once(str(target), registers, shared, warps)
    return Row(*named, registers, stack, shared, warps, programs, len(opcodes), mma), text


def programs_at_once(target: str, registers: int, shared: int, warps: int) -> int:
    """Return how many programs fit on a multiprocessor at once."""
    max_warps, max_programs, kilobytes = MULTIPROCESSORS[target]
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    reserved = 0 if target == "75" else RESERVED_SHARED
    by_shared = kilobytes * 1024 // (shared + reserved) if shared + reserved else max_programs
    by_registers = REGISTERS // per_warp * PARTS
    return min(max_programs, max_warps // warps, by_registers // warps, by_shared)


def cuobjdump(cubin: bytes, option: str) -> str:
    """Return what `cuobjdump` of triton's own wheel prints of a cubin."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        done = subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def disassembly(cubin: bytes) -> list[str]:
    """Return the opcodes of a cubin in the order of the code, such as "LDG.E.128"."""
    return [instruction.opcode for instruction in instructions_of(cuobjdump(cubin, "-sass"))]


def source_hash(folder: Path = Path(__file__).parent) -> str:
    """Return the sha256 (16 digits) of what decides the launches of all ops in the table."""
    ops = sorted({configuration.op for configuration in configurations(TARGETS[0])})
    return hashlib.sha256("".join(sources(op, folder) for op in ops).encode()).hexdigest()[:16]


def triton_version() -> str:
    """Return major and minor version of the installed triton."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def targets_of(version: str) -> tuple[int | str, ...]:
    """Return the targets in the table of a version of triton."""
    return (*TARGETS, *INFORMATIONAL) if version == DEFAULT_VERSION else FEW_TARGETS


def table_of(version: str) -> Path:
    """Return the table of a version of triton."""
    return DEFAULT_TABLE if version == DEFAULT_VERSION else FOLDER / f"RESOURCES-{version}.md"


def write_table(rows: list[Row], limits: list[bounds.Bounds], path: Path) -> None:
    """Write both tables as Markdown; `read_table` and `bounds.read` read them back."""
    import triton

    head = (
        "# What the kernels take\n\n"
        "Registers and stack bytes per thread, shared memory bytes and warps per program, programs that fit on a\n"
        "multiprocessor at once, instructions of the code (loops once) and those for the matrix units among them\n"
        "(mma), compiled ahead of time. A stack over 0 is spilling.\n"
        "Made by `python -m vglann_kernels.resources`. Targets 75 (no bfloat16 units, below the minimum) and\n"
        "gfx942 (only shared memory is read) are for information, without search and convolutions.\n"
        "No kernel was run on either. Planes of 128x128 are compiled for one target only.\n\n"
        f"triton {triton.__version__}, sources {source_hash()}\n\n"
    )
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(getattr(row, name)) for name in COLUMNS)} |" for row in rows]
    path.write_text(head + "\n".join(lines) + "\n\n" + bounds.section(limits))


def read_table(path: Path = DEFAULT_TABLE) -> tuple[str, list[Row]]:
    """Return (the line that names triton and the sources, the rows) of a table."""
    text = path.read_text()
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    cells = [c for c in cells if len(c) == len(COLUMNS) and c[2] not in ("target", "---")]
    rows = [Row(c[0], c[1], c[2], *map(int, c[3:])) for c in cells]
    stamp = next(line for line in text.splitlines() if line.startswith("triton "))
    return stamp, rows


def _job(job: tuple[str, int | str]) -> tuple[Row, bounds.Bounds | None, str]:
    name, target = job
    (configuration,) = (c for c in configurations(target) if f"{c.op} {c.name}" == name)
    row, text = compile_one(configuration, target)
    if row.target not in bounds.GPUS:
        return row, None, ""
    try:
        return row, bounds.bounds_of(configuration, row.target, text, row.programs), ""
    except CodeError as error:
        return row, bounds.unknown(configuration, row.target), str(error)


def compile_all(
    targets: tuple[int | str, ...] = TARGETS, only: str = ""
) -> tuple[list[Row], list[bounds.Bounds], list[str]]:
    """Compile every configuration whose "op name" contains `only`, for every target, in two processes.

    Returns the rows of both tables, and why bounds are unknown.
    """
    compiled = {target: [f"{c.op} {c.name}" for c in configurations(target)] for target in targets}
    names = [name for name in max(compiled.values(), key=len) if only in name]
    jobs = [(name, target) for name in names for target in targets if name in compiled[target]]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        done = list(pool.map(_job, jobs))
    limits = [limits for _, limits, _ in done if limits is not None]
    return [row for row, _, _ in done], limits, [problem for _, _, problem in done if problem]


def worse(rows: list[Row], committed: list[Row]) -> list[str]:
    """Return what got worse than the committed rows.

    That is more registers, stack, shared memory or instructions, fewer programs at once or matrix-unit instructions,
    or a row that is missing there.
    """
    known = {(row.op, row.configuration, row.target): row for row in committed}
    reports = []
    for row in rows:
        before = known.get((row.op, row.configuration, row.target))
        if before is None:
            reports.append(f"{row} is not in the table")
            continue
        more = [
            n
            for n in ("registers", "stack", "shared", "instructions")
            if getattr(row, n) > getattr(before, n)
        ]
        fewer = [n for n in ("programs", "mma") if getattr(row, n) < getattr(before, n)]
        if more or fewer:
            reports.append(f"{', '.join([*more, *fewer])}: {row} was {before}")
    return reports


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vglann_kernels.resources", description=__doc__)
    parser.add_argument("--out", type=Path, help="the table to write or compare with; default: see above")
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--only", default="", help="compile only configurations that contain this text")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("resources: unset TRITON_INTERPRET; the interpreter compiles nothing", file=sys.stderr)
        return 2
    path = options.out or table_of(triton_version())
    if options.only and not options.check:
        print("resources: --only leaves rows out; use it with --check", file=sys.stderr)
        return 2
    if options.check and not path.is_file():
        print(f"resources: {path} does not exist; write it first, without --check", file=sys.stderr)
        return 2
    rows, limits, problems = compile_all(targets_of(triton_version()), options.only)
    if not options.check:
        write_table(rows, limits, path)
        print("\n".join([f"{len(rows)} rows written to {path}", *problems]))
        return 1 if problems else 0
    stamp, committed = read_table(path)
    reports = problems + worse(rows, committed) + bounds.worse(limits, bounds.read(path))
    if source_hash() not in stamp:
        reports.append(f"the table is of other sources ({stamp}); write it again without --check")
    print("\n".join(reports) or f"{len(rows)} rows, none worse")
    return 1 if reports else 0


if __name__ == "__main__":
    sys.exit(main())
