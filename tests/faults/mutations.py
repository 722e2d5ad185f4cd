"""Files broken by chance, readers that are given them, and what became of it.

A case is drawn from `random.Random(f"{reader}-{number}")`, so a line of fuzz_json or fuzz_binary that names both can
be done again:

    cd tests && python -m faults.mutations PART READER NUMBER

The readers run in a forked process with little more address space than it has already and a clock, so that a
reader that eats memory, hangs or takes the process with it loses one case, and the next continues after it.
"""

import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.case import Case, case, part_of

from vglann_fast.errors import VglannError

SECONDS = 30  # for one case, all of it; on a loaded machine most of this is waiting
MEMORY = 2**30  # bytes of address space that a reader may take beside what the process has

# What a JSON value may be replaced by.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30, -(10**400),
    "", "x", "0", "\0", "\ud800", "a\nb", "x" * 5000, "../../x", "/etc/passwd", "..", "NaN", "<script>", "%s{0}",
    [], {}, [[]], [None], {"": None}, [0] * 1000, {"step": {}}, ["\ud800"],
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Something that reads files others made.

    name: as in the table. good: a folder it reads without complaint. files: those in it that are broken, by name.
    read: folder -> anything; it may raise `VglannError`. seal: called before it with the folder, to write the
    checksums that whoever broke the files would have written too. share: of the cases, less for a slow reader.
    """

    name: str
    good: Path
    files: tuple[str, ...]
    read: Callable[[Path], object]
    seal: Callable[[Path], None] = lambda folder: None
    share: float = 1.0


def fuzz(readers: Iterable[Reader], count: int) -> Iterable[Case]:
    """`count` cases for each reader."""
    for reader in readers:
        found = enumerate(tried(reader, part_of(count, reader.share)))
        problems = [problem and f"case {number}: {problem}" for number, problem in found]
        note = (
            f"read, or refused with the documented error, within {SECONDS} s and {MEMORY >> 20} MiB; nothing written "
            "beside its folder"
        )
        yield case(f"broken {reader.name}", problems, note)


def tried(reader: Reader, count: int) -> list[str | None]:
    """Return what went wrong in each case of a reader, None where nothing did."""
    with tempfile.TemporaryDirectory() as root:
        intact = in_child(lambda: once(reader, Path(root), None))
        if intact is not None:
            raise AssertionError(f"{reader.name}: the good files are refused: {intact}")
        problems: list[str | None] = []
        while len(problems) < count:
            problems += _in_one_child(reader, Path(root), range(len(problems), count))
        return problems


def once(reader: Reader, root: Path, number: int | None) -> str | None:
    """Break the files as in case `number`, read them; what went wrong, or None. Without a number: unbroken."""
    folder = root / "case" / "inside"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(reader.good, folder)
    if number is not None:
        drawn = random.Random(f"{reader.name}-{number}")
        file = folder / drawn.choice(reader.files)
        file.write_bytes(broken(file.read_bytes(), drawn))
        reader.seal(folder)
    try:
        reader.read(folder)
    except VglannError as error:
        if number is None:
            return str(error)
        return None if str(error).strip() else "an error without words"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:150]!r} in {Path(where.filename).name}:{where.lineno}"
    beside = sorted(path.name for path in folder.parent.iterdir())
    return None if beside == ["inside"] else f"wrote beside its folder: {beside}"


def _in_one_child(reader: Reader, root: Path, numbers: range) -> list[str | None]:
    """As many of the cases as one child gets through; the last is that which ended it, if one did."""
    done: list[str | None] = []
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            with os.fdopen(sink, "w") as lines:
                _confine()
                for number in numbers:
                    signal.alarm(SECONDS)
                    lines.write(json.dumps(once(reader, root, number)) + "\n")
                    lines.flush()
            os._exit(0)
        finally:  # no error of the harness itself may reach its caller
            os._exit(1)
    os.close(sink)
    with os.fdopen(source) as lines:
        for line in lines:
            done.append(json.loads(line))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if len(done) < len(numbers):
        hangs = code == -signal.SIGALRM
        done.append(f"took more than {SECONDS} s" if hangs else f"ended the process with {code}")
    return done


def in_child(work: Callable[[], str | None]) -> str | None:
    """Return what `work` returns in a process with little memory and time, or how it ended that process."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        _confine()
        signal.alarm(SECONDS)
        with os.fdopen(sink, "w") as lines:
            try:
                said = work()
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            lines.write(json.dumps(said))
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as lines:
        said = lines.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(said) if said else f"ended the process with {code}"


def _confine() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of readers


# ---- how files are broken


