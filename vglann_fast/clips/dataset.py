"""Reads a clip folder (format in `pack.py`): checks everything, then maps the shards. NumPy only."""

import ast
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vglann_fast.clips.parts import Part
from vglann_fast.errors import VglannError
from vglann_fast.run.files import open_regular

FORMAT, VERSION = "vglann-clips", 1
INDEX_FILE, REJECTED_FILE = "index.json", "rejected.jsonl"
COUNTS = ("rejected", "shots", "static", "repeated", "unstable")
_SHARD_NAME = re.compile(r"clips-\d{5,}\.npy")
_CLIP_ID = re.compile(r"[0-9a-f]{16}")


class ClipSet:
    """The clips of a folder, or of one split of it.

    ids: clip ids, row by row. clips: their index entries (dict, see `pack.py`). sources: the index's sources,
    which `clips[i]["source"]` counts. frames, size: T and the side in pixels. folder: where they lie.

    A pickle holds the folder and the rows, not the clips: another process maps the shards again, and gets
    `VglannError` if the folder was packed again meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        index: dict[str, Any],
        shards: list[np.ndarray],
        rows: np.ndarray,
        index_sha256: str,
    ) -> None:
        self.folder = folder
        self._place = os.path.abspath(folder)  # as seen from here, should the current folder change
        self.frames: int = index["frames"]
        self.size: int = index["size"]
        self.sources: list[dict[str, Any]] = index["sources"]
        self.clips: list[dict[str, Any]] = [index["clips"][row] for row in rows]
        self.ids: list[str] = [clip["id"] for clip in self.clips]
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])
        self._rows = rows  # of the whole folder
        self._index_sha256 = index_sha256

    @classmethod
    def open(
        cls,
        folder: str | Path,
        split: Literal["train", "test"] | None = None,
        verify: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> "ClipSet":
        """Open a clip folder; split=None takes all clips. verify=False skips the sha256 of the shards.

        share: (rank, size) of this process among the processes that verify the folder together. It compares the
            sha256 of shards rank, rank + size, ...

        Names, headers and sizes of shards are checked before they are mapped. Raises `VglannError` naming the
        file that is missing, damaged or not of this format, and if the split has no clips.
        """
        if split not in (None, "train", "test"):
            raise VglannError(f"split must be train, test or None, not {split!r}")
        folder = Path(folder)
        index = read_index(folder)
        rank, size = share
        shards = [
            map_shard(folder, shard, index, verify and number % size == rank)
            for number, shard in enumerate(index["shards"])
        ]
        wanted = [split is None or clip["split"] == split for clip in index["clips"]]
        rows = np.flatnonzero(wanted)
        # A part of a pack may be empty.
        if not rows.size and (split or "part" not in index):
            raise VglannError(f"{folder}: has no {split} clips; pack more videos or with another test share")
        return cls(folder, index, shards, rows, _index_sha256(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where the clips are."""
        return _opened_again, (self._place, self._rows, self._index_sha256)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Sequence[int] | np.ndarray | slice | None = None) -> np.ndarray:
        """Copy clips out: uint8 (n, 3, T, H, W) RGB, in the order of `rows` (None: all of this set).

        Negative rows count from the end. Raises IndexError for a row outside the set, and for rows that are not
        whole numbers: a mask of booleans would otherwise be read as the rows 0 and 1.
        """
        if rows is None or isinstance(rows, slice):
            chosen = self._rows[rows or slice(None)]
        else:
            numbers = np.asarray(rows)
            if numbers.size and numbers.dtype.kind not in "iu":
                raise IndexError(
                    f"rows are whole numbers or a slice, not {numbers.dtype}; for a mask, np.flatnonzero(mask)"
                )
            chosen = self._rows[numbers.astype(np.int64)]
        out = np.empty((len(chosen), 3, self.frames, self.size, self.size), np.uint8)
        shard_of = np.searchsorted(self._starts, chosen, side="right") - 1
        for shard in np.unique(shard_of):
            at = np.flatnonzero(shard_of == shard)
            out[at] = self._shards[shard][chosen[at] - self._starts[shard]]
        return out


def _index_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()


def _opened_again(folder: str, rows: np.ndarray, index_sha256: str) -> ClipSet:
    """Return the ClipSet of a pickle. The shards' sha256 were checked where it was opened first."""
    path = Path(folder)
    index = read_index(path)
    if _index_sha256(path) != index_sha256:
        raise VglannError(f"{folder}: was packed again since it was opened; open it again")
    shards = [map_shard(path, shard, index, verify=False) for shard in index["shards"]]
    return ClipSet(path, index, shards, rows, index_sha256)


