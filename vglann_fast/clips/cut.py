"""One decoded video -> its clips: where they lie, what they are called, which split they are in, their pixels.

A clip's id is the first 16 hex digits of the sha256 of "SHA256 first_frame x,y,width,height stride T size",
followed by " stabilized" where it is that; SHA256 is that of the source file. So an id does not depend on names
or on the other sources, and clips with other pixels have other ids.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vglann_fast.clips.decode import DecodedVideo, DecodeLimits
from vglann_fast.clips.numbers import real, switch, whole
from vglann_fast.clips.strips import frame_numbers
from vglann_fast.errors import VglannError

SIZES = (32, 64, 128)


@dataclass(frozen=True)
class PackOptions:
    """Options that decide the content of a clip folder; `pack` explains each."""

    frames: int = 32
    size: int = 64
    stride: int = 1
    start_every: int | None = None
    tiles: int = 1
    min_motion: float = 0.3
    test_fraction: float = 0.1
    seed: int = 0
    stabilize: bool = False
    max_frames: int = DecodeLimits.max_frames
    max_pixels: int = DecodeLimits.max_pixels
    shots: str = "histogram"  # or "transnetv2 SHA256", of the weight file

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"size": whole("size", self.size, 1)}
        for name, least in (("frames", 2), ("stride", 1), ("start_every", 1), ("tiles", 1), ("seed", 0)):
            value = getattr(self, name)
            if not (value is None and name == "start_every"):
                checked[name] = whole(name, value, least)
        for name in ("max_frames", "max_pixels"):
            checked[name] = whole(name, getattr(self, name), 1)
        checked["min_motion"] = real("min_motion", self.min_motion, "from 0 to 255 (in 1/255)", 0, 255)
        checked["test_fraction"] = real("test_fraction", self.test_fraction, "at least 0 and below 1", 0, 1)
        checked["stabilize"] = switch("stabilize", self.stabilize)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.size not in SIZES:
            raise VglannError(f"size must be one of {', '.join(map(str, SIZES))}, not {self.size}")

    @property
    def span(self) -> int:
        """Source frames from the first to the last of a clip, both included."""
        return (self.frames - 1) * self.stride + 1


def clip_id(
    sha256: str,
    first_frame: int,
    crop: list[int],
    stride: int,
    frames: int,
    size: int,
    stabilized: bool = False,
) -> str:
    """The id of a clip, 16 hex digits; the formula is at the top of this file."""
    x, y, width, height = crop
    key = f"{sha256} {first_frame} {x},{y},{width},{height} {stride} {frames} {size}"
    return hashlib.sha256((key + " stabilized" * stabilized).encode()).hexdigest()[:16]


def shot_split(sha256: str, shot: int, seed: int, test_fraction: float) -> str:
    """The split of a shot's clips: test if the sha256 of "SHA256/shot/seed", as a number in 0..1, is below
    test_fraction, else train.
    """
    digest = hashlib.sha256(f"{sha256}/{shot}/{seed}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else "train"


def cut(
    video: DecodedVideo,
    shots: list[tuple[int, int]],
    first_frame: int,
    options: PackOptions,
    *,
    repeat_last: bool = False,
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """The clips of a video with their pixels (3, T, size, size): by shot, then start, then tile.

    The pixels are None where a clip could not be stabilized. With `repeat_last` a shot gives at least one clip,
    whose last frames are the shot's last frame if it is too short.
    """
    every = options.start_every or options.frames * options.stride
    for number, (begin, end) in enumerate(shots):
        split = shot_split(video.sha256, number, options.seed, options.test_fraction)
        starts = list(range(begin, end - options.span + 1, every))
        if repeat_last and not starts:
            starts = [begin]
        for start in starts:
            numbers = frame_numbers(start, options.frames, options.stride, end)
            tiles, quality = _tiles(video, numbers, options)
            for tile, box in enumerate(video.boxes):
                at = first_frame + start
                name = clip_id(
                    video.sha256, at, box, options.stride, options.frames, options.size, options.stabilize
                )
                clip = {"id": name, "shot": number, "first_frame": at, "crop": box, "split": split, **quality}
                yield clip, None if tiles is None else tiles[tile]


def _tiles(
    video: DecodedVideo, numbers: np.ndarray, options: PackOptions
) -> tuple[list[np.ndarray] | None, dict[str, Any]]:
    """The tiles (3, T, size, size) of these frames, or None, and what the clips' entries say of stabilization."""
    if video.motions is None:
        window = np.asarray(video.tiles[numbers])
        video.release()
        return [window[:, tile].transpose(3, 0, 1, 2) for tile in range(window.shape[1])], {}
    from vglann_fast.clips.stabilize import cropped, stabilize

    # Row k holds the frames passed between frame k and k + 1 of the clip; where the last frame is repeated, none.
    frames = np.asarray(video.tiles[numbers, 0])
    video.release()
    motions = [np.asarray(video.motions[a + 1 : b + 1]) for a, b in pairwise(numbers)]
    steady, quality = stabilize(frames, motions, video.frame_size)
    record = {"stabilization": quality.as_json()}
    if steady is None:
        return None, record
    return [cropped(steady, box, video.frame_size, options.size) for box in video.boxes], record