def broken(content: bytes, drawn: random.Random) -> bytes:
    """A content with one to four faults in it: in its values if it is JSON or lines of it, or else in its bytes."""
    lines = _json_lines(content)
    if lines is None or drawn.random() < 0.25:
        for _ in range(drawn.randint(1, 4)):
            content = drawn.choice(BYTES)(content, drawn)
        return content
    for _ in range(drawn.randint(1, 3)):
        at = drawn.randrange(len(lines))
        lines[at] = _changed(lines[at], drawn)
    text = "\n".join(map(json.dumps, lines))
    if drawn.random() < 0.1:  # what json.dumps does not write
        text = text.replace(drawn.choice(["0", '""', "null", "1"]), drawn.choice(_TEXTS), 1)
    return text.encode()


def _json_lines(content: bytes) -> list[Any] | None:
    """The values of a file that is JSON, or has JSON in each of its lines; None for another."""
    for parts in ([content], content.splitlines()):
        try:
            return [json.loads(part) for part in parts] or None
        except ValueError:
            continue
    return None


_TEXTS = ("9" * 5000, "[" * 100_000, '{"a":' * 100_000, "-", "1e999", "\ufeff", '"\\u0000"', "Infinity")


def _changed(value: Any, drawn: random.Random) -> Any:
    """A JSON value in which one value, anywhere, is replaced, removed, repeated or swapped for another of it."""
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        keys = (
            list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        )
        for key in keys:
            places.append((inner, key))
            walk(inner[key])

    walk(value)
    if not places or drawn.random() < 0.02:
        return _copy(drawn.choice(VALUES))
    holder, key = drawn.choice(places)
    how = drawn.random()
    if how < 0.15:
        del holder[key]
    elif how < 0.25:
        other, its = drawn.choice(places)
        holder[key] = _copy(other[its]) if _has(other, its) else None
    elif how < 0.3 and isinstance(holder, dict):
        holder[drawn.choice(["", "x", "\ud800", "__class__", *holder])] = holder.pop(key)
    elif how < 0.35 and isinstance(holder, list):
        holder.append(_copy(holder[key]))
    elif how < 0.5 and type(holder[key]) is int:  # a lie that may pass
        holder[key] = drawn.choice([holder[key] - 1, holder[key] + 1, 2 * holder[key], 16 * holder[key]])
    else:
        holder[key] = _copy(drawn.choice(VALUES))
    return value


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _at(content: bytes, drawn: random.Random) -> int:
    """A place in the bytes; half of them near the beginning, where headers are."""
    return (
        drawn.randrange(min(len(content), 1024) if drawn.random() < 0.5 else len(content)) if content else 0
    )


def _flip(content: bytes, drawn: random.Random) -> bytes:
    at = _at(content, drawn)
    return (
        content[:at] + bytes([content[at] ^ 1 << drawn.randrange(8)]) + content[at + 1 :] if content else b""
    )


def _number(content: bytes, drawn: random.Random) -> bytes:
    """Four or eight bytes become a number that a length or count would not be."""
    at, size = _at(content, drawn), drawn.choice([1, 2, 4, 8])
    value = drawn.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]) % 256**size
    return content[:at] + value.to_bytes(size, drawn.choice(["little", "big"])) + content[at + size :]


def _noise(content: bytes, drawn: random.Random) -> bytes:
    at, size = _at(content, drawn), drawn.randint(1, 40)
    return content[:at] + drawn.randbytes(size) + content[at + size :]


def _move(content: bytes, drawn: random.Random) -> bytes:
    at, to, size = _at(content, drawn), _at(content, drawn), drawn.randint(1, 200)
    return content[:to] + content[at : at + size] + content[to:]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _number,
    _number,
    _noise,
    _move,
    lambda content, drawn: content[: _at(content, drawn)],
    lambda content, drawn: content[_at(content, drawn) :],
    lambda content, drawn: content + drawn.randbytes(drawn.randint(1, 2000)),
    lambda content, drawn: content[: _at(content, drawn)] + content[_at(content, drawn) :],
    lambda content, drawn: b"" if drawn.random() < 0.1 else content.replace(b"1", b"7", 1),
)


def again(part: str, name: str, number: int) -> str:
    """Repeat a case of the table in this process and return its outcome."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        readers = importlib.import_module(f"faults.{part}").readers(folder / "good")
        (reader,) = (reader for reader in readers if reader.name == name)
        return once(reader, folder, number) or "nothing wrong"


if __name__ == "__main__":
    print(again(sys.argv[1], sys.argv[2], int(sys.argv[3])))
