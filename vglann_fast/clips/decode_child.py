"""The decoding process behind `decode.py`: reads jobs, decodes with PyAV, writes small frames.

`main` gets MEMORY_MIB and SECONDS as arguments. Nothing here is trusted to return: the parent kills this
process when a file takes too long.
"""

import json
import math
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

from vglann_fast.clips.decode import THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH, tile_boxes
from vglann_fast.clips.sources import content_sha256
from vglann_fast.clips.stabilize import Tracker
from vglann_fast.clips.strips import NotAStrip, read_strip


class _Unusable(Exception):
    """The file cannot be used; the message is the reason."""


class _OutputError(Exception):
    """The temporary files cannot be written: not the video's fault."""


def main() -> None:
    """Answer jobs from stdin until it closes."""
    memory_mb, seconds = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A library that prints to stdout must not spoil the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=end_with_parent, args=(answers.fileno(),), daemon=True).start()
    av.logging.set_level(None)
    cv2.setNumThreads(1)
    _limit_memory(memory_mb)
    for line in sys.stdin:
        signal.alarm(seconds)  # ends this process even if the parent was killed and nobody else will
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()
        signal.alarm(0)


def _limit_memory(memory_mb: int) -> None:
    # RLIMIT_DATA rather than RLIMIT_AS: libraries map much they never touch. Counted from the imports' own use.
    status = Path("/proc/self/status")
    if status.exists():
        used_kb = next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmData" in line)
        limit = used_kb * 1024 + memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    sha256 = ""
    try:
        path = Path(job["path"])
        try:
            sha256 = content_sha256(path, tuple(job["frame_files"]))
        except ValueError as error:
            raise _Unusable(str(error)) from error
        files = [path / name for name in job["frame_files"]] or [path]
        return {"sha256": sha256, **_decode(job, files)}
    except _OutputError as error:
        cause = error.__cause__
        return {"errno": cause.errno if isinstance(cause, OSError) else 0}
    except _Unusable as error:
        reason = str(error)
    except (MemoryError, av.error.MemoryError):
        reason = "decoding needs more memory than allowed"
    except (OSError, av.error.FFmpegError) as error:
        reason = _words(error)
    except cv2.error as error:
        reason = "decoding needs more memory than allowed" if "memory" in str(error) else "cannot be resized"
    except Exception as error:  # whatever else a broken file provokes in a decoder
        reason = f"{type(error).__name__}: {error}"
    return {"reason": " ".join(reason.split()), "sha256": sha256}


def _words(error: Exception) -> str:
    # str() of errors of the system and of FFmpeg would show the path
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
                raise _Unusable(f"the frame size changes at frame {seen - 1}")
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
        raise _Unusable(f"has {'only 1 frame' if kept else 'no frames'}{where}")
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
        raise _Unusable(f"frames of {width}x{height} are too small for tiles of {job['size']}")
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


