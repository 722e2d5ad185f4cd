"""The decoding process behind `decode.py`: reads jobs, decodes with PyAV, writes small frames.

Nothing here is trusted to return: the parent kills this process when a file takes too long.
"""

import errno
import json
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from vglann_fast.clips.decode import READY, THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH, tile_boxes
from vglann_fast.clips.frames import Frame, Unusable, file_frames
from vglann_fast.clips.sources import content_sha256
from vglann_fast.clips.stabilize import Tracker
from vglann_fast.clips.strips import NotAStrip, read_strip

# No file descriptor is left: another video would fare no better.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE)
# What opening and reading answer where a file may be whole, and be read another time.
_MAY_PASS = (errno.EBUSY, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT)
_THREADS = 4  # two that decode, and FFmpeg's own


class _OutputError(Exception):
    """The temporary files cannot be written: not the video's fault."""


def main(memory_mb: int, seconds: int) -> None:
    """Say that the decoder is there, then answer jobs from stdin until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may ignore it, which is inherited
    # A library that prints to stdout must not spoil the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=end_with_parent, args=(answers.fileno(),), daemon=True).start()
    av.logging.set_level(None)
    cv2.setNumThreads(1)
    _limit_cpu_time()
    scarce = _limit_memory(memory_mb)
    answers.write(READY.decode())
    answers.flush()
    for line in sys.stdin:
        signal.alarm(seconds)  # ends this process even if the parent was killed and nobody else will
        answers.write(json.dumps(_answer(json.loads(line), memory_mb, scarce)) + "\n")
        answers.flush()
        signal.alarm(0)


def _limit_memory(memory_mb: int) -> str:
    """Limit what decoding may add to the memory of this process, and raise no limit that is there already.

    Return which limit of the machine leaves less than that, or "".
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return ""
    lines = [line.split() for line in status.read_bytes().splitlines()]
    used = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in (b"VmData:", b"VmSize:")}
    # Each of the decoder's threads takes a stack, of which it touches little.
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    memory = memory_mb * 2**20 + (_THREADS * stack if 0 < stack < 2**40 else 0)
    # RLIMIT_DATA rather than RLIMIT_AS: libraries map much they never touch. Counted from the imports' own use.
    there = [limit for limit in resource.getrlimit(resource.RLIMIT_DATA) if limit >= 0]
    limit = min([used[b"VmData:"] + memory, *there])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    left = {"`ulimit -d`": limit - used[b"VmData:"]}
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses >= 0:
        left["`ulimit -v`"] = addresses - used[b"VmSize:"]
    name, least = min(left.items(), key=lambda item: item[1])
    return f"{name} leaves {max(least, 0) // 2**20} MiB of memory" if least < memory else ""


