"""Tables of the measurements of `vglann tune`, and files that take them to other machines."""

import logging
from collections.abc import Mapping, Sequence
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

    Of two for the same machine and training the newer one stays. Where there are too many, see `_joined`.
    """
    entries, here = _some(Path(file)), [machine(device), machine(torch.device("cpu"))]
    with only_tune():
        measurements.write(place(), _joined(entries, readable(), here))
        there = measurements.read(place())
    kept = [entry for entry in entries if entry in there]
    own = sum(entry.machine in here for entry in kept)
    return f"imported: {file}, measurements: {len(kept)}, {own} of them of this machine and its versions"


def _joined(
    imported: Sequence[Entry], there: Sequence[Entry], here: Sequence[Mapping[str, Any]]
) -> list[Entry]:
    """Return all measurements; `write` leaves out the first ones where there are too many.

    here: this machine. Measurements of other machines are left out first, the oldest before the others, then imported
    ones of machines equal to this one. What is there stays: it may have been measured here.
    """
    stay, new = list(there), []
    for entry in sorted(imported, key=_when):
        same = [i for i, other in enumerate(stay) if other.measures_the_same(entry)]
        if not same:
            new.append(entry)
        elif stay[same[0]].when < entry.when:
            stay[same[0]] = entry
    together = [*new, *stay]
    others = sorted((entry for entry in together if entry.machine not in here), key=_when)
    return [*others, *(entry for entry in together if entry.machine in here)]


def _when(entry: Entry) -> str:
    return entry.when


def table(entry: Entry) -> str:
    """Return a measurement as text: a line for each contender, with its speed in units of the default's.

    What a training takes is marked as chosen.
    """
    facts = ", ".join(f"{name} {value}" for name, value in entry.machine.items() if value is not None)
    shapes = ", ".join(f"{name} {value}" for name, value in entry.shapes.items() if value is not False)
    lines = [facts, shapes, f"measured {entry.when}"]
    for name, found in entry.contests.items():
        taken = entry.choices.get(name, found.choice)
        for contender in (*found.seconds, *found.left_out):
            lines.append(f"{name:25} {contender:15} {_judged(contender, found, taken)}".rstrip())
            name = ""
    return "\n".join(lines)


def _judged(contender: str, found: Contest, taken: str) -> str:
    """Return what a line of the table says of a contender: its time and factor, and what became of it.

    taken: the contender that a training takes. It is not the fastest one where all choices together were not faster.
    """
    words = ["default"] * (contender == found.default) + ["chosen"] * (contender == taken)
    words += ["fastest alone"] * (contender == found.choice != taken)
    if contender in found.left_out:
        return f"{'':20} {', '.join([*words, found.left_out[contender]])}"
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
        raise VglannError(f"{path}: nothing was measured there; run `vglann tune`, or give another file")
    return entries
