"""Write a clip folder (format in `pack.py`) from videos and from other clip folders, in the order they are added."""

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np

from vglann_fast.clips.cut import PackOptions, cut
from vglann_fast.clips.dataset import (
    COUNTS,
    FORMAT,
    INDEX_FILE,
    REJECTED_FILE,
    VERSION,
    map_shard,
    read_index,
    read_rejected,
)
from vglann_fast.clips.decode import DecodedVideo, DecodeJob, DecodeLimits, Rejected, decode_all
from vglann_fast.clips.parts import Part
from vglann_fast.clips.shots import find_shots
from vglann_fast.clips.sources import Source
from vglann_fast.errors import VglannError
from vglann_fast.nets.weights import load_weights

ShotFinder = Callable[[np.ndarray], list[tuple[int, int]]]

MAX_REJECTED_SHARE = 0.05
_SHARD_CLIPS, _SHARD_BYTES = 1024, 2**29


class ClipWriter:
    """Fills the folder of a pack; `finish` writes the index, without which it is not a clip folder."""

    def __init__(self, folder: Path, options: PackOptions) -> None:
        self.options = options
        self._folder = folder
        self._shards = _Shards(folder, options)
        self._sources: list[dict[str, Any]] = []
        self._clips: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._rejected: list[dict[str, Any]] = []
        self._unstable: list[dict[str, Any]] = []
        self._counts = dict.fromkeys(COUNTS, 0)

    def add_video(self, source: Source, video: DecodedVideo | Rejected, find: ShotFinder) -> None:
        """Add the clips of a video, and discard its temporary files."""
        entry = source_entry(source, video.sha256)
        self._sources.append(entry)
        if isinstance(video, Rejected):
            self._rejected.append({"source": source.name, "reason": video.reason})
            return
        try:
            # A strip is one shot, and repeats its last frame where a clip runs past it.
            shots = [(0, len(video.tiles))] if source.strip else find(video.thumbnails)
            video.release()
            self._counts["shots"] += len(shots)
            entry.update(frames=len(video.tiles), truncated=video.truncated, shots=len(shots))
            for clip, pixels in cut(video, shots, source.first_frame, self.options, repeat_last=source.strip):
                if pixels is None:
                    reason = "a clip could not be stabilized"
                    self._unstable.append({"source": source.name, "reason": reason, "clip": clip})
                elif _motion(pixels) < self.options.min_motion:
                    self._counts["static"] += 1
                else:
                    self._add_clip({**clip, "source": len(self._sources) - 1}, pixels)
        finally:
            video.discard()

    def add_folder(self, folder: Path) -> None:
        """Add what is in another clip folder. Raises `VglannError` if it is damaged."""
        index, before = read_index(folder), len(self._sources)
        self._sources += [source | {"clips": 0} for source in index["sources"]]
        for line in read_rejected(folder, index):
            (self._unstable if "clip" in line else self._rejected).append(line)
        for name in ("shots", "static", "repeated"):
            self._counts[name] += index["counts"][name]
        clips = iter(index["clips"])
        for shard in index["shards"]:
            for pixels, clip in zip(map_shard(folder, shard, index), clips, strict=False):
                self._add_clip(clip | {"source": before + clip["source"]}, pixels)

    def finish(self, part: Part | None = None) -> dict[str, Any]:
        """Write the index and the list of rejected files; return the index.

        part: what the folder is a part of. The folder need not have clips then, nor few rejected files: that is
        judged when all parts are merged.
        Raises `VglannError` for a whole pack without clips, or with more than 5 % of its sources rejected.
        """
        self.close()
        self._counts.update(rejected=len(self._rejected), unstable=len(self._unstable))
        if part is None:
            _check_enough(len(self._clips), self._rejected, self._counts, len(self._sources), self.options)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "frames": self.options.frames,
            "size": self.options.size,
            "stride": self.options.stride,
            "options": asdict(self.options),
            **({"part": asdict(part)} if part else {}),
            "sources": self._sources,
            "shards": self._shards.entries,
            "counts": self._counts,
            "clips": self._clips,
        }
        # One clip a line: readable, and quick to search in.
        text = json.dumps(index, separators=(",", ":")).replace('{"id"', '\n{"id"')
        (self._folder / INDEX_FILE).write_text(text)
        lines = "".join(json.dumps(line) + "\n" for line in self._rejected + self._unstable)
        (self._folder / REJECTED_FILE).write_text(lines)
        return index

    def close(self) -> None:
        """Close the shard being written."""
        self._shards.close()

    def _add_clip(self, clip: dict[str, Any], pixels: np.ndarray) -> None:
        if clip["id"] in self._ids:
            self._counts["repeated"] += 1  # the same file twice, under two names
            return
        self._ids.add(clip["id"])
        self._clips.append(clip)
        self._shards.write(pixels)
        self._sources[clip["source"]]["clips"] += 1


