"""Videos on disk: the array, an MP4, a GIF and a contact sheet of the same clips.

A media folder (`write_videos`) holds, all uint8 RGB unless said otherwise:

    video.npy        (n, 3, T, H, W)   the clips
    original.npy     (n, 3, T, H, W)   what they reconstruct, same order            (if given)
    foreground.npy   (n, 3, T, H, W)   the moving stream                            (if given)
    mask.npy         (n, 1, T, H, W)   255 where the foreground shows               (if given)
    background.npy   (n, 3, H, W)      the still stream                             (if given)
    latents.npy      (n, d) float32    the latents they were decoded from           (if given)
    <name>.json      what the caller has to say about them                          (if given)
    video.mp4        a grid of the clips; with originals, each cell is original | clip
    video.gif        the same grid, for places that play no video
    sheet.png        a row of frames per clip; with originals, each clip's row lies under its original's

Colors. H.264 stores luma and subsampled chroma, and a player that assumes the wrong matrix shifts every hue.
The MP4 is BT.601, limited range, and tagged so: players that read the tags are right, and so are those that
ignore them, because BT.601 is what they assume for small pictures. Primaries and transfer are tagged sRGB,
which is what the clips are.
"""

import json
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vglann_fast.errors import VglannError
from vglann_fast.run.destinations import atomic_dir, atomic_file

if TYPE_CHECKING:
    from av import VideoFrame

WHITE = 255
VIDEO_FILE = "video.npy"  # written last, see `atomic_dir`
_ARRAYS = ("video", "original", "foreground", "mask", "background", "latents")
# Code points of ITU-T H.273, which H.264 and MP4 share.
_LIMITED_RANGE, _MATRIX_BT601, _PRIMARIES_BT709, _TRANSFER_SRGB = 1, 6, 1, 13
# BT.601 luma and chroma of R'G'B' in 0..255, times 2^16: whole numbers give the same file on every machine.
_RGB_TO_YCBCR = np.rint(
    np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) * 65536 / 255
).astype(np.int32)
# x264 looks ahead in pictures shrunk to half their size; for small videos it reads memory nobody wrote,
# so that the file differed from run to run. Without that analysis it depends on the video alone.
_SAME_FILE_EACH_TIME = "rc-lookahead=0:b-adapt=0:scenecut=0:weightp=0"


