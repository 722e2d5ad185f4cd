"""Lower bounds of a launch, from its machine code and from how often the code runs.

`work` of a configuration says how often each loop runs at B = 256. With it and `sass` this counts what a program
executes at least, and the cycles in which one of its warps issues or stalls. From these follow four bounds:

- issue: instructions of all warps, one a scheduler and cycle;
- latency: issue, or the cycles of one warp over the warps that a scheduler holds, whichever is more;
- matrix: operations of the matrix units at their peak;
- fp64: float64 arithmetic, or conversions to and from float64, whichever takes longer.

`bytes` is the time of what the launch reads and writes, each tensor once, at the rate that copies reach.

Code that a forward branch may skip counts as not run. Loops that wait for other threads count once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from textwrap import fill
from typing import Any

from .configurations import PROCESSORS, Configuration
from .sass import Code, CodeError, Loop, code_of


@dataclass(frozen=True)
class GPU:
    """Rates of a GPU: clock in Hz, bytes of memory a second as copies reach them.

    Each cycle a multiprocessor does `products` operations of the matrix units (dense, 16 bits, float32 sums), and
    float64 arithmetic or conversions of as many lanes (CUDA Programming Guide, throughput of native instructions).
    """

    name: str
    multiprocessors: int
    clock: float
    memory: float
    products: int
    arithmetic: int
    conversions: int

    @property
    def matrix(self) -> float:
        """Operations of the matrix units a second."""
        return self.products * self.multiprocessors * self.clock


GPUS = {
    "89": GPU("RTX 4090", PROCESSORS[89], 2.52e9, 0.92e12, 512, 2, 2),
    "90": GPU("H200", PROCESSORS[90], 1.98e9, 4.3e12, 4096, 64, 16),
}
SCHEDULERS = 4
COLUMNS = (
    "op", "configuration", "target", "unit", "programs", "instructions", "a unit",
    "hottest loop", "its cycles", "cycles", "issue", "latency", "matrix", "fp64", "bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """One line of the table; the last five fields are in µs.

    `instructions` are what all warps of a program execute, `cycles` those in which one warp issues or stalls. The
    hottest loop takes most of these; its own are for one pass, 0 where the code has no loop. What is unknown, since
    `work` does not describe the code, is None or "-".
    """

    op: str
    configuration: str
    target: str
    unit: str
    programs: int
    instructions: int | None
    per_unit: str
    loop_instructions: int | None
    loop_cycles: int | None
    cycles: int | None
    issue: str
    latency: str
    matrix: str
    double: str
    bytes: str


SECTION = """\
Lower bounds of each launch at B = 256, made by `vglann_kernels.bounds` from the machine code and from the trips of
its loops (`work` in `configurations.py`). `programs` are of the launch. `instructions` are what all warps of a
program execute, each loop as often as it runs; `a unit` has the instructions of the launch for each unit of work.
The hottest loop has its instructions and cycles for one pass of its code, without inner loops; both are 0 where the
code has no loop. `cycles` are those in which one warp of a program issues or stalls, by the control words of the
code. A row with "-" has code whose loops `work` does not describe.

The last five columns are µs. `issue`: one instruction each cycle and scheduler. `latency`: the same, or `cycles`
over the warps that a scheduler holds, if that is more. `matrix`: the products at the peak of the matrix units.
`fp64`: float64 arithmetic, or the conversions to and from float64 if they take longer. `bytes`: each tensor of the
launch read or written once, at the rate that copies reach. A tensor that one launch of an op writes and the next one
reads counts in both; the floors of README.md leave it out.

A launch takes at least the largest of `issue`, `latency`, `matrix` and `fp64` at these clocks. Code that a forward
branch may skip counts as not run, and loops that wait for other threads count once.

`bytes` is less strict, for two reasons. The data sheets say 4.8 TB/s for the H200 and 1.008 TB/s for the RTX 4090,
which copies do not reach. And what the launch before has just written need not come from memory while L2 holds it
(50 MB, 72 MB). At B = 256 that can be so for upsample_conv's sum of parts and joined statistics, and for the
small launches of latent_adam. The input of composite_laplacian's sum, 101 MB, is larger than L2.

The time that memory takes to answer is in none of the columns. Neither is the time that L2 takes, which limits
upsample_conv. README.md has a table of the sectors that warps ask for, by `python -m vglann_kernels.sectors`.