def add_videos(
    writer: ClipWriter, sources: Sequence[Source], scratch: Path, limits: DecodeLimits, workers: int
) -> Generator[None, None, None]:
    """Decode videos in `workers` processes of this machine and add them; yield after each.

    scratch: folder for temporary files.
    """
    find = finder_of(writer.options)
    jobs = [decode_job(source, writer.options) for source in sources]
    with closing(decode_all(jobs, scratch, limits, workers)) as decoded:
        for source, video in zip(sources, decoded, strict=True):
            writer.add_video(source, video, find)
            yield


def decode_job(source: Source, options: PackOptions) -> DecodeJob:
    """Return what is to be decoded of a source."""
    return DecodeJob(
        source.path,
        source.frame_files,
        source.first_frame,
        source.last_frame,
        options.tiles,
        options.size,
        strip=source.strip,
        stabilize=options.stabilize,
    )


def finder_of(options: PackOptions) -> ShotFinder:
    """Return the function that finds shots. Raises `VglannError` if it needs weights that are not here."""
    find, named = shot_finder(options.shots.split()[0])
    if named != options.shots:
        raise VglannError(f"{named} is imported here, not {options.shots}; import the same weight file")
    return find


def shot_finder(method: str) -> tuple[ShotFinder, str]:
    """Return the function that finds shots, and what the index says about it."""
    if method == "histogram":
        return find_shots, method
    if method != "transnetv2":
        raise VglannError(f"shots must be histogram or transnetv2, not {method!r}")
    from vglann_fast.clips import shots_transnetv2

    weights = load_weights(method)
    return shots_transnetv2.shot_finder(weights), f"{method} {weights.sha256}"


def source_entry(source: Source, sha256: str) -> dict[str, Any]:
    """Return a source's entry in the index, before anything was found in it."""
    entry = {"name": source.name, "sha256": sha256, "first_frame": source.first_frame}
    entry |= {"last_frame": source.last_frame, "frames": 0, "truncated": False, "shots": 0, "clips": 0}
    return entry | ({"credit": source.credit} if source.credit else {})


class _Shards:
    """Writes clips one after the other into shards of at most 1024 clips and half a GiB."""

    def __init__(self, folder: Path, options: PackOptions) -> None:
        self.entries: list[dict[str, Any]] = []
        self._folder = folder
        self._shape = (3, options.frames, options.size, options.size)
        self._most = max(1, min(_SHARD_CLIPS, _SHARD_BYTES // int(np.prod(self._shape))))
        self._file: BufferedRandom | None = None
        self._clips = 0

    def write(self, pixels: np.ndarray) -> None:
        if self._file is None:
            self._name = f"clips-{len(self.entries):05d}.npy"
            self._file = (self._folder / self._name).open("w+b")
            self._file.write(_npy_header(0, self._shape))
        self._file.write(np.ascontiguousarray(pixels).data)
        self._clips += 1
        if self._clips == self._most:
            self.close()

    def close(self) -> None:
        """Finish the shard being written, if any: its header gets the number of clips."""
        file, clips = self._file, self._clips
        self._file, self._clips = None, 0
        if file is not None:
            with file:
                file.seek(0)
                file.write(_npy_header(clips, self._shape))
                file.seek(0)
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self.entries.append({"file": self._name, "clips": clips, "sha256": sha256})


def _npy_header(clips: int, clip_shape: tuple[int, ...]) -> bytes:
    """A NumPy 1.0 header of 128 bytes for any number of clips, so that it can be written over."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (clips, *clip_shape)}
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{header!s:<117}\n".encode()


def _motion(pixels: np.ndarray) -> float:
    """Mean |frame - frame before| of a clip (3, T, H, W), in 1/255."""
    return float(np.abs(np.diff(pixels.astype(np.int16), axis=1)).mean())


def _check_enough(
    clips: int, rejected: list[dict[str, Any]], counts: dict[str, int], sources: int, options: PackOptions
) -> None:
    if len(rejected) > MAX_REJECTED_SHARE * sources:
        named = "; ".join(f"{line['source']!r} {line['reason']}" for line in rejected[:3])
        more = ", ..." if len(rejected) > 3 else ""
        raise VglannError(f"{len(rejected)} of {sources} videos cannot be used, remove them: {named}{more}")
    if not clips:
        dropped = {"were static": counts["static"], "could not be stabilized": counts["unstable"]}
        why = " and ".join(f"{count} {what}" for what, count in dropped.items() if count)
        raise VglannError(
            f"no clip in {sources} videos: {why or f'no shot has {options.span} frames'}; give other videos, "
            "fewer frames or less min_motion"
        )