def _limit_cpu_time() -> None:
    """Let SIGXCPU come before the SIGKILL that comes at the hard limit and tells nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard > 1:
        resource.setrlimit(resource.RLIMIT_CPU, (hard - 1 if soft < 0 else min(soft, hard - 1), hard))


def _answer(job: dict[str, Any], memory_mb: int, scarce: str) -> dict[str, Any]:
    sha256 = ""
    try:
        path = Path(job["path"])
        try:
            sha256 = content_sha256(path, tuple(job["frame_files"]))
        except ValueError as error:
            raise Unusable(str(error)) from error
        files = [path / name for name in job["frame_files"]] or [path]
        return {"sha256": sha256, **_decode(job, files)}
    except _OutputError as error:
        cause = error.__cause__
        return {"errno": cause.errno if isinstance(cause, OSError) else 0}
    except Unusable as error:
        reason = str(error)
    except (MemoryError, OSError, av.error.FFmpegError, cv2.error) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            return {"machine": error.strerror}
        # FFmpeg's own errors are about the content, whatever number they have.
        if not isinstance(error, av.error.FFmpegError) and getattr(error, "errno", None) in _MAY_PASS:
            return {"unreadable": getattr(error, "strerror", "")}
        if not _wants_memory(error):
            reason = _words(error)
        elif scarce:
            return {"machine": f"decoding {path.name!r} needs more: {scarce}"}
        else:
            reason = f"decoding needs more than {memory_mb} MiB of memory"
    except Exception as error:  # whatever else a broken file provokes in a decoder
        reason = f"{type(error).__name__}: {error}"
    if scarce:  # FFmpeg takes a lack of memory for the end of some files
        reason = f"{reason}; that may be for want of memory: {scarce}"
    return {"reason": " ".join(reason.split()), "sha256": sha256}


def _wants_memory(error: Exception) -> bool:
    if isinstance(error, cv2.error):
        return "memory" in str(error)
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def _words(error: Exception) -> str:
    # str() of errors of the system and of FFmpeg would show the path
    if isinstance(error, cv2.error):
        return "cannot be resized"
    if isinstance(error, (OSError, av.error.FFmpegError)):
        return f"cannot be read: {error.strerror or type(error).__name__}"
    return str(error)


def _decode(job: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    first, last = job["first_frame"], job["last_frame"]
    seen = kept = 0
    truncated = False
    shape: tuple[int, ...] = ()
    boxes: list[list[int]] = []
    tile_shape: list[int] = []
    tracker = Tracker() if job["stabilize"] else None
    tile_file, thumbnail_file, motion_file = map(_Output, job["outputs"])
    with tile_file as tiles, thumbnail_file as thumbnails, motion_file as motions:
        for frame, pixel_aspect in _frames(files, job):
            if last is not None and seen > last:
                break
            if kept == job["max_frames"]:
                truncated = True
                break
            seen += 1
            if seen <= first:
                continue
            image = frame.rgb()
            if not boxes:
                shape, boxes = image.shape, _boxes(image, pixel_aspect, job)
                tile_shape = [1, *_whole(shape, boxes, job)] if tracker else [len(boxes), *[job["size"]] * 2]
            if image.shape != shape:
                raise Unusable(f"the frame size changes at frame {seen - 1}")
            if tracker is not None:
                motions.write(tracker(image))
                tiles.write(_resized(image, [0, 0, shape[1], shape[0]], tile_shape[1:]))
            else:
                for box in boxes:
                    tiles.write(_resized(image, box, tile_shape[1:]))
            if not job["strip"]:  # is one shot: nothing to look for
                small = cv2.resize(image, (THUMBNAIL_WIDTH, THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)
                thumbnails.write(small)
            kept += 1
    if kept < 2:
        where = f" from frame {first}" if first else ""
        raise Unusable(f"has {'only 1 frame' if kept else 'no frames'}{where}")
    found = {"frames": kept, "truncated": truncated, "boxes": boxes, "tile_shape": tile_shape}
    return {**found, "frame_size": [shape[1], shape[0]]}


def _whole(shape: tuple[int, ...], boxes: list[list[int]], job: dict[str, Any]) -> list[int]:
    """(height, width) of the whole frame, small enough that tiles are twice as large as clips."""
    scale = min(1.0, 2 * job["size"] / min(boxes[0][2:]))
    return [round(shape[0] * scale), round(shape[1] * scale)]


def _boxes(image: np.ndarray, pixel_aspect: float, job: dict[str, Any]) -> list[list[int]]:
    height, width = image.shape[:2]
    boxes = tile_boxes(width, height, job["tiles"], pixel_aspect)
    # Enlarged more than twofold, a clip is a blur that a generator would learn as one.
    if not boxes or min(boxes[0][2:]) * 2 < job["size"]:
        raise Unusable(f"frames of {width}x{height} are too small for tiles of {job['size']}")
    return boxes


def _resized(image: np.ndarray, box: list[int], shape: list[int]) -> np.ndarray:
    """The box of an image, resized to (height, width) `shape`: by areas, or linearly where it grows."""
    x, y, width, height = box
    crop = np.ascontiguousarray(image[y : y + height, x : x + width])
    shrink = min(width, height) >= min(shape)
    size = (shape[1], shape[0])
    return cv2.resize(crop, size, interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)


class _Output:
    """A raw binary file whose errors are told apart from the video's."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> "_Output":
        try:
            self._file = open(self._path, "wb", buffering=2**20)
        except OSError as error:
            raise _OutputError from error
        return self

    def write(self, image: np.ndarray) -> None:
        try:
            self._file.write(np.ascontiguousarray(image).data)
        except OSError as error:
            raise _OutputError from error

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise _OutputError from error


class _StripFrame:
    """A frame of a strip, which is converted already."""

    def __init__(self, image: np.ndarray) -> None:
        self._image = image

    def rgb(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return self._image


def _frames(files: list[Path], job: dict[str, Any]) -> Iterator[tuple[Frame | _StripFrame, float]]:
    """The frames of a video file or a strip, or the first frame of each of several image files."""
    max_pixels = job["max_pixels"]
    if job["strip"]:
        try:
            strip = read_strip(files[0], max_pixels)
        except NotAStrip as error:
            raise Unusable(str(error)) from error
        for image in strip:
            yield _StripFrame(image), 1.0
        return
    reformatter = VideoReformatter()
    if len(files) == 1:
        yield from file_frames(files[0], max_pixels, reformatter)
        return
    for file in files:
        try:
            yield next(file_frames(file, max_pixels, reformatter))
        except StopIteration:
            raise Unusable(f"{file.name} has no frame") from None
        except (Unusable, av.error.FFmpegError) as error:
            if isinstance(error, MemoryError):
                raise
            raise Unusable(f"{file.name} {_words(error)}") from error


def end_with_parent(answers: int) -> None:
    """End this process, in the middle of a file too, when nobody reads the pipe `answers`: the parent has ended."""
    poll = select.poll()
    poll.register(answers, 0)  # the end of its reader is reported without being asked for
    poll.poll()
    os._exit(1)
