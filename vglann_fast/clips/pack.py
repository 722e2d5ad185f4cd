"""Videos -> a clip folder: uint8 shards of short clips that never cross a cut, and an index.

The clip folder, format "vglann-clips", version 1:

    index.json          one JSON object:
        format, version     "vglann-clips", 1
        frames, size        T and the side of a clip in pixels
        stride              source frames from one clip frame to the next
        options             the options of `pack` that decide what is in the folder
        sources             [{"name": file name, "sha256", "first_frame", "last_frame" as in sources.json,
                            "frames" decoded, "truncated": whether it has more than max_frames, "shots",
                            "clips", "credit" where sources.json has one}], rejected ones too, with 0 frames
        shards              [{"file": "clips-00000.npy", "clips": n, "sha256" of the file}]
        clips               [{"id", "source": row of sources, "shot": number in the source, "first_frame":
                            frame of the source file, "crop": [x, y, width, height] in the upright frame,
                            "split": "train" or "test"}], in shard order: clip i is row i of the shards
                            laid end to end
        counts              {"rejected", "shots", "static", "repeated", "unstable"}, see `PackReport`
    clips-00000.npy ...  uint8 (n, 3, T, size, size), RGB, C order, NumPy format 1.0
    rejected.jsonl       {"source": file name, "reason"}, one line for each source that could not be used

A clip's id is the first 16 hex digits of the sha256 of "SHA256 first_frame x,y,width,height stride T size",
SHA256 being that of the source file: it does not depend on names or on the other sources.
"""

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vglann_fast.clips.cut import PackOptions, cut
from vglann_fast.clips.dataset import COUNTS, FORMAT, INDEX_FILE, VERSION, read_index
from vglann_fast.clips.decode import DecodedVideo, DecodeJob, DecodeLimits, Rejected, decode_all
from vglann_fast.clips.numbers import switch, whole
from vglann_fast.clips.shots import find_shots
from vglann_fast.clips.sources import Source, content_sha256, find_sources
from vglann_fast.errors import VglannError
from vglann_fast.nets.weights import load_weights
from vglann_fast.options.aliases import read_options
from vglann_fast.progress import Progress
from vglann_fast.run.destinations import atomic_dir, content_of
from vglann_fast.run.temporary import remove_strays
from vglann_fast.runtime.processors import available

ShotMethod = Literal["histogram", "transnetv2"]
ShotFinder = Callable[[np.ndarray], list[tuple[int, int]]]

MAX_REJECTED_SHARE = 0.05
REJECTED_FILE = "rejected.jsonl"
OTHER_FILES = (REJECTED_FILE, "clips-*.npy", "sheet.png")  # beside the index; the sheet is from `clips show`
STABILIZE_SECONDS = 6 * DecodeLimits.seconds  # for a file: finding keypoints takes longer than decoding
_SHARD_CLIPS, _SHARD_BYTES = 1024, 2**29


@dataclass(frozen=True)
class PackReport:
    """Counts of one `pack`.

    static: clips dropped for lack of motion. repeated: clips already there. unstable: clips that could not be
    stabilized, listed in rejected.jsonl.
    """

    folder: str
    clips: int
    train: int
    test: int
    sources: int
    rejected: int
    shots: int
    static: int
    repeated: int
    seconds: float
    reused: bool
    unstable: int = 0

    def __str__(self) -> str:
        if self.reused:
            return f"{self.folder}: reused, {self.clips} clips ({self.train} train, {self.test} test)"
        dropped = f"{self.static} static clips dropped, {self.rejected} files rejected"
        if self.repeated:
            dropped += f", {self.repeated} repeated clips dropped"
        if self.unstable:
            dropped += f", {self.unstable} clips could not be stabilized"
        return (
            f"{self.folder}: {self.clips} clips ({self.train} train, {self.test} test) of {self.shots} shots "
            f"in {self.sources} videos; {dropped}; {self.seconds:.1f} s"
        )


