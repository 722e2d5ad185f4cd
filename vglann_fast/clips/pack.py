"""Videos -> a clip folder: uint8 shards of short clips that never cross a cut, and an index.

The clip folder, format "vglann-clips", version 1:

    index.json          one JSON object:
        format, version     "vglann-clips", 1
        frames, size        T and the side of a clip in pixels
        stride              source frames from one clip frame to the next
        options             the options of `pack` that decide what is in the folder
        part                only in a part of a pack (`pack --shard`): its place, see `parts.py`
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

A clip's id depends on the source file, the frames, the crop and the size, not on names or on the other sources: see
`cut.py`.
"""

import importlib.util
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vglann_fast.clips.cut import PackOptions
from vglann_fast.clips.dataset import INDEX_FILE, REJECTED_FILE, read_index
from vglann_fast.clips.decode import DecodeLimits
from vglann_fast.clips.numbers import place, switch, whole
from vglann_fast.clips.parts import Part, part_of
from vglann_fast.clips.sources import Source, content_sha256, find_sources
from vglann_fast.clips.writer import ClipWriter, add_videos, shot_finder, source_entry
from vglann_fast.errors import VglannError
from vglann_fast.options.aliases import read_options
from vglann_fast.progress import Progress
from vglann_fast.run.destinations import atomic_dir, content_of
from vglann_fast.run.temporary import remove_strays
from vglann_fast.runtime.processors import available

ShotMethod = Literal["histogram", "transnetv2"]

OTHER_FILES = (REJECTED_FILE, "clips-*.npy", "sheet.png")  # beside the index; the sheet is from `clips show`
STABILIZE_SECONDS = 6 * DecodeLimits.seconds  # for a file: finding keypoints takes longer than decoding


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
    shard: tuple[int, int] | None = None,
    scheduler: str | None = None,
) -> PackReport:
    """Cut videos into clips and write them as a clip folder.

    sources: video files, folders of videos, folders of frames (see `find_sources`).
    frames: frames of a clip; stride: source frames from one to the next.
    start_every: source frames from one clip's start to the next; None makes them disjoint (frames * stride).
    size: side of a clip in pixels, 32, 64 or 128.
    tiles: 1 takes the center square of the frame, 2 the squares of half its height, and so on.
    min_motion: clips whose mean |frame - frame before| is smaller, in 1/255, are dropped as static.
    test_fraction: expected share of shots whose clips are test clips. A shot is test or train by a hash of its
        source, its number and `seed`, so it stays what it is when other sources come or go.
    stabilize: take the camera's motion out of each clip, see `stabilize.py`. Static clips are those in which
        nothing moves then. A clip for which that fails is dropped, and listed in rejected.jsonl.
    shots: how cuts are found: by color histograms, or by TransNetV2, whose weights must have been imported.
    workers: decoding processes; None is one a CPU, at most 8.
    overwrite: replace a clip folder that is there already.
    shard: (I, N) packs the I-th of N parts of the sources, counted from 1, for `merge`.
    scheduler: address of a Dask scheduler; its workers decode, see `cluster.py`.

    A clip folder that is there with the same options and sources is left as it is and reported as reused.
    Raises `VglannError` for a bad option or source, an `out` that is in the way, more than 5 % of the sources
    rejected, no clip, or a full disk; then nothing is left behind. A part may have no clips and any rejected files.
    """
    began = time.monotonic()
    named = shot_finder(shots)[1]
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
    if scheduler is not None and workers is not None:
        raise VglannError(
            "--workers is for this machine, but --scheduler has workers of its own; remove one of them"
        )
    workers = min(available(), 8) if workers is None else whole("workers", workers, 1)
    overwrite = switch("overwrite", overwrite)
    for module in ("av", "cv2"):
        if importlib.util.find_spec(module) is None:
            raise VglannError(f"reading video needs the module {module}: pip install 'vglann-fast[video]'")
    found: Sequence[Source] = find_sources(sources)
    part = None
    if shard is not None:
        part, found = part_of(found, *place("shard", shard))
    out = Path(out)
    existing = existing_index(out, overwrite)
    if existing is not None:
        here = (source_entry(source, _sha256_or_empty(source)) for source in found)
        check_same(out, existing, options, here, part)
        return report(out, existing, began, reused=True)
    with atomic_dir(out, INDEX_FILE, OTHER_FILES) as folder:
        scratch = folder.with_name("scratch")  # beside what is kept, so that it may go later
        scratch.mkdir()
        with closing(ClipWriter(folder, options)) as writer:
            if scheduler is None:
                steps = add_videos(writer, found, scratch, limits, workers)
            else:
                from vglann_fast.clips.cluster import add_by_workers

                steps = add_by_workers(writer, found, scratch, limits, scheduler)
            with closing(steps), Progress("pack", len(found), "video") as progress:
                for _ in steps:
                    progress.advance()
                    progress.show()
            index = writer.finish(part)
    return report(out, index, began, reused=False)


