"""Compare the ops with float64 as the compiler's IR computes them, without a GPU: `python -m vglann_kernels.proof`.

    python -m vglann_kernels.proof [--share] [--only TEXT] [--check] [--out FILE]

runs `verify` on the device "cuda" with every launch executed by ttsem (see `semantics`), in each dtype, forward and
gradient, and writes one row for each op, dtype, blur and stage of the compiler into `kernels/PROOF.md`. A row is
right when every error is within `verify`'s limit, no access left its tensor, all launches were searched for races,
and the races are those in `HANDED_OVER` and no others. Rows that are not run again stay as they are. `--share` runs
the part that CI repeats, `--only` the rows that contain a text such as "laplacian bfloat16". `--check` writes
nothing: it runs the rows and fails where one is wrong, is not in the table, belongs to other sources or has more than
twice the error.

`make proof` installs ttsem; without it the exit code is 2. Must not run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from . import semantics
from .comparison import Line, Shapes
from .configurations import TARGETS
from .laplacian.op import TRITON_SIZES
from .laplacian.pyramid import BLURS
from .launch import interpreted
from .sources import sources
from .verify import OPS

TABLE = Path(__file__).parents[1] / "PROOF.md"
PLANES = ("laplacian", "composite_laplacian")
DTYPES = ("float32", "bfloat16", "float16")
# They take float32 only, or compare nothing that has a dtype.
ONE_DTYPE = ("nearest", "step_guard")
SHARE_TARGET, SHARE_PLANES = 90, (32, 64)
# The step counter, which all programs read and the last one to arrive writes; and the count of those that arrived,
# which it sets to 0 again. What orders both is pinned in tests/kernels/test_sass.py.
HANDED_OVER = {
    (kernel, buffer)
    for kernel in ("_rows_step_kernel", "_dense_step_kernel")
    for buffer in ("step_ptr", "arrived_ptr")
}
COLUMNS = (
    "op", "dtype", "blur", "stage", "targets", "planes", "launches", "worst quantity", "error", "reference", "limit",
    "verdict", "sources",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The content of one row of the table; `blur` is "" for ops that have none."""

    op: str
    dtype: str
    blur: str
    stage: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.op, self.dtype, self.blur, self.stage)))

    def shapes(self, planes: tuple[int, ...]) -> Iterator[Shapes]:
        """Yield small shapes of several programs, with a last one that has less to do than the others."""
        if self.op in PLANES:
            for size in planes:
                batch, frames = (2, 5) if size == 32 else (1, 2)
                yield Shapes(batch, frames, size, blur=self.blur, dtype=self.dtype)
        elif self.op == "batchnorm_relu":
            yield Shapes(dtype=self.dtype)
        else:
            yield Shapes(batch=5, frames=3, size=32, latent_dim=20, rows=600, dtype=self.dtype)


@dataclass(frozen=True)
class Row:
    """One row of the table, all of it text."""

    op: str
    dtype: str
    blur: str
    stage: str
    targets: str
    planes: str
    launches: str
    quantity: str
    error: str
    reference: str
    limit: str
    verdict: str
    sources: str

    @property
    def case(self) -> Case:
        return Case(self.op, self.dtype, self.blur.strip("-"), self.stage)


def cases() -> list[Case]:
    """Return all rows of the table, the ones of CI first."""
    found = []
    for stage in ("ttir", "ttgir"):
        for blur in BLURS:
            for op in OPS:
                if op in PLANES or blur == BLURS[0]:
                    dtypes = DTYPES[:1] if op in ONE_DTYPE else DTYPES
                    found += [Case(op, dtype, blur if op in PLANES else "", stage) for dtype in dtypes]
    return found


def shared(case: Case) -> bool:
    """Return True if CI repeats this row."""
    return case.stage == "ttir" and case.blur in ("", BLURS[0])


