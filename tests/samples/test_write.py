"""Videos on disk: what comes back from the files is what went in."""

import json
import math
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from vglann_fast.errors import VglannError
from vglann_fast.run.destinations import atomic_file
from vglann_fast.samples import write
from vglann_fast.samples.write import rgb_to_yuv420, video_grid, write_gif, write_mp4, write_videos

COLORS = np.array(
    [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 255],
        [0, 0, 0],
        [200, 150, 120],
        [40, 90, 160],
        [128, 128, 128],
    ],
    np.uint8,
)


def moving_colors(frames: int, height: int, width: int) -> np.ndarray:
    """Video uint8 (3, T, H, W): broad stripes of known colors that move one pixel a frame."""
    stripe = np.arange(width)[None, :] + np.arange(frames)[:, None]  # (T, W)
    colors = COLORS[stripe * 4 // width % len(COLORS)]  # (T, W, 3)
    return np.ascontiguousarray(np.repeat(colors.transpose(2, 0, 1)[:, :, None], height, axis=2))


def random_clips(n: int, frames: int = 4, height: int = 16, width: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, channels, frames, height, width), dtype=np.uint8)


def read_video(path: Path) -> tuple[np.ndarray, Any, list[float]]:
    """(frames (T, H, W, 3) RGB, codec context, times in seconds)"""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        frames = list(container.decode(video=0))
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        return pictures, tags, [float(frame.time) for frame in frames]


def test_grid_places_clips_row_by_row() -> None:
    clips = random_clips(5, height=6, width=8)
    grid = video_grid(clips, columns=3, gap=2)
    assert grid.shape == (3, 4, 14, 28)
    for i, clip in enumerate(clips):
        top, left = i // 3 * 8, i % 3 * 10
        np.testing.assert_array_equal(grid[:, :, top : top + 6, left : left + 8], clip)
    assert (grid[:, :, 6:8] == 255).all()
    assert (grid[:, :, 8:, 20:] == 255).all()


@pytest.mark.parametrize(
    ("n", "height", "width", "columns"), [(1, 64, 64, 1), (16, 64, 64, 4), (20, 64, 128, 4), (3, 5, 7, 2)]
)
def test_grid_is_about_square_and_even(n: int, height: int, width: int, columns: int) -> None:
    grid = video_grid(np.zeros((n, 3, 1, height, width), np.uint8), gap=1)
    assert grid.shape[3] % 2 == grid.shape[2] % 2 == 0
    assert grid.shape[3] - (columns * (width + 1) - 1) in (0, 1)
    assert grid.shape[2] - (math.ceil(n / columns) * (height + 1) - 1) in (0, 1)


def test_yuv_of_known_colors() -> None:
    # White, black and red as BT.601 defines them, limited range.
    for rgb, yuv in (
        ((255, 255, 255), (235, 128, 128)),
        ((0, 0, 0), (16, 128, 128)),
        ((255, 0, 0), (81, 90, 240)),
    ):
        planes = rgb_to_yuv420(np.full((2, 2, 3), rgb, np.uint8))
        assert planes.ravel().tolist() == [yuv[0]] * 4 + list(yuv[1:])


@pytest.mark.parametrize(("height", "width", "scale"), [(64, 64, 1), (33, 47, 1), (16, 18, 4)])
def test_mp4_comes_back(tmp_path: Path, height: int, width: int, scale: int) -> None:
    video = moving_colors(12, height, width)
    write_mp4(tmp_path / "a" / "video.mp4", video, fps=24, scale=scale)
    frames, tags, times = read_video(tmp_path / "a" / "video.mp4")
    height, width = height * scale, width * scale
    assert frames.shape == (12, height + height % 2, width + width % 2, 3)
    assert times == pytest.approx([i / 24 for i in range(12)], abs=1e-4)
    assert tags == (1, 6, 1, 13)  # limited range, BT.601 matrix, sRGB primaries and transfer
    expected = video.transpose(1, 2, 3, 0).repeat(scale, 1).repeat(scale, 2)
    error = frames[:, :height, :width].astype(float) - expected
    # Chroma is halved at the edges of the stripes, so only the inside of each must be right: the median is.
    assert np.median(np.abs(error)) <= 2
    assert np.abs(error.mean((0, 1, 2))).max() < 4
    if width % 2:
        np.testing.assert_allclose(frames[:, :, -1].astype(float), frames[:, :, -2], atol=40)


def test_mp4_colors_for_a_reader_that_ignores_the_tags(tmp_path: Path) -> None:
    for color in COLORS:
        write_mp4(tmp_path / "flat.mp4", np.broadcast_to(color[:, None, None, None], (3, 3, 32, 32)))
        capture = cv2.VideoCapture(str(tmp_path / "flat.mp4"))
        read, frame = capture.read()
        capture.release()
        assert read
        assert np.abs(frame[16, 16, ::-1].astype(int) - color).max() <= 5