def pack(
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    frames: int = 32,
    size: int = 64,
    stride: int = 1,
    start_every: int | None = None,
    tiles: int = 1,
    min_motion: float = 0.3,
    test_fraction: float = 0.1,
    seed: int = 0,
    stabilize: bool = False,
    shots: ShotMethod = "histogram",
    workers: int | None = None,
    limits: DecodeLimits | None = None,
    overwrite: bool = False,
) -> PackReport:
    """Cut videos into clips and write them as a clip folder.

    sources: video files, folders of videos, folders of frames (see `find_sources`).
    frames: frames of a clip; stride: source frames from one to the next.
    start_every: source frames from one clip's start to the next; None makes them disjoint (frames * stride).
    size: side of a clip in pixels, 32, 64 or 128.
    tiles: 1 takes the centre square of the frame, 2 the squares of half its height, and so on.
    min_motion: clips whose mean |frame - frame before| is smaller, in 1/255, are dropped as static.
    test_fraction: expected share of shots whose clips are test clips. A shot is test or train by a hash of its
        source, its number and `seed`, so it stays what it is when other sources come or go.
    stabilize: take the camera's motion out of each clip, see `stabilize.py`. Static clips are those in which
        nothing moves then. A clip for which that fails is dropped, and listed in rejected.jsonl.
    shots: how cuts are found: by colour histograms, or by TransNetV2, whose weights must have been imported.
    workers: decoding processes; None is one a CPU, at most 8.
    overwrite: replace a clip folder that is there already.

    A clip folder that is there with the same options and sources is left as it is and reported as reused.
    Raises `VglannError` for a bad option or source, an `out` that is in the way, more than 5 % of the sources
    rejected, no clip, or a full disk; then nothing is left behind.
    """
    began = time.monotonic()
    finder, named = _shot_finder(shots)
    limits = limits or decode_limits(switch("stabilize", stabilize))
    options = PackOptions(
        frames,
        size,
        stride,
        start_every,
        tiles,
        min_motion,
        test_fraction,
        seed,
        stabilize,
        limits.max_frames,
        limits.max_pixels,
        named,
    )
    workers = min(available(), 8) if workers is None else whole("workers", workers, 1)
    overwrite = switch("overwrite", overwrite)
    for module in ("av", "cv2"):
        if importlib.util.find_spec(module) is None:
            raise VglannError(f"reading video needs the module {module}: pip install 'vglann-fast[video]'")
    found = find_sources(sources)
    out = Path(out)
    if content_of(out, INDEX_FILE, OTHER_FILES):
        if not (out / INDEX_FILE).is_file():
            raise VglannError(f"{out}: is there already and is no clip folder; choose another --out")
        if not overwrite:
            existing = read_index(out)
            _check_same(out, existing, options, found)
            remove_strays(Path(os.path.realpath(out)), replaced=True)
            return _report(out, existing, began, reused=True)
    with atomic_dir(out, INDEX_FILE, OTHER_FILES) as folder:
        index = _write(folder, found, options, limits, workers, finder)
    return _report(out, index, began, reused=False)


def decode_limits(
    stabilize: bool,
    frames: int = DecodeLimits.max_frames,
    pixels: int = DecodeLimits.max_pixels,
    seconds: float | None = None,
) -> DecodeLimits:
    """What one file may cost; without `seconds` more of them with `stabilize`, which takes longer than decoding.

    Raises `VglannError` for a limit that is not above 0.
    """
    usual = STABILIZE_SECONDS if stabilize else DecodeLimits.seconds
    return DecodeLimits(usual if seconds is None else seconds, max_frames=frames, max_pixels=pixels)


def _shot_finder(method: str) -> tuple[ShotFinder, str]:
    """The function that finds shots, and what the index says of it."""
    if method == "histogram":
        return find_shots, method
    if method != "transnetv2":
        raise VglannError(f"shots must be histogram or transnetv2, not {method!r}")
    from vglann_fast.clips.shots_transnetv2 import shot_finder

    weights = load_weights(method)
    return shot_finder(weights), f"{method} {weights.sha256}"