def read_index(folder: Path) -> dict[str, Any]:
    """The checked content of index.json. Raises `VglannError` naming the file and what is wrong."""
    file = folder / INDEX_FILE
    try:
        with open_regular(file) as stream:
            index = json.load(stream)
    except FileNotFoundError:
        advice = f"make one with `vglann clips pack VIDEOS --out {folder}`"
        raise VglannError(f"{folder}: no clip folder (no {INDEX_FILE} in it); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise VglannError(f"{file}: cannot be read as JSON ({error}); pack the videos again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise VglannError(f"{file}: not an index of {FORMAT}")
    if index.get("version") != VERSION:
        found = index.get("version")
        raise VglannError(f"{file}: version {found!r}, this program reads {VERSION}; pack the videos again")
    try:
        _check_index(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise VglannError(f"{file}: damaged ({what}); pack the videos again") from error
    return index


def _check_index(index: dict[str, Any]) -> None:
    for name in ("frames", "size", "stride"):
        if type(index[name]) is not int or not 0 < index[name] <= 2**16:
            raise ValueError(f"{name} is {index[name]!r}")
    kinds = {"sources": list, "shards": list, "clips": list, "options": dict, "counts": dict}
    for name, kind in kinds.items():
        if not isinstance(index[name], kind):
            raise ValueError(f"{name} is not a {kind.__name__}")
    if not all(isinstance(source, dict) for source in index["sources"]):
        raise ValueError("sources")
    # Folders made before there was --stabilize lack "unstable".
    if set(index["counts"]) | {"unstable"} != set(COUNTS):
        raise ValueError("counts")
    if not all(type(count) is int and count >= 0 for count in index["counts"].values()):
        raise ValueError("counts")
    if "part" in index:
        Part(**index["part"])
    for shard in index["shards"]:
        if not _SHARD_NAME.fullmatch(shard["file"]):  # also keeps a path from leading out of the folder
            raise ValueError(f"shard name {shard['file']!r}")
        if type(shard["clips"]) is not int or shard["clips"] < 1 or not isinstance(shard["sha256"], str):
            raise ValueError(f"shard {shard['file']!r}")
    clips, sources = index["clips"], range(len(index["sources"]))
    if sum(shard["clips"] for shard in index["shards"]) != len(clips):
        raise ValueError("shards and clips differ in number")
    for row, clip in enumerate(clips):
        if clip["split"] not in ("train", "test") or not _CLIP_ID.fullmatch(clip["id"]):
            raise ValueError(f"clip {row}")
        if type(clip["source"]) is not int or clip["source"] not in sources:
            raise ValueError(f"source of clip {row}")
    # Of the parts of a pack some may have none.
    if not (clips or "part" in index) or len({clip["id"] for clip in clips}) != len(clips):
        raise ValueError("no clips, or two of one id")


def read_rejected(folder: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of rejected.jsonl. Raises `VglannError` if they are not as many as the index says."""
    file, lines = folder / REJECTED_FILE, []
    try:
        with suppress(FileNotFoundError), open_regular(file) as stream:
            lines = [json.loads(line) for line in stream]
        if not all(isinstance(line[name], str) for line in lines for name in ("source", "reason")):
            raise ValueError("not a source and a reason on each line")
        expected = index["counts"]["rejected"] + index["counts"].get("unstable", 0)
        if len(lines) != expected:
            raise ValueError(f"{len(lines)} lines, not {expected}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise VglannError(f"{file}: damaged ({error}); pack the videos again") from error
    return lines


def map_shard(folder: Path, shard: dict[str, Any], index: dict[str, Any], verify: bool = True) -> np.ndarray:
    """Return the clips of a shard, mapped. Raises `VglannError` if the file is not what the index says.

    verify: compare its sha256.
    """
    file = folder / shard["file"]
    shape = (shard["clips"], 3, index["frames"], index["size"], index["size"])
    try:
        if Path(os.path.realpath(file)).parent != folder.resolve():
            raise VglannError(f"{file}: leads out of the clip folder; pack the videos again")
        with open_regular(file) as stream:
            offset = _check_header(stream.read(10 + 2**16), shape)
            expected = offset + int(np.prod(shape, dtype=object))
            if file.stat().st_size != expected:
                raise ValueError(f"{file.stat().st_size} bytes, not {expected}")
            stream.seek(0)
            if verify and hashlib.file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
                raise ValueError("its sha256 does not match the index")
            return np.memmap(file, np.uint8, "r", offset=offset, shape=shape)
    except FileNotFoundError:
        raise VglannError(f"{file}: missing; pack the videos again") from None
    except ValueError as error:
        raise VglannError(f"{file}: damaged ({error}); pack the videos again") from error


def _check_header(head: bytes, shape: tuple[int, ...]) -> int:
    """Check a NumPy 1.0 header; return where the data begins. Raises ValueError."""
    length = int.from_bytes(head[8:10], "little")
    if head[:8] != b"\x93NUMPY\x01\x00" or len(head) < 10 + length or length > 1024:
        raise ValueError("not a .npy file of format 1.0")
    try:
        header = ast.literal_eval(head[10 : 10 + length].decode("latin1").strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("its header cannot be read") from error
    if header != {"descr": "|u1", "fortran_order": False, "shape": shape}:
        raise ValueError(f"its header is {header}, not uint8 of {shape}")
    return 10 + length