latent_adam has a batch without duplicates. Its rows were last used so many steps ago that the lazy mode adds all
terms of its series. nearest has 1,000,000 rows and the queries of one portion."""


PEAKS = (
    "The PFLOP/s are the peak for dense 16-bit products with float32 sums at this clock. NVIDIA's H200 data sheet "
    "has 0.99, at a lower clock, and the white paper of the Ada architecture 0.165."
)
NO_LANES = {"arithmetic": 0.0, "conversion": 0.0}


def bounds_of(configuration: Configuration, target: str, text: str, at_once: int) -> Bounds:
    """Return the bounds from a disassembly; `at_once` programs fit on a multiprocessor."""
    code, work = code_of(text), configuration.work
    times = passes(configuration, target, code)
    skipped = code.skippable(
        {loop.address for loop in code.loops if not loop.waits and times[loop.address] >= 1}
    )
    runs = {
        address: prod(times[loop.address] for loop in code.around(address)) if address not in skipped else 0.0
        for address in code.instructions
    }
    executed = round(configuration.warps * sum(runs.values()))
    cycles = round(sum(code.instructions[a].stall * count for a, count in runs.items()))
    operations = configuration.warps * sum(code.instructions[a].products * count for a, count in runs.items())
    lanes = dict.fromkeys(("", "arithmetic", "conversion"), 0.0)
    for address, count in runs.items():
        lanes[code.instructions[address].double] += 32 * configuration.warps * count
    own = [[code.instructions[a] for a in _own(code, loop)] for loop in code.loops]
    hottest = max(own, key=lambda body: sum(i.stall * runs[i.address] for i in body), default=[])
    return Bounds(
        configuration.op, configuration.name, target, work.unit, work.programs, executed,
        figure(executed * work.programs / work.units),
        len(hottest), sum(i.stall for i in hottest), cycles,
        *map(figure, times_of(configuration, target, executed, cycles, at_once, operations, lanes)),
    )  # fmt: skip


def unknown(configuration: Configuration, target: str) -> Bounds:
    """Return a row without the figures that come from the code."""
    work = configuration.work
    moved = figure(work.bytes / GPUS[target].memory * 1e6)
    return Bounds(
        configuration.op, configuration.name, target, work.unit, work.programs, None, "-", None, None, None,
        "-", "-", "-", "-", moved,
    )  # fmt: skip


def times_of(
    configuration: Configuration, target: str, executed: int, cycles: int, at_once: int,
    operations: float = 0.0, lanes: Mapping[str, float] = NO_LANES,
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """Return the bounds by issue, latency, matrix units and float64, and the time of the bytes, in µs.

    operations, lanes: of a program, on the matrix units and, by kind, in float64.
    """
    gpu, work = GPUS[target], configuration.work
    issue = executed * work.programs / (SCHEDULERS * gpu.multiprocessors * gpu.clock)
    # A launch that does not fill the GPU still takes as long as one program.
    latency = cycles * max(1.0, work.programs / (gpu.multiprocessors * at_once)) / gpu.clock
    matrix = operations * work.programs / gpu.matrix
    longest = max(lanes["arithmetic"] / gpu.arithmetic, lanes["conversion"] / gpu.conversions)
    double = longest * work.programs / (gpu.multiprocessors * gpu.clock)
    times = issue, max(issue, latency), matrix, double, work.bytes / gpu.memory
    return times[0] * 1e6, times[1] * 1e6, times[2] * 1e6, times[3] * 1e6, times[4] * 1e6


def passes(configuration: Configuration, target: str, code: Code) -> dict[int, float]:
    """Return how often each loop runs every time it is entered, by its address.

    Raises CodeError where the loops of the code are not the loops in `work`. Code without any loop is right, too, if
    it moves as many bytes as all trips do: then the compiler has written them out.
    """
    counted, expected = [loop for loop in code.loops if not loop.waits], configuration.work.loops
    everything = sum(instruction.access for instruction in code.instructions.values())
    written_out = not counted and all(trips * moved <= everything for trips, moved in expected)
    if len(counted) != len(expected) and not written_out:
        problem = (
            f"the code has {len(counted)} loops and moves {everything} bytes, work.loops has {len(expected)}"
        )
        raise _unlike(configuration, target, code, problem)
    times = {loop.address: 1.0 for loop in code.loops}
    for loop, (trips, moved) in zip(counted, expected):
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


def _unlike(configuration: Configuration, target: str, code: Code, problem: str) -> CodeError:
    loops = ", ".join(f"{loop.address:#x} moves {_moved(code, loop)}" for loop in code.loops)
    return CodeError(
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
    gpus = " ".join(
        f"Target {target} is the {gpu.name}: {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9} GHz, "
        f"{gpu.memory / 1e12} TB/s, {gpu.matrix / 1e15:.3g} PFLOP/s, and each cycle and multiprocessor float64 "
        f"arithmetic of {gpu.arithmetic} lanes and conversions of {gpu.conversions}."
        for target, gpu in GPUS.items()
    )
    rates = fill(gpus + " " + PEAKS, 116)
    text = f"## Bounds\n\n{SECTION}\n\n{rates}\n\n"
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        values = ["-" if value is None else str(value) for value in vars(row).values()]
        lines.append(f"| {' | '.join(values)} |")
    return text + "\n".join(lines) + "\n"


def read(path: Path) -> list[Bounds]:
    """Return the bounds in a file of tables."""
    cells = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in path.read_text().splitlines()
    ]
    cells = [c for c in cells if len(c) == len(COLUMNS) and c[2] in GPUS]
    numbers = [
        i for i, field in enumerate(Bounds.__dataclass_fields__.values()) if str(field.type).startswith("int")
    ]
    rows: list[list[Any]] = [list(row) for row in cells]
    for row in rows:
        for i in numbers:
            row[i] = None if row[i] == "-" else int(row[i])
    return [Bounds(*row) for row in rows]


def worse(rows: list[Bounds], committed: list[Bounds]) -> list[str]:
    """Return which rows are missing in the committed ones, or unknown now, or have more to do."""
    known = {(row.op, row.configuration, row.target): row for row in committed}
    reports = []
    for row in rows:
        before = known.get((row.op, row.configuration, row.target))
        if before is None:
            reports.append(f"{row} is not in the table of bounds")
            continue
        compared = ("instructions", "loop_cycles", "cycles", "matrix", "double")
        more = [n for n in compared if _amount(getattr(row, n)) > _amount(getattr(before, n))]
        if more:
            reports.append(f"bounds, {', '.join(more)}: {row} was {before}")
    return reports


def _amount(value: int | str | None) -> float:
    return inf if value in (None, "-") else float(value)