def test_mp4_is_the_same_each_time(tmp_path: Path) -> None:
    files = set()
    for size in (64, 16, 33, 80):
        write_mp4(tmp_path / "other", moving_colors(12, size, size))  # leaves other values in freed memory
        write_mp4(tmp_path / "small", moving_colors(8, 48, 48))
        files.add((tmp_path / "small").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize(
    ("frames", "height", "width", "fps"), [(12, 64, 64, 24), (7, 33, 47, 10), (1, 16, 16, 24)]
)
def test_gif_comes_back(tmp_path: Path, frames: int, height: int, width: int, fps: int) -> None:
    video = moving_colors(frames, height, width)
    write_gif(tmp_path / "video.gif", video, fps=fps)
    back, _, times = read_video(tmp_path / "video.gif")
    assert back.shape == (frames, height, width, 3)
    assert times == pytest.approx([i / fps for i in range(frames)], abs=0.0051)
    assert np.abs(back.astype(int) - video.transpose(1, 2, 3, 0)).max() <= 6  # few colors: all in the palette
    assert b"NETSCAPE2.0\x03\x01\x00\x00" in (tmp_path / "video.gif").read_bytes()  # repeats for ever


def test_gif_of_many_colors_is_close(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:64, 0:64]
    t = np.arange(8)[:, None, None]
    video = np.stack([(rows * 4 + 0 * t), (columns * 4 + 0 * t), (rows + columns + 8 * t)]) % 256
    write_gif(tmp_path / "video.gif", video.astype(np.uint8), scale=2)
    back, _, _ = read_video(tmp_path / "video.gif")
    assert back.shape == (8, 128, 128, 3)
    error = np.abs(back[:, ::2, ::2].astype(int) - video.transpose(1, 2, 3, 0))
    assert error.mean() < 16


BAD_VIDEOS = {
    "float": np.zeros((3, 2, 8, 8), np.float32),
    "batch": np.zeros((1, 3, 2, 8, 8), np.uint8),
    "channels last": np.zeros((2, 8, 8, 3), np.uint8),
    "no frames": np.zeros((3, 0, 8, 8), np.uint8),
}


@pytest.mark.parametrize("writer", [write_mp4, write_gif])
@pytest.mark.parametrize("video", BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_wrong_videos_are_refused(tmp_path: Path, writer: Any, video: np.ndarray) -> None:
    with pytest.raises(ValueError, match="video must be uint8"):
        writer(tmp_path / "video", video)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": math.nan}, {"scale": 0}, {"scale": 1.5}])
@pytest.mark.parametrize("writer", [write_mp4, write_gif])
def test_wrong_options_are_refused(tmp_path: Path, writer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        writer(tmp_path / "video", moving_colors(2, 16, 16), **options)
    with pytest.raises(ValueError, match="50"):
        write_gif(tmp_path / "video", moving_colors(2, 16, 16), fps=60)
    with pytest.raises(ValueError):
        video_grid(random_clips(2), columns=0)
    with pytest.raises(ValueError):
        video_grid(random_clips(2), gap=-1)
    with pytest.raises(ValueError, match="videos must be"):
        video_grid(random_clips(2)[0])


def make_streams(n: int = 3) -> dict[str, np.ndarray]:
    return {
        "original": 255 - random_clips(n),
        "foreground": random_clips(n),
        "mask": random_clips(n, channels=1),
        "background": random_clips(n)[:, :, 0],
        "latents": np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32),
    }


def test_media_folder_holds_everything(tmp_path: Path) -> None:
    videos, streams = random_clips(3), make_streams()
    record = {"psnr": math.inf, "per_clip": {"psnr": [1.5, math.nan]}, "name": "päivä"}
    folder = write_videos(tmp_path / "media" / "samples", videos, **streams, records={"samples": record})
    names = {"video.npy", "video.mp4", "video.gif", "sheet.png", "samples.json"}
    assert {file.name for file in folder.iterdir()} == names | {f"{name}.npy" for name in streams}
    for name, array in {"video": videos, **streams}.items():
        np.testing.assert_array_equal(np.load(folder / f"{name}.npy", allow_pickle=False), array)
    expected = {"psnr": None, "per_clip": {"psnr": [1.5, None]}, "name": "päivä"}
    assert json.loads((folder / "samples.json").read_text(encoding="utf-8")) == expected
    # original | reconstruction, two by two, shown eight times as large
    frames, _, _ = read_video(folder / "video.mp4")
    grid = video_grid(np.concatenate([streams["original"], videos], axis=4))
    assert frames.shape == (4, grid.shape[2] * 8, grid.shape[3] * 8, 3)
    error = frames[:, 4::8, 4::8].astype(float) - grid.transpose(1, 2, 3, 0)
    assert np.abs(error).mean() < 12
    assert read_video(folder / "video.gif")[0].shape == (4, *grid.shape[2:], 3)
    sheet = cv2.imread(str(folder / "sheet.png"))
    assert sheet.shape[0] >= 6 * 16
    assert sheet.shape[1] >= 4 * 16


def test_media_folder_without_streams(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "samples", random_clips(2))
    assert {file.name for file in folder.iterdir()} == {"video.npy", "video.mp4", "video.gif", "sheet.png"}


@pytest.mark.parametrize("name", ["original", "foreground", "mask", "background", "latents"])
def test_streams_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    for bad in (make_streams(2)[name], make_streams(3)[name].astype(np.float64)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            write_videos(tmp_path / "samples", random_clips(3), **{name: bad})
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_older_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_videos(tmp_path / "samples", random_clips(2), records={"samples": {"seed": 1}})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(path: Path, video: np.ndarray, fps: float = 24, scale: int = 1) -> None:
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_gif", full_disk)
    with pytest.raises(VglannError, match="disk is full"):
        write_videos(tmp_path / "samples", random_clips(1))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples"]
