"""Lower bounds of a launch, from its machine code and from how often the code runs.

`work` of a configuration says how often each loop runs at B = 256. With it and `sass` this counts what a program
executes, and the cycles in which one of its warps issues or stalls. From these follow four bounds of the launch:

- issue: instructions of all warps, one a scheduler and cycle;
- latency: issue, or the cycles of one warp over the warps that a scheduler holds, whichever is more;
- matrix: operations of the matrix units at their documented rate;
- bytes: what the launch reads and writes, each tensor once, at the memory's full speed.

Code that a forward branch may skip counts as run. Loops that wait for other threads count once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from textwrap import fill
from typing import Any

from .configurations import PROCESSORS, Configuration
from .sass import Code, Loop, code_of


@dataclass(frozen=True)
class GPU:
    """Multiprocessors, clock in Hz, bytes of memory a second, and operations of the matrix units a second."""

    name: str
    multiprocessors: int
    clock: float
    memory: float
    matrix: float


# RATES tells where the rates of the matrix units come from.
GPUS = {
    "89": GPU("RTX 4090", PROCESSORS[89], 2.52e9, 0.92e12, 165e12),
    "90": GPU("H200", PROCESSORS[90], 1.98e9, 4.3e12, 990e12),
}
SCHEDULERS = 4
COLUMNS = (
    "op", "configuration", "target", "unit", "programs", "instructions", "a unit",
    "hottest loop", "its cycles", "cycles", "issue", "latency", "matrix", "bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """One line of the table; the last four fields are in µs.

    `instructions` are what all warps of a program execute, `cycles` those in which one warp issues or stalls. The
    hottest loop takes most of these; its own are for one pass, 0 where the code has no loop.
    """

    op: str
    configuration: str
    target: str
    unit: str
    programs: int
    instructions: int
    per_unit: str
    loop_instructions: int
    loop_cycles: int
    cycles: int
    issue: str
    latency: str
    matrix: str
    bytes: str


SECTION = """\
Lower bounds of each launch at B = 256, made by `vglann_kernels.bounds` from the machine code and from how often its
loops run (`work` in `configurations.py`). `programs` are of the launch. `instructions` are of all warps of a
program, loops as often as they run; `a unit` has them for each unit of work. The hottest loop has its instructions
and cycles for one pass of its code, without inner loops; it is 0 where the code has no loop. `cycles` are those in
which one warp of a program issues or stalls, by the control words of the code.

The last four columns are µs. `issue`: one instruction each cycle and scheduler. `latency`: the same, or `cycles`
over the warps that a scheduler holds, if that is more. `matrix`: the products at the documented rate of the matrix
units. `bytes`: each tensor of the launch read or written once, at the memory's full speed. What the launches of an
op leave for each other counts here, and not in the floors of README.md.