def video_grid(videos: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay clips out in a grid, row by row, with white gaps between them.

    Args:
        videos: uint8 (n, 3, T, H, W), n >= 1.
        columns: clips per row; default: as many as make the grid about square.
        gap: pixels between clips, >= 0.

    Returns:
        uint8 (3, T, H', W'); H' and W' are even: a last white row or column fills up.

    Raises ValueError for another dtype or shape, or columns < 1 or gap < 0.
    """
    _check_array("videos", videos, (None, 3, None, None, None))
    n, _, frames, height, width = videos.shape
    if columns is None:
        columns = min(n, math.ceil(math.sqrt(n * height / width)))
    if columns < 1 or gap < 0:
        raise ValueError(f"columns must be at least 1 and gap at least 0, got {columns} and {gap}")
    rows = math.ceil(n / columns)
    grid_height = rows * (height + gap) - gap
    grid_width = columns * (width + gap) - gap
    grid = np.full((3, frames, grid_height + grid_height % 2, grid_width + grid_width % 2), WHITE, np.uint8)
    for i, video in enumerate(videos):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, :, top : top + height, left : left + width] = video
    return grid


def write_mp4(path: str | Path, video: np.ndarray, fps: float = 24, scale: int = 1) -> None:
    """Write one video as H.264 4:2:0 (plays everywhere), whole or not at all.

    Args:
        path: destination; parent folders are made.
        video: uint8 (3, T, H, W). An odd side grows by one pixel, a copy of its edge: 4:2:0 needs even sides.
        fps: frames per second, > 0.
        scale: whole-number enlargement by repeating pixels, >= 1. From 2 on, no chroma is lost.

    Raises ValueError for another dtype, shape, fps or scale; `VglannError` when the disk is full or PyAV is
    missing.
    """
    frames = _frames(video, fps, scale)
    av = _import_av()
    height, width = frames.shape[1:3]
    with atomic_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        options = {"crf": "17", "preset": "medium", "x264-params": _SAME_FILE_EACH_TIME}
        stream = container.add_stream("libx264", rate=_rate(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # x264's output depends on the number of threads
        context.color_range, context.colorspace = _LIMITED_RANGE, _MATRIX_BT601
        context.color_primaries, context.color_trc = _PRIMARIES_BT709, _TRANSFER_SRGB
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(rgb_to_yuv420(picture), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rgb_to_yuv420(picture: np.ndarray) -> np.ndarray:
    """BT.601 limited-range planar 4:2:0 of an RGB picture.

    Args:
        picture: uint8 (H, W, 3), any sides; an odd one is made even by repeating its edge.

    Returns:
        uint8 (3/2·H, W), H and W even: the Y plane (16..235), then quarter planes Cb and Cr (16..240), each
        chroma sample the mean of 2x2 pixels. The layout PyAV calls yuv420p.
    """
    height, width = picture.shape[:2]
    picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    height, width = picture.shape[:2]
    ycbcr = (
        picture.astype(np.int32) @ _RGB_TO_YCBCR.T
    )  # (H, W, 3), times 2^16, without the offsets 16 and 128
    luma = (ycbcr[..., 0] + (16 << 16) + (1 << 15)) >> 16  # (H, W), rounded
    chroma = ycbcr[..., 1:].reshape(height // 2, 2, width // 2, 2, 2).sum((1, 3), dtype=np.int32)
    chroma = (chroma + (128 << 18) + (1 << 17)) >> 18  # (H/2, W/2, 2), of sums of four
    samples = np.concatenate([luma.ravel(), chroma[..., 0].ravel(), chroma[..., 1].ravel()])
    return samples.astype(np.uint8).reshape(height * 3 // 2, width)


def write_gif(path: str | Path, video: np.ndarray, fps: float = 24, scale: int = 1) -> None:
    """Write one video as an endless GIF with a palette made for it, whole or not at all.

    256 colors chosen from all frames, ordered dither: its pattern stands still, so flat areas do not shimmer
    and compress well. A GIF counts time in hundredths of a second: each frame begins within 5 ms of its time.

    Args and errors as `write_mp4`; sides may be odd. fps at most 50: players slow faster ones down.
    """
    content = gif_bytes(video, fps, scale)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def gif_bytes(video: np.ndarray, fps: float = 24, scale: int = 1) -> bytes:
    """Return the content of the file that `write_gif` writes. Args and errors as there."""
    frames = _frames(video, fps, scale)
    if fps > 50:
        raise ValueError(f"fps of a GIF must be at most 50, got {fps}")
    av = _import_av()
    height, width = frames.shape[1:3]
    file = BytesIO()
    with av.open(file, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=_rate(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for frame in _with_palette(frames, 1 / _rate(fps)):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _with_palette(frames: np.ndarray, time_base: Fraction) -> "Iterator[VideoFrame]":
    """The frames (T, H, W, 3) in FFmpeg's pal8, with one palette for all of them."""
    import av
    import av.filter

    graph = av.filter.Graph()
    height, width = frames.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=time_base)
    split, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0:stats_mode=full")
    apply, sink = graph.add("paletteuse", "dither=bayer:bayer_scale=4"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(apply, 1, 0)
    palette.link_to(apply, 0, 1)
    apply.link_to(sink)
    graph.configure()
    for i, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = i, time_base
        graph.vpush(frame)
    graph.vpush(None)
    for _ in range(len(frames)):
        yield graph.vpull()


def write_videos(
    folder: str | Path,
    videos: np.ndarray,
    *,
    original: np.ndarray | None = None,
    foreground: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    background: np.ndarray | None = None,
    latents: np.ndarray | None = None,
    records: Mapping[str, Any] | None = None,
    fps: float = 24,
) -> Path:
    """Write a media folder (see the top of this file), whole or not at all; an older one is replaced.

    Args:
        folder: destination, e.g. `runs/0001/media/samples`.
        videos: uint8 (n, 3, T, H, W), n >= 1.
        original, foreground: uint8, the shape of `videos`.
        mask: uint8 (n, 1, T, H, W).
        background: uint8 (n, 3, H, W).
        latents: float32 (n, d).
        records: name -> what `<name>.json` holds, e.g. {"samples": {...}}. JSON has no NaN or infinity: they
            become null.
        fps: frames per second of the MP4 and the GIF.

    Returns the folder. Raises ValueError for a wrong dtype or shape; `VglannError` when the disk is full or a
    needed package is missing.
    """
    _check_array("videos", videos, (None, 3, None, None, None))
    n, _, frames, height, width = videos.shape
    arrays = {"video": videos}
    for name, array, shape in (
        ("original", original, videos.shape),
        ("foreground", foreground, videos.shape),
        ("mask", mask, (n, 1, frames, height, width)),
        ("background", background, (n, 3, height, width)),
    ):
        if array is not None:
            _check_array(name, array, shape)
            arrays[name] = array
    if latents is not None:
        _check_array("latents", latents, (n, None), np.float32)
        arrays["latents"] = latents
    with atomic_dir(folder, VIDEO_FILE, [f"{name}.npy" for name in _ARRAYS]) as temporary:
        for name, array in arrays.items():
            _save_array(temporary / f"{name}.npy", array)
        for name, record in (records or {}).items():
            text = json.dumps(finite(record), indent=1, allow_nan=False)
            (temporary / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        _write_pictures(temporary, videos, original, fps)
    return Path(folder)


def _save_array(path: Path, array: np.ndarray) -> None:
    """Write what `np.save` writes, which raises an error without a number where the disk is full."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _write_pictures(folder: Path, videos: np.ndarray, original: np.ndarray | None, fps: float) -> None:
    from vglann_fast.clips.sheet import contact_sheet, write_png

    cells, rows = videos, videos
    if original is not None:
        cells = np.concatenate([original, videos], axis=4)  # (n, 3, T, H, 2W): original | clip
        rows = np.stack([original, videos], axis=1).reshape(-1, *videos.shape[1:])  # (2n, ...): in turn
    grid = video_grid(cells)
    enlarge = max(1, 128 // min(videos.shape[3:]))  # small clips are hard to see on today's screens
    write_mp4(folder / "video.mp4", grid, fps, scale=enlarge)
    write_gif(folder / "video.gif", grid, min(fps, 50))
    write_png(folder / "sheet.png", contact_sheet(rows))


def _check_array(
    name: str, array: np.ndarray, shape: tuple[int | None, ...], dtype: type[np.generic] = np.uint8
) -> None:
    """Raise ValueError unless `array` has that dtype and shape; None in `shape`: any size above 0."""
    fits = len(array.shape) == len(shape) and all(
        size == wanted if wanted is not None else size > 0
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} must be {np.dtype(dtype)} of shape ({expected}), got {array.dtype} {array.shape}"
        )


def _frames(video: np.ndarray, fps: float, scale: int) -> np.ndarray:
    """Check one video (3, T, H, W) and return it as C-contiguous pictures (T, scale·H, scale·W, 3)."""
    _check_array("video", video, (3, None, None, None))
    if not 0 < fps < math.inf or int(scale) != scale or scale < 1:
        raise ValueError(f"fps must be positive and scale a whole number from 1 on, got {fps} and {scale}")
    pictures = video.transpose(1, 2, 3, 0)
    return np.ascontiguousarray(pictures.repeat(scale, axis=1).repeat(scale, axis=2))


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def finite(value: Any) -> Any:
    """A copy of JSON-able data with NaN and infinities replaced by None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise VglannError("writing videos needs PyAV: pip install 'vglann-fast[video]'") from error
    return av