def _write(
    folder: Path,
    sources: list[Source],
    options: PackOptions,
    limits: DecodeLimits,
    workers: int,
    finder: ShotFinder,
) -> dict[str, Any]:
    jobs = [
        DecodeJob(
            s.path,
            s.frame_files,
            s.first_frame,
            s.last_frame,
            options.tiles,
            options.size,
            strip=s.strip,
            stabilize=options.stabilize,
        )
        for s in sources
    ]
    scratch = folder.with_name("scratch")  # beside what is kept, so that it may go later
    scratch.mkdir()
    shards = _Shards(folder, options)
    entries: list[dict[str, Any]] = []
    clips: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    unstable: list[dict[str, Any]] = []
    counts = dict.fromkeys(COUNTS, 0)
    ids: set[str] = set()
    with closing(decode_all(jobs, scratch, limits, workers)) as decoded, closing(shards):
        for source, video in zip(sources, _shown(decoded, len(jobs)), strict=True):
            entry = _source_entry(source, video.sha256)
            entries.append(entry)
            if isinstance(video, Rejected):
                rejected.append({"source": source.name, "reason": video.reason})
                continue
            try:
                # A strip is one shot, and repeats its last frame where a clip runs past it.
                shots = [(0, len(video.tiles))] if source.strip else finder(video.thumbnails)
                counts["shots"] += len(shots)
                entry.update(frames=len(video.tiles), truncated=video.truncated, shots=len(shots))
                for clip, pixels in cut(video, shots, source.first_frame, options, repeat_last=source.strip):
                    if pixels is None:
                        reason = "a clip could not be stabilized"
                        unstable.append({"source": source.name, "reason": reason, "clip": clip})
                    elif _motion(pixels) < options.min_motion:
                        counts["static"] += 1
                    elif clip["id"] in ids:
                        counts["repeated"] += 1  # the same file twice, under two names
                    else:
                        ids.add(clip["id"])
                        clips.append({**clip, "source": len(entries) - 1})
                        shards.write(pixels)
                        entry["clips"] += 1
            finally:
                video.discard()
    counts.update(rejected=len(rejected), unstable=len(unstable))
    _check_enough(len(clips), rejected, counts, len(sources), options)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "frames": options.frames,
        "size": options.size,
        "stride": options.stride,
        "options": asdict(options),
        "sources": entries,
        "shards": shards.entries,
        "counts": counts,
        "clips": clips,
    }
    # One clip a line: readable, and quick to search in.
    (folder / INDEX_FILE).write_text(json.dumps(index, separators=(",", ":")).replace('{"id"', '\n{"id"'))
    (folder / REJECTED_FILE).write_text("".join(json.dumps(line) + "\n" for line in rejected + unstable))
    return index


def _shown(decoded: Iterable[DecodedVideo | Rejected], count: int) -> Iterator[DecodedVideo | Rejected]:
    """The same, with their progress."""
    with Progress("pack", count, "video") as progress:
        for video in decoded:
            yield video
            progress.advance()
            progress.show()


def _source_entry(source: Source, sha256: str) -> dict[str, Any]:
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


def _check_same(out: Path, index: dict[str, Any], options: PackOptions, sources: list[Source]) -> None:
    """Raise `VglannError` unless the clip folder was made with these options and sources."""
    remedy = "choose another --out or set --overwrite"
    old, new = asdict(PackOptions()) | read_options("clips pack", index["options"]), asdict(options)
    differing = sorted(name for name in new if old.get(name) != new[name])
    if differing:
        raise VglannError(f"{out}: was packed with other options ({', '.join(differing)}); {remedy}")
    here = [_source_key(_source_entry(source, _sha256_or_empty(source))) for source in sources]
    if here != [_source_key(entry) for entry in index["sources"]]:
        raise VglannError(f"{out}: was packed from other sources; {remedy}")


def _source_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in ("name", "sha256", "first_frame", "last_frame"))


def _sha256_or_empty(source: Source) -> str:
    try:
        return content_sha256(source.path, source.frame_files)
    except (OSError, ValueError):
        return ""  # as in the index: such a source was rejected then, too


def _report(out: Path, index: dict[str, Any], began: float, reused: bool) -> PackReport:
    train = sum(clip["split"] == "train" for clip in index["clips"])
    return PackReport(
        folder=str(out),
        clips=len(index["clips"]),
        train=train,
        test=len(index["clips"]) - train,
        sources=len(index["sources"]),
        **index["counts"],
        seconds=time.monotonic() - began,
        reused=reused,
    )
