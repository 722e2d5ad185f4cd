"""One study in one SQLite file: the videos, the key that says where each comes from, and the answers.

    study.sqlite         application_id 0x76676C53 ("vglS"), user_version 1, journal in WAL mode
      facts (name, value)            value is JSON: "id" (16 hex digits, random), "seed", "pairs", "made"
      sources (number, label, kind)  kind: real | run | spoiled (noised copies of real clips)
      videos (id, source, clip, mp4) one showing of a video; clip is its row in the source's array
      trials (id, left, right)       two videos; as drawn, each source of a comparison is as often left as right
      answers (rater, trial, chosen, side)
                                     chosen: the video; side: left | right, where it stood on the rater's screen;
                                     one answer per rater and trial

Ids of videos, trials and raters are 16 random hexadecimal digits. A video shown in two trials has two ids, so
neither an id nor how often it comes says anything about its source. Only this file holds the key.
"""

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from vglann_fast.errors import VglannError

FILE, APPLICATION_ID, VERSION = "study.sqlite", 0x76676C53, 1
_ID = re.compile(r"[0-9a-f]{16}")
_TABLES = """
create table facts (name text primary key, value text not null);
create table sources (number integer primary key, label text not null unique,
                      kind text not null check (kind in ('real', 'run', 'spoiled')));
create table videos (id text primary key, source integer not null references sources,
                     clip integer not null, mp4 blob not null);
create table trials (id text primary key, left text not null references videos,
                     right text not null references videos);
create table answers (rater text not null, trial text not null references trials,
                      chosen text not null references videos,
                      side text not null check (side in ('left', 'right')),
                      primary key (rater, trial)) without rowid;
"""
_ACTIONABLE = {
    "SQLITE_FULL": "the disk is full; free some space and try again",
    "SQLITE_BUSY": "another program is writing to it; try again",
    "SQLITE_IOERR": "the disk reports an error, or cannot lock files; put the study on a local disk",
    "SQLITE_PROTOCOL": "it cannot be locked here; put the study on a local disk",
    "SQLITE_READONLY": "it cannot be written; check the permissions of the file and its folder",
    "SQLITE_CANTOPEN": "it cannot be opened; check the permissions of the file and its folder",
}


@dataclass(frozen=True)
class Source:
    """The origin of videos: the real clips, a run, or spoiled copies of real clips."""

    number: int
    label: str
    kind: Literal["real", "run", "spoiled"]


@dataclass(frozen=True)
class Video:
    """One showing of clip number `clip` of a source, as an MP4 file."""

    id: str
    source: int
    clip: int
    mp4: bytes


@dataclass(frozen=True)
class Trial:
    """Two videos to compare, by id."""

    id: str
    left: str
    right: str


@dataclass(frozen=True)
class Answer:
    """In `trial` the video `chosen` was taken for the more realistic; it stood on that side of the screen."""

    trial: str
    chosen: str
    side: str  # "left" or "right"


@dataclass(frozen=True)
class Rating:
    """An answer with its key: source numbers of the two videos as drawn, and whether the left one was chosen."""

    rater: str
    trial: str
    left: int
    right: int
    chose_left: bool
    side: str


def create(
    path: Path,
    facts: Mapping[str, Any],
    sources: Sequence[Source],
    videos: Sequence[Video],
    trials: Sequence[Trial],
) -> None:
    """Write a study without answers to a new file. Raises `VglannError` when the disk is full."""
    with _named_errors(path):
        connection = sqlite3.connect(path)
        try:
            connection.execute("pragma journal_mode = wal")
            connection.executescript(_TABLES)
            connection.executemany(
                "insert into facts values (?, ?)",
                [(name, json.dumps(value)) for name, value in facts.items()],
            )
            connection.executemany("insert into sources values (?, ?, ?)", map(astuple, sources))
            connection.executemany("insert into videos values (?, ?, ?, ?)", map(astuple, videos))
            connection.executemany("insert into trials values (?, ?, ?)", map(astuple, trials))
            connection.execute(f"pragma application_id = {APPLICATION_ID}")
            connection.execute(f"pragma user_version = {VERSION}")
            connection.commit()
        finally:
            connection.close()


