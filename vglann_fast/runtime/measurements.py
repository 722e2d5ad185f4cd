"""Measurements that `vglann tune` made on a machine: the file tune.json in the user's cache.

    {"format": "vglann-tune", "version": 2, "entries": [{
        "machine": {"device": model of the GPU or CPU, "driver", "processors": of a CPU, "torch", "triton", "faiss",
                    "vglann-fast"}: text, number or null,
        "shapes": {name: text, number or true/false}: of a training, or of a mapping,
        "when": date and time, "imported": true if the entry came from a file, false if it was measured here,
        "contests": {name: {"default": what the rules of the program take, "choice": the fastest that computes right,
                            or a default that is wrong, where nothing that is right is faster,
                            "seconds": {contender: of a step}, "factors": {contender: its speed over the default's},
                            "left_out": {contender: reason}}}}]}

Version 1 had no "imported"; its entries count as measured here.

The names of contests are the names of `options/choices.py`, and `TOGETHER`: all choices against all defaults. An
entry counts on an equal machine and for equal shapes.

Every new training reads the file, so a bad one must never stop a training: see `lookup`. With VGLANN_TUNE=off nothing
is read.
"""

import json
import os
import platform
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vglann_fast import __version__
from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.options.choices import is_text, read_choices
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.environment import default_cache
from vglann_fast.run.files import open_regular
from vglann_fast.run.temporary import make_folder
from vglann_fast.runtime.processors import available

FORMAT, VERSION, OLDER = "vglann-tune", 2, 1
VARIABLE = "VGLANN_TUNE"
MAX_BYTES, MAX_ENTRIES, MAX_NAMES = 4 << 20, 1000, 50
MAX_SECONDS = 1e6
# A line for each entry, so that the size of a file is the sum of its lines; the rest is shorter than the margin.
_BETWEEN, _MARGIN = ",\n", 1000
TOGETHER = "together"
PROCESSORS, DRIVER = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/version")

Facts = Mapping[str, Any]


class DamagedError(VglannError):
    """A file that `write` did not write, or that was changed since."""


@dataclass(frozen=True)
class Contest:
    """Contenders for one choice. `left_out` has those that were wrong, failed or were too slow to be timed.

    A default that is wrong is timed anyway. If the default failed, `factors` is empty.
    """

    default: str
    choice: str
    seconds: Mapping[str, float]
    factors: Mapping[str, float]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        factor = self.factors.get(self.choice)
        return self.choice if factor is None else f"{self.choice} ({factor:.2f} times as fast)"


@dataclass(frozen=True)
class Entry:
    """All contests of one training or mapping on one machine."""

    machine: Facts
    shapes: Facts
    when: str
    contests: Mapping[str, Contest]
    imported: bool = False

    @property
    def choices(self) -> dict[str, str]:
        """The choices by name; the defaults, where the choices together were not faster, or were not measured."""
        contests = {name: contest for name, contest in self.contests.items() if name != TOGETHER}
        changes = sum(contest.choice != contest.default for contest in contests.values())
        together = self.contests.get(TOGETHER)
        chosen = changes <= 1 if together is None else together.choice != together.default
        return {name: contest.choice if chosen else contest.default for name, contest in contests.items()}

    def measures_the_same(self, other: "Entry") -> bool:
        """Return True if both are of one machine and one training or mapping."""
        return (self.machine, self.shapes) == (other.machine, other.shapes)

    def changes(self, names: Collection[str]) -> str:
        """Say in one line which choices, of these names, differ from the rules of the program, and their factors."""
        chosen = {name: choice for name, choice in self.choices.items() if name in names}
        changes = [
            f"{name} {self.contests[name]}"
            for name, choice in chosen.items()
            if choice != self.contests[name].default
        ]
        return ", ".join(changes) or "nothing is faster than the defaults"


def place() -> Path:
    """Return the path of the file. Raises `VglannError` for a user without a home."""
    return default_cache() / "tune.json"


