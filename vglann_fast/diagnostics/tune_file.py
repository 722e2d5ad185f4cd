"""Tables of the measurements of `vglann tune`, and files that take them to other machines."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vglann_fast.errors import VglannError
from vglann_fast.runtime import measurements
from vglann_fast.runtime.measurements import Contest, Entry, machine, only_tune, place

log = logging.getLogger("vglann_fast")


def show() -> str:
    """Return the tables of all measurements in the cache. Raises `VglannError` where there are none."""
    return "\n\n".join(map(table, _some(place())))


def export(file: str | Path) -> str:
    """Copy the measurements in the cache to a file. Raises `VglannError` where there are none, or `file` exists."""
    if Path(file).exists():
        raise VglannError(f"--export {file}: it is there already; remove it, or choose another name")
    entries = _some(place())
    measurements.write(Path(file), entries)
    return f"exported: {file}, measurements: {len(entries)}"


def import_(file: str | Path, device: torch.device) -> str:
    """Add the measurements in a file to the cache. Raises `VglannError` for a file that is not of `tune`.

    What was measured here stays; of two imports for the same machine and training the newer one does. Where there are
    too many, see `_joined`.
    """
    entries = [replace(entry, imported=True) for entry in _some(Path(file))]
    here = [machine(device), machine(torch.device("cpu"))]
    with only_tune():
        before = readable()
        measurements.write(place(), _joined(entries, before, here))
        there = measurements.read(place())
    kept = [entry for entry in entries if entry in there]
    own = sum(entry.machine in here for entry in kept)
    done = f"imported: {file}, measurements: {len(kept)}, {own} of them of this machine and its versions"
    measured_here = [entry for entry in before if not entry.imported]
    if stay := sum(any(map(entry.measures_the_same, measured_here)) for entry in entries):
        done += (
            f"; left out: {stay}, since this machine has measured the same; "
            f"to take the file's, remove {place()}, with all that it holds, and import again"
        )
    return done


def _joined(
    imported: Sequence[Entry], there: Sequence[Entry], here: Sequence[Mapping[str, Any]]
) -> list[Entry]:
    """Return all measurements; `write` leaves out the first ones where there are too many.

    here: this machine. Imports for other machines are left out first, then imports for machines equal to this one,
    the oldest before the others. What was measured here stays.
    """
    own = [entry for entry in there if not entry.imported]
    # Of two for the same, `write` keeps the later one.
    imports = [entry for entry in (*there, *imported) if entry.imported]
    imports = [entry for entry in imports if not any(map(entry.measures_the_same, own))]
    return [*sorted(imports, key=lambda entry: (entry.machine in here, entry.when)), *own]


def table(entry: Entry) -> str:
    """Return a measurement as text: a line for each contender, with its speed in units of the default's.

    What a training takes is marked as chosen.
    """
    facts = ", ".join(f"{name} {value}" for name, value in entry.machine.items() if value is not None)
    shapes = ", ".join(f"{name} {value}" for name, value in entry.shapes.items() if value is not False)
    lines = [facts, shapes, f"measured {entry.when}"]
    for name, found in entry.contests.items():
        taken = entry.choices.get(name, found.choice)
        for contender in dict.fromkeys((*found.seconds, *found.left_out)):
            lines.append(f"{name:25} {contender:15} {_judged(contender, found, taken)}".rstrip())
            name = ""
    return "\n".join(lines)


def _judged(contender: str, found: Contest, taken: str) -> str:
    """Return what a line of the table says of a contender: its time and factor, and what became of it.

    taken: the contender that a training takes. It is not the fastest one where all choices together were not faster.
    """
    words = ["default"] * (contender == found.default) + ["chosen"] * (contender == taken)
    words += ["fastest alone"] * (contender == found.choice != taken)
    words += [found.left_out[contender]] if contender in found.left_out else []
    if contender not in found.seconds:
        return f"{'':20} {', '.join(words)}"
    factor = f"{found.factors[contender]:6.2f}" if contender in found.factors else ""
    return f"{1e3 * found.seconds[contender]:10.3f} ms {factor:6} {', '.join(words)}"


def readable(*, warn: bool = True) -> list[Entry]:
    """Return what the cache holds. A damaged file counts as none, with a warning, and is replaced."""
    try:
        return measurements.read(place())
    except measurements.DamagedError as error:
        if warn:
            log.warning("%s", error)
        return []


def _some(path: Path) -> Sequence[Entry]:
    """Return the entries of a file. Raises `VglannError` where there are none."""
    entries = measurements.read(path)
    if not entries:
        raise VglannError(f"{path}: nothing was measured there; run `vglann tune RUN`, or give another file")
    return entries