class _Frame:
    """A decoded frame, converted only when asked for: skipped frames cost decoding alone."""

    def __init__(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> None:
        self._frame = frame
        self._reformatter = reformatter

    def rgb(self) -> np.ndarray:
        """Upright uint8 (H, W, 3)."""
        alpha = self._frame.format.has_palette or any(c.is_alpha for c in self._frame.format.components)
        pixel_format = "rgba" if alpha else "rgb24"
        frame = self._reformatter.reformat(self._frame, format=pixel_format, threads=1)
        image = frame.to_ndarray()
        return upright(_over_white(image) if alpha else image, display_matrix(self._frame))


class _StripFrame:
    """A frame of a strip, which is converted already."""

    def __init__(self, image: np.ndarray) -> None:
        self._image = image

    def rgb(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return self._image


def _frames(files: list[Path], job: dict[str, Any]) -> Iterator[tuple[_Frame | _StripFrame, float]]:
    """The frames of a video file or a strip, or the first frame of each of several image files."""
    max_pixels = job["max_pixels"]
    if job["strip"]:
        try:
            strip = read_strip(files[0], max_pixels)
        except NotAStrip as error:
            raise _Unusable(str(error)) from error
        for image in strip:
            yield _StripFrame(image), 1.0
        return
    reformatter = VideoReformatter()
    if len(files) == 1:
        yield from _file_frames(files[0], max_pixels, reformatter)
        return
    for file in files:
        try:
            yield next(_file_frames(file, max_pixels, reformatter))
        except StopIteration:
            raise _Unusable(f"{file.name} has no frame") from None
        except (_Unusable, av.error.FFmpegError) as error:
            raise _Unusable(f"{file.name} {_words(error)}") from error


def _file_frames(
    file: Path, max_pixels: int, reformatter: VideoReformatter
) -> Iterator[tuple[_Frame, float]]:
    # file: keeps a name like "concat:..." a name, the whitelist keeps a playlist from reaching out;
    # max_pixels also holds while the file is probed, and for a stream that grows on the way.
    options = {"protocol_whitelist": "file", "max_pixels": str(max_pixels)}
    with av.open(f"file:{file}", options=options) as container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise _Unusable("has no video stream")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            raise _Unusable(f"declares frames of {width}x{height}, more than {max_pixels} pixels")
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = 2
        for frame in _video_frames(container, stream):
            yield _Frame(frame, reformatter), _upright_pixel_aspect(stream, frame)


def _video_frames(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Frames in order of display. Raises _Unusable where the file is damaged or ends before it should."""
    count, last = 0, 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _Unusable(f"is damaged or cut off after frame {count}")
        try:
            frames = packet.decode()
        except (av.error.InvalidDataError, EOFError) as error:
            raise _Unusable(f"cannot be decoded after frame {count}") from error
        for frame in frames:
            if frame.is_corrupt:
                raise _Unusable(f"is damaged at frame {count}")
            count += 1
            last = max(last, frame.time or 0.0)
            yield frame
    # Matroska counts no frames and ends silently when cut off; the length it declares tells.
    length = _declared_seconds(container, stream)
    end = last * count / max(count - 1, 1)  # the last frame lasts as long as the others
    if stream.frames == 0 and end < 0.9 * length - 0.2:
        raise _Unusable(f"is cut off: declares {length:.1f} s, has {end:.1f} s")


def _declared_seconds(container: Any, stream: Any) -> float:
    if stream.duration is not None or len(container.streams) != 1 or container.duration is None:
        return 0.0
    return container.duration / av.time_base


def display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """(a, b, c, d) of the frame's display matrix: a stored pixel x, y is shown at x a + y c, x b + y d."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is not None:
        values = np.frombuffer(bytes(side_data), "=i4").astype(float)
        return (values[0], values[1], values[3], values[4])
    return (1.0, 0.0, 0.0, 1.0)


def upright(image: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """Turn and mirror an image (H, W, 3) as the display matrix says, to the nearest right angle."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        x_sign, y_sign = a, d
    else:
        image = image.transpose(1, 0, 2)
        x_sign, y_sign = c, b
    return image[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1]


def _upright_pixel_aspect(stream: Any, frame: av.VideoFrame) -> float:
    ratio = float(stream.sample_aspect_ratio or 1)
    if not (math.isfinite(ratio) and 0.25 <= ratio <= 4):
        return 1.0  # nonsense in the file
    a, b, c, d = display_matrix(frame)
    return ratio if abs(a) + abs(d) >= abs(b) + abs(c) else 1 / ratio


def _over_white(image: np.ndarray) -> np.ndarray:
    alpha = image[..., 3:].astype(np.uint16)
    return ((image[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)


def end_with_parent(answers: int) -> None:
    """End this process, in the middle of a file too, when nobody reads the pipe `answers`: the parent has ended."""
    poll = select.poll()
    poll.register(answers, 0)  # the end of its reader is reported without being asked for
    poll.poll()
    os._exit(1)
