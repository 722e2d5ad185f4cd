"""`vf.pack` and `vf.merge`: what `vglann clips pack` and `vglann clips merge` do."""

import logging
from collections.abc import Iterable
from pathlib import Path

from vglann_fast.clips import merge as merging
from vglann_fast.clips import pack as stage
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.decode import DecodeLimits
from vglann_fast.runtime.numerics import numerics

log = logging.getLogger("vglann_fast")


def pack(
    videos: str | Path | Iterable[str | Path],
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
    shots: stage.ShotMethod = "histogram",
    workers: int | None = None,
    max_frames: int = DecodeLimits.max_frames,
    max_pixels: int = DecodeLimits.max_pixels,
    max_seconds: float | None = None,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    scheduler: str | None = None,
) -> ClipSet:
    """Cut videos into clips, write them to the clip folder `out`, and open it.

    A clip folder that was packed with the same options from the same videos is opened as it is. The counts of clips,
    shots and rejected files are logged to the logger "vglann_fast".

    Args:
        videos: video files; folders of video files, of frames or of strips. One of them, or several.
        out: folder to write.
        frames: frames T of a clip, a multiple of 16 for training.
        size: rows and columns of a clip in pixels: 32, 64 or 128.
        stride: source frames from one frame of a clip to the next.
        start_every: source frames from the start of one clip to the next. Default: disjoint, frames * stride.
        tiles: 1 takes the center square of the frame, 2 the squares of half the height, and so on.
        min_motion: clips whose mean absolute difference of consecutive frames, in 1/255, is below it are dropped.
        test_fraction: expected fraction of the shots whose clips are kept for testing, 0 to below 1.
        seed: seed of the split into train and test shots.
        stabilize: whether to take the camera's motion out of each clip.
        shots: method that finds cuts, "histogram" or "transnetv2". The latter needs its weights.
        workers: decoding processes. Default: one for each CPU, at most 8.
        max_frames: frames read of a file; the rest is left out.
        max_pixels: pixels of a frame; files with more are rejected.
        max_seconds: seconds of decoding after which a file is rejected. Default: 1,800, with `stabilize` 10,800.
        overwrite: whether to replace an existing clip folder.
        shard: (I, N) packs part I of N of the videos, counted from 1, for `merge`.
        scheduler: address of a Dask scheduler whose workers decode, such as "tcp://host:8786". Trust it, and all that
            can reach it, as you trust a shell.

    Returns:
        The train and the test clips together. `ClipSet.open(out, "train")` opens the train clips alone.

    Raises `VglannError` for a bad option or video, an `out` that is in the way, more than 5 % rejected videos, no
    clip at all, or a full disk. Nothing is left behind then.
    """
    limits = stage.decode_limits(stabilize, max_frames, max_pixels, max_seconds)
    with numerics(tf32=False):
        report = stage.pack(
            videos,
            out,
            frames=frames,
            size=size,
            stride=stride,
            start_every=start_every,
            tiles=tiles,
            min_motion=min_motion,
            test_fraction=test_fraction,
            seed=seed,
            stabilize=stabilize,
            shots=shots,
            workers=workers,
            limits=limits,
            overwrite=overwrite,
            shard=shard,
            scheduler=scheduler,
        )
    log.info("%s", report)
    return ClipSet.open(out, verify=report.reused)


def merge(folders: Iterable[str | Path], out: str | Path, *, overwrite: bool = False) -> ClipSet:
    """Merge clip folders into the clip folder `out`, and open it.

    All parts of a pack (`pack(..., shard=(I, N))`), in any order, become what one `pack` of all videos writes, byte
    for byte. Other folders become what one `pack` of their videos writes, in the order given.

    Args:
        folders: clip folders.
        out: folder to write.
        overwrite: whether to replace an existing clip folder.

    Returns:
        The train and the test clips together.

    Raises `VglannError` for folders with different options or with a clip in common, a part that is missing, more
    than 5 % rejected videos, an `out` that is in the way, or a full disk. Nothing is left behind then.
    """
    report = merging.merge(list(folders), out, overwrite=overwrite)
    log.info("%s", report)
    return ClipSet.open(out, verify=report.reused)