def run(case: Case, targets: tuple[int, ...], planes: tuple[int, ...]) -> Row:
    """Run one row; a fault of a kernel, and an operation that ttsem gives no meaning, is its verdict."""
    compared: list[Line] = []
    wrong, races, launches, several, sizes = [], set(), 0, 0, []
    for target in targets:
        for shapes in case.shapes(planes):
            torch.manual_seed(0)
            try:
                with semantics.executed(case.stage, target) as counted:
                    lines = list(OPS[case.op](shapes))
            # Faults that ttsem finds are exceptions, and so are errors of the compiler.
            except Exception as error:
                wrong.append(f"{target}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            compared += lines
            wrong += [f"{line.case} {line.quantity}: over its limit" for line in lines if not line.ok]
            races |= counted.races
            launches, several = launches + counted.count, several + counted.several
            if counted.unchecked:
                wrong.append(f"{counted.unchecked} launches not searched for races")
            sizes += [shapes.size] if case.op in PLANES else []
    wrong += [f"race on {buffer} of {kernel}" for kernel, buffer in sorted(races - HANDED_OVER)]
    worst = max(compared, key=lambda line: line.error / (line.limit or 1.0), default=None)
    numbers = ("-", "-", "-", "-")
    if worst is not None:
        errors = (worst.error, worst.reference_error, worst.limit)
        numbers = (worst.quantity, *(f"{x:.1e}" for x in errors))  # type: ignore[assignment]
    verdict = "right"
    if ordered := ", ".join(sorted({buffer for _, buffer in races & HANDED_OVER})):
        verdict += f", {ordered} handed over"
    if wrong:
        verdict = "WRONG " + "; ".join(dict.fromkeys(wrong)).replace("|", "/")
    return Row(
        case.op, case.dtype, case.blur or "-", case.stage, " ".join(map(str, targets)),
        " ".join(map(str, dict.fromkeys(sizes))) or "-", f"{launches}, {several} of several programs",
        *numbers, verdict, sources(case.op),
    )  # fmt: skip


def read_table(path: Path = TABLE) -> dict[str, Row]:
    """Return the rows of a table by the name of their case."""
    if not path.is_file():
        return {}
    cells = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in path.read_text().splitlines()
    ]
    rows = [Row(*row) for row in cells if len(row) == len(COLUMNS) and row[0] in OPS and row[4] != "not run"]
    return {str(row.case): row for row in rows}


def write_table(rows: dict[str, Row], path: Path = TABLE) -> None:
    """Write the table as Markdown, with a line for each case that nobody has run."""
    head = (
        "# The kernels as the compiler's IR computes them\n\n"
        "`verify` with every launch executed by ttsem, which gives each operation of Triton's IR its meaning on\n"
        "a CPU: errors against float64 (relative L2; of all quantities the one closest to its limit), the PyTorch\n"
        "reference's own error in the same dtype, and the limit. Accesses outside a tensor, and programs of one\n"
        "launch that touch the same bytes, are errors, too. ttir is the IR above layouts; ttgir comes after all\n"
        "passes of a target. What becomes of it below (LLVM, the assembler, the GPU's memory order) no row shows.\n"
        "Handed over: the buffers that the last program to arrive writes, whose order `tests/kernels/test_sass.py`\n"
        "pins in the machine code. A row that nobody has run says so.\n"
        f"Made by `make proof` with ttsem {semantics.VERSION} and Triton 3.9.\n\n"
    )
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for case in cases():
        row = rows.get(str(case))
        start = [case.op, case.dtype, case.blur or "-", case.stage, "not run"]
        values = list(vars(row).values()) if row else start + [""] * (len(COLUMNS) - len(start))
        lines.append(f"| {' | '.join(values)} |")
    path.write_text(head + "\n".join(lines) + "\n")


def worse(row: Row, before: Row | None) -> list[str]:
    """Return what is wrong with a row that was run, and what got worse than the table."""
    case = str(row.case)
    reports = [f"{case}: {row.verdict}"] if row.verdict.startswith("WRONG") else []
    if before is None:
        return [*reports, f"{case} is not in the table; run without --check"]
    if before.sources != row.sources:
        reports.append(f"{case}: the table is of other sources; run without --check")
    if "-" not in (row.error, before.error) and float(row.error) > 2 * float(before.error) + 1e-6:
        reports.append(f"{case}: {row.quantity} is off by {row.error}, before {before.error}")
    return reports


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vglann_kernels.proof", description=__doc__)
    parser.add_argument("--share", action="store_true", help="run the part that CI repeats")
    parser.add_argument("--only", default="", help="run only rows that contain this text")
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--out", type=Path, default=TABLE, help=f"the table; default {TABLE.name}")
    options = parser.parse_args(arguments)
    if interpreted():
        print("proof: unset TRITON_INTERPRET; the interpreter makes no IR", file=sys.stderr)
        return 2
    if find_spec("ttsem") is None:
        print("proof: skipped, ttsem is not installed; make proof installs it", file=sys.stderr)
        return 2
    if semantics.disagreements():
        print("proof: the fast sum of a product is not ttsem's own; correct semantics.fma", file=sys.stderr)
        return 1
    rows, reports = read_table(options.out), []
    for case in cases():
        if options.only not in str(case) or (options.share and not shared(case)):
            continue
        targets = (SHARE_TARGET,) if case.stage == "ttir" else TARGETS
        row = run(case, targets, SHARE_PLANES if options.share else TRITON_SIZES)
        print(" | ".join(vars(row).values()), flush=True)
        before = rows.get(str(case))
        reports += worse(row, before if options.check else row)
        if not options.check:
            rows[str(case)] = row
            write_table(rows, options.out)
    print("\n".join(reports) or "all right")
    return 1 if reports else 0


if __name__ == "__main__":
    sys.exit(main())
