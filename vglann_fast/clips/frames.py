"""Video files and images -> upright RGB frames, with PyAV; used by the decoding process (`decode_child.py`) alone.

FFmpeg gets an open file, never a name: some of its demuxers read a name as a pattern, and some open other files
beside the one they are given. Metadata and side data that do not concern pixels are never looked at, since a type
or a text that PyAV does not understand would cost the video.
"""

import enum
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import cv2
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

from vglann_fast.clips.truncation import truncation

Matrix = tuple[float, float, float, float]
UPRIGHT: Matrix = (1.0, 0.0, 0.0, 1.0)
# FFmpeg's own decoders of these leave the transparency out, which is a second stream inside the packets.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_HEIF_BRANDS = ("avif", "avis", "heic", "heix", "hevc", "hevx", "mif1", "msf1")
_ATTACHED_PICTURE = 1024  # AV_DISPOSITION_ATTACHED_PIC


class Unusable(Exception):
    """The file cannot be used; the message is the reason."""


def _unknown_type(cls: type, value: int) -> enum.Enum:
    member: Any = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


# PyAV's list of side data lags FFmpeg's; one type that it lacks makes all side data of a frame raise ValueError.
setattr(Type, "_missing_", classmethod(_unknown_type))  # noqa: B010


class Frame:
    """A decoded frame, converted only when asked for: skipped frames cost decoding alone."""

    def __init__(
        self, frame: av.VideoFrame, matrix: Matrix, reformatter: VideoReformatter, premultiplied: bool
    ) -> None:
        self._frame = frame
        self._matrix = matrix
        self._reformatter = reformatter
        self._premultiplied = premultiplied

    def rgb(self) -> np.ndarray:
        """uint8 (H, W, 3). Raises Unusable for colors that FFmpeg cannot convert."""
        alpha = self._frame.format.has_palette or any(c.is_alpha for c in self._frame.format.components)
        pixel_format = "rgba" if alpha else "rgb24"
        try:
            frame = self._reformatter.reformat(self._frame, format=pixel_format, threads=1)
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            colors = f"pixel format {self._frame.format.name}, color matrix {int(self._frame.colorspace)}"
            raise Unusable(f"has colors that cannot be converted to RGB ({colors})") from error
        image = frame.to_ndarray()
        return upright(_over_white(image, self._premultiplied) if alpha else image, self._matrix)


def file_frames(path: Path, max_pixels: int, reformatter: VideoReformatter) -> Iterator[tuple[Frame, float]]:
    """The frames of a video or an image in order of display, each with its pixel aspect.

    Raises Unusable where the file is damaged or ends before it should.
    """
    # No protocol is allowed, so a playlist leads nowhere. max_pixels also holds while the file is probed, and for a
    # stream that grows on the way.
    options = {"protocol_whitelist": "none", "max_pixels": str(max_pixels)}
    # A descriptor, because PyAV hands on the name of a file object.
    with (
        os.fdopen(os.open(path, os.O_RDONLY), "rb", buffering=0) as file,
        av.open(file, options=options, metadata_errors="replace", buffer_size=2**16) as container,
    ):
        stream = _best_video(container)
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            raise Unusable(f"declares frames of {width}x{height}, more than {max_pixels} pixels")
        with path.open("rb") as whole:
            reason = truncation(whole, container.format.name)
            tags = _tiff_tags(whole) if container.format.name == "tiff_pipe" else {}
        if reason:
            raise Unusable(reason)
        decoded = _decoded(container, stream, max_pixels)
        if tags.get(_COMPRESSION) in _JPEG or tags.get(_PHOTOMETRIC) == _YCBCR:
            decoded = _decoded_by_opencv(path)
        for frame, matrix in decoded:
            premultiplied = tags.get(_EXTRA_SAMPLES) == _ASSOCIATED
            yield Frame(frame, matrix, reformatter, premultiplied), _pixel_aspect(stream, matrix)


def _best_video(container: Any) -> Any:
    """The video stream to decode. Raises Unusable where there is none, or its transparency would be lost."""
    videos = [stream for stream in container.streams.video if not _is_picture(stream)]
    best = container.streams.best("video")
    stream = best if best in videos or not videos else videos[0]
    if stream is None:
        raise Unusable("has no video stream")
    if stream.codec_context is None:
        raise Unusable("is in a codec that cannot be decoded here")
    # An alpha plane of HEIF and AVIF is a gray video beside the one in color.
    beside = [video.codec_context for video in videos if video is not stream and video.codec_context]
    heif = container.metadata.get("major_brand", "").strip() in _HEIF_BRANDS
    if heif and any((context.pix_fmt or "").startswith("gray") for context in beside):
        raise Unusable("is transparent by a track of its own, which is not read")
    return stream


def _is_picture(stream: Any) -> bool:
    """Return True for cover art and posters, which are videos of one frame to FFmpeg."""
    if stream.frames == 1:
        return True
    try:
        return bool(int(stream.disposition) & _ATTACHED_PICTURE)
    except ValueError:  # a disposition that PyAV does not know
        return False