def decode_limits(
    stabilize: bool,
    frames: int = DecodeLimits.max_frames,
    pixels: int = DecodeLimits.max_pixels,
    seconds: float | None = None,
) -> DecodeLimits:
    """Return the limits of one file; without `seconds` more of them with `stabilize`, which is slower than decoding.

    Raises `VglannError` for a limit that is not above 0.
    """
    usual = STABILIZE_SECONDS if stabilize else DecodeLimits.seconds
    return DecodeLimits(usual if seconds is None else seconds, max_frames=frames, max_pixels=pixels)


def existing_index(out: Path, overwrite: bool) -> dict[str, Any] | None:
    """Return the index of a clip folder that is to be reused, or None where a new one is to be written.

    Raises `VglannError` if something else is there.
    """
    if not content_of(out, INDEX_FILE, OTHER_FILES):
        return None
    if not (out / INDEX_FILE).is_file():
        raise VglannError(f"{out}: is already there and is not a clip folder; choose another --out")
    return None if overwrite else read_index(out)


def check_same(
    out: Path,
    index: dict[str, Any],
    options: PackOptions,
    sources: Iterable[dict[str, Any]],
    part: Part | None = None,
) -> None:
    """Raise `VglannError` unless the clip folder was made with these options from the sources with these entries.

    What a killed pack left in the folder is removed.
    """
    remedy = "choose another --out or set --overwrite"
    differing = differing_options(index, options)
    if differing:
        raise VglannError(f"{out}: was packed with other options ({', '.join(differing)}); {remedy}")
    if index.get("part") != (part and asdict(part)):
        raise VglannError(f"{out}: was packed as another --shard; {remedy}")
    if [_source_key(entry) for entry in sources] != [_source_key(entry) for entry in index["sources"]]:
        raise VglannError(f"{out}: was packed from other sources; {remedy}")
    remove_strays(Path(os.path.realpath(out)), replaced=True)


def options_of(index: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a clip folder under their present names, with defaults for those it does not have."""
    shape = {name: index[name] for name in ("frames", "size", "stride")}
    return asdict(PackOptions()) | read_options("clips pack", index["options"]) | shape


def differing_options(index: dict[str, Any], options: PackOptions) -> list[str]:
    """Return the names of the options with which a clip folder was packed otherwise."""
    old, new = options_of(index), asdict(options)
    return sorted(name for name in new if old.get(name) != new[name])


def _source_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in ("name", "sha256", "first_frame", "last_frame"))


def _sha256_or_empty(source: Source) -> str:
    try:
        return content_sha256(source.path, source.frame_files)
    except (OSError, ValueError):
        return ""  # as in the index: such a source was rejected then, too


def report(out: Path, index: dict[str, Any], began: float, reused: bool) -> PackReport:
    """Return the counts of a clip folder with this index."""
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