class Study:
    """A study that is there: `Study.open(folder)`. facts, sources (by number) and trials are read once."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self.facts = {name: json.loads(value) for name, value in connection.execute("select * from facts")}
        rows = connection.execute("select number, label, kind from sources order by number")
        self.sources = {number: Source(number, label, kind) for number, label, kind in rows}
        # In the order of their random ids, which tells nothing about what is in them.
        self.trials = [Trial(*row) for row in connection.execute("select * from trials order by id")]
        if not isinstance(self.facts.get("id"), str):
            raise ValueError("it has no id")
        self._videos_of = {trial.id: (trial.left, trial.right) for trial in self.trials}

    @classmethod
    def open(cls, folder: str | Path) -> "Study":
        """Open `folder`/study.sqlite and check it.

        Raises `VglannError` when it is missing, damaged, no study, of another version or cannot be written.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise VglannError(f"{folder}: no study in it (no {FILE}); make one with `vglann study`")
        with _named_errors(path):
            connection = sqlite3.connect(
                path.resolve().as_uri() + "?mode=rw", uri=True, isolation_level=None, check_same_thread=False
            )
            try:
                _check(connection)
                return cls(path, connection)
            except BaseException:
                connection.close()
                raise

    def close(self) -> None:
        """Close the file; its journal is folded into it."""
        self._connection.close()

    def video(self, id: str) -> bytes | None:
        """The MP4 of a video; None if there is none of this id."""
        with _named_errors(self.path):
            row = self._connection.execute("select mp4 from videos where id = ?", (id,)).fetchone()
        return row[0] if row else None

    def answers_of(self, rater: str) -> dict[str, str]:
        """Trial -> chosen video of one rater; empty for one who has not answered yet."""
        with _named_errors(self.path):
            rows = self._connection.execute("select trial, chosen from answers where rater = ?", (rater,))
            return dict(rows.fetchall())

    def add(self, rater: str, answers: Sequence[Answer]) -> int:
        """Store answers, all or none, and return how many are new: the first answer to a trial stays.

        Raises ValueError for a malformed rater, an unknown trial, or a choice that is not of the trial;
        `VglannError` when the file cannot be written.
        """
        if not _ID.fullmatch(rater):
            raise ValueError(f"rater {rater[:40]!r} is not 16 hexadecimal digits")
        for answer in answers:
            if answer.trial not in self._videos_of:
                raise ValueError(f"trial {answer.trial[:40]!r} is not one of this study")
            if answer.chosen not in self._videos_of[answer.trial]:
                raise ValueError(f"{answer.chosen[:40]!r} is not one of the videos of trial {answer.trial}")
            if answer.side not in ("left", "right"):
                raise ValueError(f"side must be left or right, not {answer.side[:40]!r}")
        rows = [(rater, *astuple(answer)) for answer in answers]
        with _named_errors(self.path):
            before = self._connection.total_changes
            self._connection.execute("begin immediate")
            with self._connection:
                self._connection.executemany("insert or ignore into answers values (?, ?, ?, ?)", rows)
            return self._connection.total_changes - before

    def rated(self) -> list[Rating]:
        """All answers with their keys, by rater and trial."""
        query = """
            select a.rater, a.trial, l.source, r.source, a.chosen = t.left, a.side
            from answers a join trials t on t.id = a.trial
            join videos l on l.id = t.left join videos r on r.id = t.right order by a.rater, a.trial
        """
        with _named_errors(self.path):
            rows = self._connection.execute(query).fetchall()
        return [
            Rating(rater, trial, left, right, bool(c), side) for rater, trial, left, right, c, side in rows
        ]


def _schema(connection: sqlite3.Connection) -> set[tuple[Any, ...]]:
    return set(connection.execute("select type, name, tbl_name, sql from sqlite_master").fetchmany(100))


def _own_schema() -> set[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_TABLES)
        return _schema(connection)


def _check(connection: sqlite3.Connection) -> None:
    """Raise ValueError or sqlite3.Error unless this is a whole study of this version that can be written."""
    ((application,),) = connection.execute("pragma application_id").fetchall()
    ((version,),) = connection.execute("pragma user_version").fetchall()
    if application != APPLICATION_ID:
        raise ValueError("not a file of vglann-fast")
    if version != VERSION:
        raise ValueError(f"version {version}, this program reads {VERSION}")
    # Exactly our tables: a view in place of one may never end, a trigger does what its author wants.
    if _schema(connection) != _own_schema():
        raise ValueError("its tables are not the tables of a study")
    if connection.execute("pragma quick_check(1)").fetchall() != [("ok",)]:
        raise ValueError("its pages are inconsistent")
    if connection.execute("pragma foreign_key_check").fetchone():
        raise ValueError("rows refer to others that are gone")
    if not connection.execute("select 1 from trials").fetchone():
        raise ValueError("it has no trials")
    connection.execute("begin immediate")
    connection.execute("rollback")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and a damaged file raise into `VglannError`."""
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        code = getattr(error, "sqlite_errorname", "")
        known = (hint for name, hint in _ACTIONABLE.items() if code.startswith(name))
        damaged = f"damaged, or not a study of this version ({error}); restore a copy of it or make a new one"
        hint = next(known, damaged)
        raise VglannError(f"{path}: {hint}") from error