A launch takes at least the largest of the four, with one exception: code that a forward branch may skip counts as
run. That is much of latent_adam, most of its dense step, and in composite_laplacian's sum what one program alone
adds. The slow paths of roots and quotients do not count, and loops that wait for other threads count once. The time
that memory takes to answer is in none of the bounds. latent_adam has a batch without duplicates, of rows that were
not used for as many steps as matter. nearest has 1,000,000 rows and the queries of one portion. Sectors of a load
or store: `python -m vglann_kernels.sectors`, tabled in README.md."""

RATES = (
    "The last is the documented rate of the matrix units for dense 16-bit products with float32 sums: half of the "
    "rate with sparsity in NVIDIA's H200 data sheet, and the rate in the white paper of the Ada architecture."
)


def bounds_of(configuration: Configuration, target: str, text: str, at_once: int) -> Bounds:
    """Return the bounds from a disassembly; `at_once` programs fit on a multiprocessor."""
    code, work = code_of(text), configuration.work
    times = passes(configuration, target, code)
    runs = {
        address: prod(times[loop.address] for loop in code.around(address)) for address in code.instructions
    }
    executed = round(configuration.warps * sum(runs.values()))
    cycles = round(sum(code.instructions[a].stall * count for a, count in runs.items()))
    operations = configuration.warps * sum(code.instructions[a].products * count for a, count in runs.items())
    own = [[code.instructions[a] for a in _own(code, loop)] for loop in code.loops]
    hottest = max(own, key=lambda body: sum(i.stall * runs[i.address] for i in body), default=[])
    return Bounds(
        configuration.op, configuration.name, target, work.unit, work.programs, executed,
        figure(executed * work.programs / work.units),
        len(hottest), sum(i.stall for i in hottest), cycles,
        *map(figure, times_of(configuration, target, executed, cycles, operations, at_once)),
    )  # fmt: skip


def times_of(
    configuration: Configuration, target: str, executed: int, cycles: int, operations: float, at_once: int
) -> tuple[float, float, float, float]:
    """Return the bounds by issue, latency, matrix units and bytes, in µs."""
    gpu, work = GPUS[target], configuration.work
    issue = executed * work.programs / (SCHEDULERS * gpu.multiprocessors * gpu.clock)
    # A launch that does not fill the GPU still takes as long as one program.
    latency = cycles * max(1.0, work.programs / (gpu.multiprocessors * at_once)) / gpu.clock
    matrix = operations * work.programs / gpu.matrix
    return issue * 1e6, max(issue, latency) * 1e6, matrix * 1e6, work.bytes / gpu.memory * 1e6


def passes(configuration: Configuration, target: str, code: Code) -> dict[int, float]:
    """Return how often each loop runs every time it is entered, by its address.

    Raises ValueError where the loops of the code are not the loops that the configuration tells about. Code without
    any loop is right, too, if it moves as much as all trips do: they are written out.
    """
    counted, told = [loop for loop in code.loops if not loop.waits], configuration.work.loops
    everything = sum(instruction.access for instruction in code.instructions.values())
    written_out = not counted and all(trips * moved <= everything for trips, moved in told)
    if len(counted) != len(told) and not written_out:
        problem = (
            f"the code has {len(counted)} loops and moves {everything} bytes, work.loops has {len(told)}"
        )
        raise _unlike(configuration, target, code, problem)
    times = {loop.address: 1.0 for loop in code.loops}
    for loop, (trips, moved) in zip(counted, told):
        found = _moved(code, loop)
        # The compiler may do several trips in one pass of the code. Some threads load a vector that others share.
        unrolled = round(found / moved) if moved else 1
        if unrolled < 1 or abs(found - moved * unrolled) > moved / 3:
            problem = (
                f"the loop at {loop.address:#x} moves {found} bytes a thread, work.loops says {moved} a trip"
            )
            raise _unlike(configuration, target, code, problem)
        times[loop.address] = trips / unrolled
    return times


def _unlike(configuration: Configuration, target: str, code: Code, problem: str) -> ValueError:
    loops = ", ".join(f"{loop.address:#x} moves {_moved(code, loop)}" for loop in code.loops)
    return ValueError(
        f"{configuration.op} {configuration.name}, target {target}: {problem}. This compiler unrolls other loops; "
        f"change `work` of this configuration. Loops of the code: {loops}"
    )


def _own(code: Code, loop: Loop) -> list[int]:
    """Return the addresses in a loop that are in none of its inner loops."""
    return sorted(a for a in loop.body if code.around(a)[-1] is loop)


def _moved(code: Code, loop: Loop) -> int:
    return sum(code.instructions[a].access for a in _own(code, loop))


def figure(value: float) -> str:
    """Return a number with three digits or, from 100 on, without a fraction."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def section(rows: list[Bounds]) -> str:
    """Return the bounds as Markdown; `read` reads the table back."""
    gpus = "".join(
        f"Target {target} is the {gpu.name}: {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9} GHz, "
        f"{gpu.memory / 1e12} TB/s, {gpu.matrix / 1e12:.0f} TFLOP/s. "
        for target, gpu in GPUS.items()
    )
    text = f"## Bounds\n\n{SECTION}\n\n{fill(gpus + RATES, 116)}\n\n"
    names = tuple(Bounds.__dataclass_fields__)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(str(getattr(row, name)) for name in names)} |" for row in rows]
    return text + "\n".join(lines) + "\n"


def read(path: Path) -> list[Bounds]:
    """Return the bounds in a file of tables."""
    cells = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in path.read_text().splitlines()
    ]
    cells = [c for c in cells if len(c) == len(COLUMNS) and c[2] in GPUS]
    rows: list[list[Any]] = [[*c[:4], int(c[4]), int(c[5]), c[6], *map(int, c[7:10]), *c[10:]] for c in cells]
    return [Bounds(*row) for row in rows]


def worse(rows: list[Bounds], committed: list[Bounds]) -> list[str]:
    """Return which bounds are missing in the committed ones, or have more instructions or cycles now."""
    known = {(row.op, row.configuration, row.target): row for row in committed}
    reports = []
    for row in rows:
        before = known.get((row.op, row.configuration, row.target))
        if before is None:
            reports.append(f"{row} is not in the table of bounds")
            continue
        more = [n for n in ("instructions", "loop_cycles", "cycles") if getattr(row, n) > getattr(before, n)]
        if more:
            reports.append(f"bounds, {', '.join(more)}: {row} was {before}")
    return reports