def machine(device: Any) -> dict[str, Any]:
    """Return what a measurement on this torch device depends on, beside the shapes."""
    import torch

    versions: dict[str, str | None] = {"torch": str(torch.__version__), "vglann-fast": __version__}
    for name, distributions in {
        "triton": ("triton",),
        "faiss": ("faiss-cpu", "faiss-gpu-cu13-cuvs", "faiss-gpu-cuvs", "faiss-gpu"),
    }.items():
        versions[name] = next(filter(None, map(_installed, distributions)), None)
    if device.type == "cuda":
        found = re.search(r"\d+\.\d+(\.\d+)?", _text_of(DRIVER))
        driver = found[0] if found else None
        name = torch.cuda.get_device_name(device)
        return {"device": name, "driver": driver, "processors": None, **versions}
    model = re.search(r"^model name\s*:\s*(.+)$", _text_of(PROCESSORS), flags=re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return {"device": name, "driver": None, "processors": available(), **versions}


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # another operating system
        return ""


def lookup(device: Any, shapes: Facts) -> tuple[Entry | None, str]:
    """Return (the newest measurement of these shapes on this machine, "") or (None, why there is none).

    The reason is empty where nothing was ever measured. Never raises: a training then runs by the rules of the
    program.
    """
    try:
        entries, here = own_entries(), machine(device)
    except VglannError as error:
        return None, str(error)
    if not entries:
        return None, ""
    of_machine = [entry for entry in entries if entry.machine == here]
    for entry in reversed(of_machine):
        if entry.shapes == shapes:
            return entry, ""
    if of_machine:
        alike = max(of_machine, key=lambda entry: sum(shapes.get(n) == v for n, v in entry.shapes.items()))
        other = ", ".join(
            f"{name} {value}" for name, value in alike.shapes.items() if shapes.get(name) != value
        )
        return None, f"{place()} has other shapes only ({other})"
    same_device = [entry for entry in entries if entry.machine["device"] == here["device"]]
    if not same_device:
        return None, f"{place()} is of another machine ({entries[-1].machine['device']})"
    then = same_device[-1].machine
    changed = ", ".join(f"{name} {then[name]}" for name in here if then[name] != here[name])
    return None, f"{place()} was measured with {changed}"


def own_entries() -> list[Entry]:
    """Return what was measured on this machine or imported, none with VGLANN_TUNE=off. Raises as `read`."""
    return [] if switched_off() else read(place())


def switched_off() -> bool:
    """Return True if the user wants no measurements to be read."""
    return os.environ.get(VARIABLE) == "off"


def read(path: Path) -> list[Entry]:
    """Return the entries of a file, none where the file does not exist.

    Raises `DamagedError` that names the file when it is not what `write` writes, `VglannError` for one of a newer
    version, and `UnreadableError` as `open_regular`.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        value = json.loads(content)
        _expect(isinstance(value, dict) and value.get("format") == FORMAT, "not a file of `vglann tune`")
        if value.get("version") not in (OLDER, VERSION):
            raise VglannError(
                f"{path}: of version {str(value.get('version'))[:20]!r}, this program reads versions {OLDER} and "
                f"{VERSION}; update it with `pip install -U vglann-fast`, or remove the file"
            )
        entries = value.get("entries")
        _expect(isinstance(entries, list) and len(entries) <= MAX_ENTRIES, "not a list of entries")
        return [_entry(entry) for entry in entries]
    except FileNotFoundError:
        return []
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(f"{path} is damaged ({reason}); `vglann tune` writes a new one") from error


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write the entries, whole or not at all; of two with equal machine and shapes the later one stays.

    The first ones are left out where the file would be larger than `read` allows. Raises `VglannError` for an entry
    that `read` would refuse: it would cost all others.
    """
    newest: list[Entry] = []
    for entry in entries:
        newest = [e for e in newest if not e.measures_the_same(entry)] + [entry]
    lines: list[str] = []
    room = MAX_BYTES - _MARGIN
    for entry in reversed(newest[-MAX_ENTRIES:]):
        line = json.dumps(asdict(entry))
        try:
            _entry(json.loads(line))
        except ValueError as error:
            raise VglannError(
                f"{path} stays as it was: a measurement could not be read again ({error}); please report this"
            ) from error
        room -= len(line) + len(_BETWEEN)
        if room < 0:
            break
        lines.insert(0, line)
    head = json.dumps({"format": FORMAT, "version": VERSION, "entries": []}).removesuffix("]}")
    with atomic_file(path) as temporary:
        temporary.write_text(f"{head}{_BETWEEN.join(lines)}]}}")


@contextmanager
def only_tune() -> Iterator[None]:
    """Keep other processes from tuning: they would disturb the clock, and one of them would lose its result.

    Raises `VglannError` where another one does, and where the cache cannot be written. A file system without locks
    has none.
    """
    import fcntl

    path = place().with_suffix(".lock")
    try:
        make_folder(path.parent)
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+", 0)
    except OSError as error:
        raise VglannError(
            f"{path.parent}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder of your own"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VglannError("another `vglann tune` is running; wait for its end or stop it") from error
        except OSError:
            pass
        yield


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _entry(value: Any) -> Entry:
    _expect(isinstance(value, dict), "an entry")
    imported = value.get("imported", False)
    _expect(value.keys() - {"imported"} == {"machine", "shapes", "when", "contests"}, "an entry")
    _expect(isinstance(imported, bool), "the origin of an entry")
    here, shapes, contests = value["machine"], value["shapes"], value["contests"]
    _expect(is_text(value["when"]), "when an entry was measured")
    for facts in (here, shapes):
        _expect(isinstance(facts, dict) and len(facts) <= MAX_NAMES, "machine or shapes of an entry")
        _expect(all(map(is_text, facts)) and all(map(_is_fact, facts.values())), "machine or shapes")
    names = {"device", "driver", "processors", "torch", "triton", "faiss", "vglann-fast"}
    _expect(here.keys() == names and is_text(here["device"]), "the machine of an entry")
    _expect(isinstance(contests, dict) and len(contests) <= MAX_NAMES, "the contests of an entry")
    entry = Entry(here, shapes, value["when"], {name: _contest(c) for name, c in contests.items()}, imported)
    read_choices(entry.choices)
    return entry


def _is_fact(value: Any) -> bool:
    """Return True if this is a short text, a small whole number, true, false or null."""
    return value is None or is_text(value) or (isinstance(value, int) and 0 <= value < 2**53)


def _contest(value: Any) -> Contest:
    names = ("default", "choice", "seconds", "factors", "left_out")
    _expect(isinstance(value, dict) and value.keys() == set(names), "a contest")
    default, choice, seconds, factors, left_out = (value[name] for name in names)
    for contenders in (seconds, factors, left_out):
        _expect(isinstance(contenders, dict) and len(contenders) <= MAX_NAMES, "the contenders")
        _expect(all(map(is_text, contenders)), "the name of a contender")
    _expect(all(map(_is_time, (*seconds.values(), *factors.values()))), "the seconds of a contender")
    _expect(all(map(is_text, left_out.values())), "the reason of a contender that was left out")
    _expect(is_text(default) and is_text(choice) and choice in seconds, "a choice that was not timed")
    return Contest(default, choice, seconds, factors, left_out)


def _is_time(value: Any) -> bool:
    """Return True if this is a positive number of a size that was measured; NaN and infinity are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_SECONDS
