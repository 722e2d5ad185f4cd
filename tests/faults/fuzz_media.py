"""Strips and videos, broken in their bytes, each in the process that decodes it."""

import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from faults.case import Case, case, part_of
from faults.mutations import BYTES
from video_files import write_video

from vglann_fast.clips.decode import DecodedVideo, DecodeJob, DecodeLimits, Rejected, decode_all
from vglann_fast.clips.strips import is_strip
from vglann_fast.experiments.moving_squares import moving_squares

FULL = 150  # broken files of each kind
LIMITS = DecodeLimits(seconds=60, memory_mb=512, max_frames=100, max_pixels=2**22)
KINDS = {
    "mp4": ("libx264", "yuv420p"),
    "mkv": ("ffv1", "yuv444p"),
    "avi": ("mjpeg", "yuvj420p"),
    "gif": ("gif", "rgb8"),
}


def cases(share: float) -> Iterable[Case]:
    """`FULL` files of each kind, through one decoding process after another."""
    with tempfile.TemporaryDirectory() as root:
        for kind in ("jpg", *KINDS):
            problems = broken_files(Path(root), kind, part_of(FULL, share))
            name = "broken strips (jpg)" if kind == "jpg" else f"broken videos ({kind})"
            yield case(
                name, problems, "rejected with a reason, or decoded within the limits; nothing else written"
            )


def broken_files(root: Path, kind: str, count: int) -> list[str | None]:
    """Return what went wrong with each of `count` broken files of a kind.

    Raises AssertionError where a whole one is not read, or where files are left that are nobody's.
    """
    folder, out = root / kind, root / f"{kind}-out"
    folder.mkdir()
    out.mkdir()
    whole = _good(folder, kind).read_bytes()
    jobs = [DecodeJob(folder / f"good.{kind}", size=32, strip=kind == "jpg")]
    for number in range(count):
        drawn, content = random.Random(f"{kind}-{number}"), whole
        for _ in range(drawn.randint(1, 4)):
            content = drawn.choice(BYTES)(content, drawn)
        file = folder / f"{number}.{kind}"
        file.write_bytes(content)
        is_strip(file)
        jobs.append(DecodeJob(file, size=32, strip=kind == "jpg"))
    good, *found = (_verdict(result) for result in decode_all(jobs, out, LIMITS, 1))
    left = sorted(file.name for file in out.iterdir())
    if good or left:
        raise AssertionError(f"the good {kind}: {good}; left in the end: {left[:3]}")
    return [one and f"case {number}: {one}" for number, one in enumerate(found)]


def _verdict(result: DecodedVideo | Rejected) -> str | None:
    if isinstance(result, Rejected):
        return None if result.reason and "\n" not in result.reason else f"reason {result.reason!r}"
    frames, size = len(result.tiles), result.tiles.shape[2:]
    result.discard()
    return None if 2 <= frames <= LIMITS.max_frames and size == (32, 32, 3) else f"{frames} frames of {size}"


def _good(folder: Path, kind: str) -> Path:
    """A short video of this kind."""
    file = folder / f"good.{kind}"
    images = list(moving_squares(1, frames=8, size=128)[0].transpose(1, 2, 3, 0))
    if kind == "jpg":
        cv2.imwrite(str(file), np.concatenate(images))
        return file
    return write_video(file, images, *KINDS[kind])