def _decoded(container: Any, stream: Any, max_pixels: int) -> Iterator[tuple[av.VideoFrame, Matrix]]:
    count, matrix = 0, UPRIGHT
    decoder = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise Unusable(f"is damaged or cut off after frame {count}")
        try:
            if decoder is None:
                decoder, matrix = _decoder(stream, packet, max_pixels)
            elif decoder is stream.codec_context and _has_alpha(stream, packet):
                raise Unusable(f"becomes transparent at frame {count}, which is not read")
            frames = decoder.decode(packet)
        except (av.error.InvalidDataError, EOFError) as error:
            raise Unusable(f"cannot be decoded after frame {count}") from error
        for frame in frames:
            if frame.is_corrupt:
                raise Unusable(f"is damaged at frame {count}")
            count += 1
            # A matrix in the stream of pictures may come with the first alone.
            matrix = display_matrix(frame) or matrix
            yield frame, matrix


def _decoder(stream: Any, packet: Any, max_pixels: int) -> tuple[Any, Matrix]:
    """The decoder that also decodes the transparency, and the display matrix that it would not know of."""
    native = stream.codec_context
    native.options = {"max_pixels": str(max_pixels)}
    name = _ALPHA_DECODERS.get(native.name)
    declared = {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1"
    if name is None or not (declared or _has_alpha(stream, packet)):
        native.thread_type, native.thread_count = "AUTO", 2
        return native, UPRIGHT
    native.thread_count = 1  # so that the frame comes at once
    matrices = [display_matrix(frame) for frame in native.decode(packet)]
    try:
        decoder = av.CodecContext.create(name, "r")
    except (ValueError, av.error.FFmpegError) as error:
        raise Unusable(f"is transparent, and this FFmpeg has no {name} to decode that") from error
    decoder.options = {"max_pixels": str(max_pixels)}
    decoder.thread_count = 2
    return decoder, next(filter(None, matrices), UPRIGHT)


def _has_alpha(stream: Any, packet: Any) -> bool:
    """Return True for a packet of VP8 or VP9 with transparency: the block addition of id 1."""
    addition = "matroska_block_additional"
    if stream.codec_context.name not in _ALPHA_DECODERS or not packet.has_sidedata(addition):
        return False
    return bytes(packet.get_sidedata(addition))[:8] == (1).to_bytes(8, "big")


def display_matrix(frame: Any) -> Matrix | None:
    """(a, b, c, d) of the frame's display matrix, None without one: a stored pixel x, y is shown at x a + y c,
    x b + y d.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None or len(bytes(side_data)) < 20:
        return None
    values = np.frombuffer(bytes(side_data), "=i4", 5).astype(float)
    return (values[0], values[1], values[3], values[4])


def upright(image: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Turn and mirror an image (H, W, 3) as the display matrix says, to the nearest right angle."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        x_sign, y_sign = a, d
    else:
        image = image.transpose(1, 0, 2)
        x_sign, y_sign = c, b
    return image[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1]


def _pixel_aspect(stream: Any, matrix: Matrix) -> float:
    """Pixel width over height, of the upright frame."""
    ratio = float(stream.sample_aspect_ratio or 1)
    if not (math.isfinite(ratio) and 0.25 <= ratio <= 4):
        return 1.0  # nonsense in the file
    a, b, c, d = matrix
    return ratio if abs(a) + abs(d) >= abs(b) + abs(c) else 1 / ratio


def _over_white(image: np.ndarray, premultiplied: bool) -> np.ndarray:
    alpha = image[..., 3:].astype(np.uint16)
    if premultiplied:
        return np.minimum(image[..., :3] + (255 - alpha), 255).astype(np.uint8)
    return ((image[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)


# Of TIFF 6.0. FFmpeg reads neither JPEG inside TIFF nor the range of YCbCr right, and says nothing.
_COMPRESSION, _PHOTOMETRIC, _EXTRA_SAMPLES = 259, 262, 338
_JPEG, _YCBCR, _ASSOCIATED = (6, 7), 6, 1


def _tiff_tags(file: BinaryIO) -> dict[int, int]:
    """The first value of each tag of a TIFF's first image that has one of 16 bits."""
    file.seek(0)
    head = file.read(8)
    order: Any = "little" if head[:2] == b"II" else "big"
    file.seek(int.from_bytes(head[4:8], order))
    count = int.from_bytes(file.read(2), order)
    entries = [file.read(12) for _ in range(count)]
    return {int.from_bytes(entry[:2], order): int.from_bytes(entry[8:10], order) for entry in entries}


def _decoded_by_opencv(path: Path) -> Iterator[tuple[av.VideoFrame, Matrix]]:
    """An image, which OpenCV turns upright by itself."""
    image: Any = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise Unusable("cannot be decoded")
    yield av.VideoFrame.from_ndarray(image, "rgb24"), UPRIGHT
