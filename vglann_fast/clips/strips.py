"""Strips, the form of the MIT videos the paper trains on: a JPEG of 128x128 frames stacked from top to bottom.

A strip of height h holds h // 128 frames. A clip that runs past the last frame repeats it, so every strip gives at
least one clip. At a size of 64 each pixel is the rounded mean of 2x2, (sum + 2) >> 2, which is what OpenCV's
resize by areas computes. Rows left over, fewer than 128, are stretched to one frame more, after which the last
whole frame is shown. All of this is bit for bit what the GLANN-VIDEO loader gives, except its swapped colors.

An image is taken for a strip if it is a JPEG 128 wide and at least four frames high: no video is that narrow.
"""

from pathlib import Path

import numpy as np

from vglann_fast.clips.truncation import truncation
from vglann_fast.run.files import open_regular

SIDE = 128
_LEAST_FRAMES = 4  # by which strips are told from frames
_HEAD = 2**18  # bytes in which the size of a JPEG must be found; metadata may come first


class NotAStrip(Exception):
    """The file is not a strip; the message says why, in words that go behind its name."""


def is_strip(path: Path) -> bool:
    """Return True if the file looks like a strip, by its header."""
    size = _jpeg_size(path)
    return size is not None and size[0] == SIDE and size[1] >= _LEAST_FRAMES * SIDE


def read_strip(path: Path, max_pixels: int) -> np.ndarray:
    """The frames of a strip, uint8 (n, 128, 128, 3) RGB, see `strip_frames`.

    Raises `NotAStrip` for anything but a JPEG that is 128 wide and at least one frame high, and for one that
    declares more than `max_pixels` or cannot be decoded.
    """
    import cv2

    size = _jpeg_size(path)
    if size is None:
        raise NotAStrip("is not a JPEG")
    width, height = size
    if width * height > max_pixels:
        raise NotAStrip(f"declares {width}x{height}, more than {max_pixels} pixels")
    if width != SIDE or height < SIDE:
        raise NotAStrip(f"is {width}x{height}: a strip is {SIDE} wide and holds a frame of {SIDE} rows")
    # OpenCV fills what is missing with gray and says nothing.
    with path.open("rb") as file:
        reason = truncation(file, "jpeg_pipe")
    if reason:
        raise NotAStrip(reason)
    # The frames lie from top to bottom, whatever a camera's tag says of the whole.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    if image is None or image.shape[1] != SIDE:
        raise NotAStrip("cannot be decoded")
    return strip_frames(image)


def strip_frames(strip: np.ndarray) -> np.ndarray:
    """(h, 128, 3), h >= 128 -> (h // 128, 128, 128, 3); two more if rows are left over: those, and the last again."""
    count, rest = divmod(len(strip), SIDE)
    frames = strip[: count * SIDE].reshape(count, SIDE, SIDE, 3)
    if not rest:
        return frames
    stretched = strip[count * SIDE + np.arange(SIDE) * rest // SIDE]
    return np.concatenate([frames, stretched[None], frames[-1:]])


def frame_numbers(start: int, frames: int, stride: int, count: int) -> np.ndarray:
    """Return which of `count` frames a clip shows, int64 (frames,); past the end the last one repeats."""
    return np.minimum(start + stride * np.arange(frames), count - 1)


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    """(width, height) from the frame header of a JPEG (ITU-T T.81, B.2.2), None for any other file.

    Raises `UnreadableError` as `open_regular`: no one can say then what the file is.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except (FileNotFoundError, ValueError):
        return None
    if head[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        # Start of frame is C0 to CF, except the tables C4, C8, CC among them.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = head[at + 5 : at + 7], head[at + 7 : at + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        at += 1 if marker == 0xFF else 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None
