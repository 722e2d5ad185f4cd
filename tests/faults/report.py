"""Fault injection: what is done to the program, and how often it came through: `make faults`.

    PYTHONPATH=tests:tests/fixtures python -m faults.report [--share X] [--json FILE] [--markdown FILE] [PART ...]

A part is a file of this folder with

    def cases(share: float) -> Iterable[Case]

which yields a `Case` (case.py) for each fault or class of inputs as it is done. `share` is how much of the full
count is asked for, 1 for all of it (`part_of` in case.py); with a few hundredths a part is over in seconds. Without
PART all of them run, one after the other. A part that raises counts as lost. Exit code 1 if anything was lost.

The results are kept in docs/faults.json, {"format": "vglann-faults", "version": 1, "machine", "parts": {part:
{"command", "date", "seconds", "cases": [{"name", "tried", "survived", "lost", "note"}]}}}, and shown in
docs/faults.md, which is made from it: running one part replaces what it said before, and the others keep their date.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from faults.case import Case as Case  # the files beside this one may take it from either

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent.parent / "docs"
FORMAT = ("vglann-faults", 1)
HEAD = """# Faults

This page lists what was done to the program on purpose, how often it survived, and how often something was lost.
*Survived* means one of two things. Either the command ended well, and its files equal the files of an undisturbed
run, bit for bit. Or it ended with one line and exit code 2, and nothing half-written was left that could be taken
for whole.

`make faults` makes this page and [faults.json](faults.json) from `tests/faults/`. In full it tries 50 moments of
each command, every operation on files, more than 10,000 broken files and 100,000 steps. If a command at the end of
the page has `--share`, that fraction was tried. [Cases](cases.md) has single situations that users brought, each
with its test.

In the table, "as undisturbed" means that the files equal an undisturbed run's. A *stray* is a temporary file that
was left, and a *guest* is a command that runs inside another Python program.
"""

# What cannot be done on one machine without a GPU, or not at all by a program.
NOT_HERE = {
    "loss of power, a kernel that panics": "needs a machine to break. Files are flushed (fsync) before they "
    "are renamed, and folders afterwards, so that a file with its final name is on the disk",
    "a disk that returns other bytes than it was given": "there was no such disk. Checkpoints and shards "
    "have a sha256, and damaged ones are tried above",
    "NFS, SMB and other network file systems": "none was mounted. `vglann doctor` warns of them, and a file system "
    "without locks is a warning",
    "a GPU that fails or runs out of memory": "there was no GPU. The message for full memory is tested with a raised "
    "torch.OutOfMemoryError",
    "a rank killed under NCCL, or on another host": "there was one machine without a GPU. Two "
    "processes under gloo are tried",
    "Windows and macOS": "only Linux is supported",
}


def parts() -> list[str]:
    """The files of this folder that have cases, by name."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if "\ndef cases(" in file.read_text())


def run_part(part: str, share: float) -> Iterator[Case]:
    """The cases of a part as they come; one more that is lost where it stops with an error."""
    try:
        yield from importlib.import_module(f"faults.{part}").cases(share)
    except Exception as error:
        traceback.print_exc()
        line = " ".join(f"{type(error).__name__}: {error}".split())
        yield Case(f"{part} to its end", 1, 0, 1, line[:200])


def machine() -> str:
    """Describe this machine in words."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    system = f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    return f"{cores} cores at a load of {load:.0f}, {system}"


def as_markdown(record: dict[str, Any]) -> str:
    """The page of a record."""
    lines = [HEAD, "| fault or class of inputs | tried | survived | lost | how |", "|---|---|---|---|---|"]
    absent = dict(NOT_HERE)
    totals = [0, 0, 0]
    for part in record["parts"].values():
        for row in part["cases"]:
            if row["tried"] == 0:
                absent[row["name"]] = row["note"]
                continue
            counts = [row["tried"], row["survived"], row["lost"]]
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            cells = [row["name"], *map(str, counts), row["note"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines.append("| **all** | " + " | ".join(f"**{total}**" for total in totals) + " | |")
    lines += ["", "Not tried here, and why:", ""]
    lines += [f"- {name}: {reason}." for name, reason in absent.items()]
    lines += ["", "| part | command | date | seconds | machine |", "|---|---|---|---|---|"]
    for name, part in record["parts"].items():
        cells = [name, f"`{part['command']}`", part["date"], str(part["seconds"]), part["machine"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read_record(file: Path) -> dict[str, Any]:
    """The record in a file, or an empty one where there is none."""
    if file.is_file():
        return dict(json.loads(file.read_text()))
    return {"format": FORMAT[0], "version": FORMAT[1], "parts": {}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts and write what came of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m faults.report", description="Break the program on purpose."
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="how much of the full count, above 0 and up to 1"
    )
    parser.add_argument("--json", type=Path, default=DOCS / "faults.json")
    parser.add_argument("--markdown", type=Path, default=DOCS / "faults.md")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts()))
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.parts) - set(parts())
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts())}")
    if not 0 < chosen.share <= 1:
        parser.error("--share: expected above 0 and up to 1")
    lost = 0
    for part in chosen.parts or parts():
        began, found = time.monotonic(), []
        for case in run_part(part, chosen.share):
            found.append(asdict(case))
            lost += case.lost
            print(f"{part}: {case.name}: {case.survived} of {case.tried}; {case.note}", flush=True)
            record = read_record(chosen.json)  # only now: parts may run at the same time
            record["parts"][part] = {
                "command": f"python -m faults.report --share {chosen.share:g} {part}",
                "date": datetime.now(UTC).date().isoformat(),
                "seconds": round(time.monotonic() - began),
                "machine": machine(),
                "cases": found,
            }
            chosen.json.write_text(json.dumps(record, indent=1) + "\n")
            chosen.markdown.write_text(as_markdown(record))
    print(f"{lost} lost; {chosen.markdown}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
