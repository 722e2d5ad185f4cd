"""Merge clip folders: all parts of one pack (`vglann clips pack --shard I/N`), or packs of different videos.

All parts of a pack, given in any order, become the folder that the pack would have written without --shard, byte for
byte: the sources in their order, the same file under two names once, and no pack if more than 5 % of all sources were
rejected. Other folders become the folder of one pack of their sources, in the order in which the folders are given.
"""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vglann_fast.clips.cut import PackOptions
from vglann_fast.clips.dataset import INDEX_FILE, read_index
from vglann_fast.clips.numbers import switch
from vglann_fast.clips.pack import (
    OTHER_FILES,
    PackReport,
    check_same,
    differing_options,
    existing_index,
    options_of,
    report,
)
from vglann_fast.clips.parts import Part
from vglann_fast.clips.writer import ClipWriter
from vglann_fast.errors import VglannError
from vglann_fast.progress import Progress
from vglann_fast.run.destinations import atomic_dir

Indexes = dict[Path, dict[str, Any]]


def merge(folders: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> PackReport:
    """Write the clips of several clip folders as one clip folder; what that is is said at the top of this file.

    overwrite: replace a clip folder that is there already.

    A clip folder that is there with the same options and sources is left as it is and reported as reused.
    Raises `VglannError` for folders that are damaged, were packed with different options or have a clip in common,
    parts of different packs, a part that is missing, an `out` that is in the way, or a full disk; then nothing is
    left behind.
    """
    began = time.monotonic()
    overwrite = switch("overwrite", overwrite)
    out, paths = Path(out), [Path(folder) for folder in folders]
    if not paths:
        raise VglannError("no clip folders were given; name the folders to merge")
    for number, path in enumerate(paths):
        if os.path.realpath(path) == os.path.realpath(out):
            raise VglannError(f"{out}: is one of the folders to merge; choose another --out")
        if path in paths[:number]:
            raise VglannError(f"{path}: is given twice; leave it out once")
    indexes = {path: read_index(path) for path in paths}
    options = _common_options(indexes)
    if any("part" in index for index in indexes.values()):
        paths = _all_parts(indexes)
    else:
        _check_distinct(indexes)
    existing = existing_index(out, overwrite)
    if existing is not None:
        entries = (source for path in paths for source in indexes[path]["sources"])
        check_same(out, existing, options, entries)
        return report(out, existing, began, reused=True)
    del indexes
    with (
        atomic_dir(out, INDEX_FILE, OTHER_FILES) as folder,
        closing(ClipWriter(folder, options)) as writer,
        Progress("merge", len(paths), "folder") as progress,
    ):
        for path in paths:
            writer.add_folder(path)
            progress.advance()
            progress.show()
        index = writer.finish()
    return report(out, index, began, reused=False)


def _common_options(indexes: Indexes) -> PackOptions:
    """Return the options with which all folders were packed. Raises `VglannError` where they differ."""
    first, *others = indexes
    options = _options(first, indexes[first])
    for path in others:
        if differing := differing_options(indexes[path], options):
            raise VglannError(
                f"{path}: was packed with other options than {first} ({', '.join(differing)}); "
                "pack it again with the same options, or leave it out"
            )
    return options


def _options(path: Path, index: dict[str, Any]) -> PackOptions:
    try:
        return PackOptions(**options_of(index))
    except TypeError as error:
        raise VglannError(f"{path / INDEX_FILE}: has unknown options; pack the videos again") from error


def _all_parts(indexes: Indexes) -> list[Path]:
    """Return the folders in the order of their parts. Raises `VglannError` unless they are all parts of one pack."""
    parts = {path: Part(**index["part"]) for path, index in indexes.items() if "part" in index}
    for path in indexes:
        if path not in parts:
            raise VglannError(
                f"{path}: is not a --shard, {next(iter(parts))} is; merge the shards of a pack on their own first"
            )
    first = next(iter(parts))
    of, places = parts[first].of, dict[int, Path]()
    for path, part in parts.items():
        if (part.of, part.sources) != (of, parts[first].sources):
            raise VglannError(
                f"{path}: is --shard {part.number}/{part.of} of other videos than {first}, --shard "
                f"{parts[first].number}/{of}; merge the shards of one pack"
            )
        if part.number in places:
            raise VglannError(
                f"{path}: is --shard {part.number}/{of}, as {places[part.number]} is; leave one of them out"
            )
        places[part.number] = path
    if len(places) < of:
        missing = next(number for number in range(1, of + 1) if number not in places)
        raise VglannError(
            f"--shard {missing}/{of} is missing, {len(places)} of {of} are given; pack it and give all of them"
        )
    return [places[number] for number in sorted(places)]


def _check_distinct(indexes: Indexes) -> None:
    """Raise `VglannError` if two folders have a clip in common."""
    owners: dict[str, Path] = {}
    for path, index in indexes.items():
        for clip in index["clips"]:
            if clip["id"] in owners:
                name = index["sources"][clip["source"]].get("name")
                raise VglannError(
                    f"{path}: has the clip {clip['id']} of {name!r}, as {owners[clip['id']]} has; "
                    "leave one of the folders out, or pack their videos together"
                )
            owners[clip["id"]] = path
