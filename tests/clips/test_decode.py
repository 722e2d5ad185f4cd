"""decode.py: orientation, colors, odd formats, limits and bad files, on small real files."""

import fractions
import os
import signal

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

from video_files import BLUE, GRAY, GREEN, RED, gif_bytes, quadrants, write_video  # noqa: E402

from vglann_fast.clips import decode as decode_module  # noqa: E402
from vglann_fast.clips.decode import (  # noqa: E402
    DecodedVideo,
    DecodeJob,
    DecodeLimits,
    Rejected,
    decode_all,
    tile_boxes,
)
from vglann_fast.errors import UnreadableError, VglannError  # noqa: E402


def decode(tmp_path, *jobs, workers=1, **limits):
    """Results of the jobs; the arrays are copied, so the temporary files can go."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    jobs = [job if isinstance(job, DecodeJob) else DecodeJob(job) for job in jobs]
    results = []
    for result in decode_all(jobs, scratch, DecodeLimits(**limits), workers):
        if isinstance(result, DecodedVideo):
            arrays = {"tiles": np.array(result.tiles), "thumbnails": np.array(result.thumbnails)}
            result.discard()
            result = DecodedVideo(**{**vars(result), **arrays})
        results.append(result)
    assert list(scratch.iterdir()) == []  # rejected or used, no temporary file stays
    return results


def assert_near(image, expected, tolerance=4):
    difference = np.abs(image.astype(int) - np.asarray(expected, int))
    assert difference.max() <= tolerance, f"differs by up to {difference.max()}"


@pytest.mark.parametrize("mirrored", [False, True])
def test_display_matrix_is_applied(tmp_path, mirrored):
    files, expected = [], []
    for turns in range(4):

        def setup(stream, turns=turns):
            stream.set_display_rotation(90 * turns, hflip=mirrored)

        file = tmp_path / f"{turns}.mp4"
        files.append(write_video(file, [quadrants()] * 3, "libx264", "yuv420p", setup=setup))
        shown = np.rot90(quadrants(), turns)  # counter-clockwise, as in the file
        expected.append(shown[:, ::-1] if mirrored else shown)
    for result, image in zip(decode(tmp_path, *files), expected, strict=True):
        height, width = image.shape[:2]
        assert result.boxes == [[(width - 96) // 2, (height - 96) // 2, 96, 96]]
        for row, column in ((8, 8), (8, 56), (56, 8), (56, 56)):
            source = image[(height - 96) // 2 + row * 96 // 64, (width - 96) // 2 + column * 96 // 64]
            assert_near(result.tiles[1, 0, row, column], source, 12)
        assert_near(result.thumbnails[1, 4, 6], image[height // 8, width // 8], 12)


def test_odd_size_equals_area_resize_of_the_centre_square(tmp_path):
    random = np.random.default_rng(0)
    image = cv2.resize(
        random.integers(0, 255, (9, 11, 3), np.uint8), (131, 97), interpolation=cv2.INTER_CUBIC
    )
    (result,) = decode(tmp_path, write_video(tmp_path / "odd.mkv", [image] * 2))
    assert result.boxes == [[17, 0, 97, 97]]
    expected = cv2.resize(image[:, 17 : 17 + 97], (64, 64), interpolation=cv2.INTER_AREA)
    assert_near(result.tiles[0, 0], expected, 4)


@pytest.mark.parametrize(
    ("codec", "pixel_format", "colorspace"),
    [
        ("ffv1", "yuv420p10le", None),
        ("ffv1", "yuv444p12le", None),
        ("libx264", "yuv420p10le", 1),  # 1 is BT.709
        ("libx264", "yuv420p", 1),
        ("libx264", "yuv420p", None),
        ("mjpeg", "yuvj420p", None),  # full range
    ],
)
def test_colors_by_depth_matrix_and_range(tmp_path, codec, pixel_format, colorspace):
    def setup(stream):
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace

    file = write_video(tmp_path / "a.mkv", [quadrants()] * 3, codec, pixel_format, setup=setup)
    (result,) = decode(tmp_path, file)
    tile = result.tiles[2, 0]
    for (row, column), color in zip(
        [(8, 8), (8, 56), (56, 8), (56, 56)], (RED, GREEN, BLUE, GRAY), strict=True
    ):
        assert_near(tile[row, column], color, 6)


def test_variable_frame_rate_gives_the_stored_frames(tmp_path):
    images = [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(10)]
    times = [0, 1, 2, 30, 31, 90, 91, 92, 93, 200]
    (result,) = decode(tmp_path, write_video(tmp_path / "vfr.mkv", images, times=times))
    levels = result.tiles[:, 0].mean(axis=(1, 2, 3))
    assert_near(levels, [20 * i for i in range(10)], 2)


def test_gif_transparency_is_white(tmp_path):
    half = bytes([1] * 32 + [0] * 32) * 64
    (tmp_path / "a.gif").write_bytes(gif_bytes([half, half, bytes([2]) * 64 * 64], 64))
    (result,) = decode(tmp_path, tmp_path / "a.gif")
    assert result.tiles.shape == (3, 1, 64, 64, 3)
    assert_near(result.tiles[0, 0, :, :31], RED, 1)
    assert_near(result.tiles[0, 0, :, 33:], (255, 255, 255), 1)
    assert_near(result.tiles[2, 0], BLUE, 1)


def test_pixel_aspect_makes_tiles_square_on_screen(tmp_path):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(2, 1)

    file = write_video(tmp_path / "wide.mp4", [quadrants(96, 96)] * 2, "libx264", "yuv420p", setup=setup)
    (result,) = decode(tmp_path, file)
    assert result.boxes == [[24, 0, 48, 96]]


def test_folder_of_frames_in_the_given_order_with_alpha_and_16_bits(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    clear = np.zeros((64, 64, 4), np.uint8)
    deep = np.full((64, 64, 3), 100 * 257, np.uint16)
    plain = np.full((64, 64, 3), 50, np.uint8)
    for name, image in (("f1.png", plain), ("f2.png", deep), ("f10.png", clear)):
        cv2.imwrite(str(folder / name), image)
    (result,) = decode(tmp_path, DecodeJob(folder, ("f1.png", "f2.png", "f10.png")))
    assert_near(result.tiles[:, 0].mean(axis=(1, 2, 3)), [50, 100, 255], 1)


def test_window_and_most_frames(tmp_path):
    images = [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(10)]
    file = write_video(tmp_path / "a.mkv", images)
    window, cut, whole = decode(
        tmp_path,
        DecodeJob(file, first_frame=2, last_frame=4),
        DecodeJob(file, first_frame=3),
        file,
        max_frames=7,
    )
    assert_near(window.thumbnails.mean(axis=(1, 2, 3)), [40, 60, 80], 2)
    assert not window.truncated
    assert (len(cut.tiles), cut.truncated) == (7, False)
    assert (len(whole.tiles), whole.truncated) == (7, True)


def test_tile_boxes():
    assert tile_boxes(1280, 720, 1) == [[280, 0, 720, 720]]
    six = tile_boxes(1280, 720, 2)
    assert six[0] == [100, 0, 360, 360]
    assert six[-1] == [820, 360, 360, 360]
    assert len(six) == 6
    assert tile_boxes(720, 1280, 1) == [[0, 280, 720, 720]]
    assert tile_boxes(100, 720, 2) == [[0, 260, 100, 100], [0, 360, 100, 100]]
    assert tile_boxes(640, 1, 2) == []
    for width, height, tiles, aspect in ((97, 31, 3, 1.0), (176, 144, 2, 128 / 117), (30, 500, 4, 0.5)):
        covered = np.zeros((height, width), int)
        for x, y, w, h in tile_boxes(width, height, tiles, aspect):
            assert min(x, y, width - x - w, height - y - h) >= 0
            assert abs(w * aspect - h) <= max(1.0, aspect)
            covered[y : y + h, x : x + w] += 1
        assert covered.max() == 1  # disjoint


def bad_files(tmp_path):
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(40)]
    start = {"movflags": "faststart"}
    mp4 = write_video(tmp_path / "whole.mp4", images, "libx264", "yuv420p", options=start).read_bytes()
    end = write_video(tmp_path / "end.mp4", images, "libx264", "yuv420p").read_bytes()
    mkv = write_video(tmp_path / "whole.mkv", images, "libx264", "yuv420p").read_bytes()
    for name in ("whole.mp4", "end.mp4", "whole.mkv"):
        (tmp_path / name).unlink()
    content = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"Dear diary, this is not a video.\n" * 50, "cannot be read"),
        "playlist.mp4": (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "cannot be read"),
        "cut off.mp4": (mp4[: len(mp4) * 6 // 10], "cut off"),
        "no index.mp4": (end[: len(end) * 6 // 10], "cannot be read"),
        "cut off.mkv": (mkv[: len(mkv) * 6 // 10], "cut off"),
        "huge.gif": (gif_bytes([bytes(100)] * 3, 10, screen=30_000), ""),
        "huge.y4m": (b"YUV4MPEG2 W30000 H30000 F25:1 C420\n" + b"FRAME\n" * 3, ""),
        "negative.y4m": (b"YUV4MPEG2 W-5 H0 F0:0 C420\nFRAME\n", ""),
        "one frame.gif": (gif_bytes([bytes([1]) * 64 * 64], 64), "only 1 frame"),
    }
    expected = {}
    for name, (data, reason) in content.items():
        (tmp_path / name).write_bytes(data)
        expected[tmp_path / name] = reason
    expected[write_video(tmp_path / "tiny.mkv", [quadrants(16, 16)] * 3)] = "too small"
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    expected[tmp_path / "sound.mp4"] = "no video stream"
    os.mkfifo(tmp_path / "pipe.mp4")
    expected[tmp_path / "pipe.mp4"] = "not a regular file"
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    expected[tmp_path / "loop.mp4"] = "does not exist"
    expected[tmp_path / "missing\nline.mp4"] = "does not exist"
    if os.geteuid():  # root may read everything
        (tmp_path / "secret.mp4").write_bytes(mp4)
        (tmp_path / "secret.mp4").chmod(0)
        expected[tmp_path / "secret.mp4"] = "denied"
    return expected


def test_bad_files_are_rejected_with_a_reason(tmp_path):
    expected = bad_files(tmp_path)
    good = write_video(tmp_path / "good.mkv", [quadrants()] * 3)
    *results, last = decode(tmp_path, *expected, good, workers=2, seconds=30)
    for path, result in zip(expected, results, strict=True):
        assert isinstance(result, Rejected), path.name
        assert expected[path] in result.reason, path.name
        assert result.reason
        assert "\n" not in result.reason
        assert str(tmp_path) not in result.reason
    assert len(last.tiles) == 3


def test_bad_frame_in_a_folder_is_named(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    cv2.imwrite(str(folder / "1.png"), quadrants())
    (folder / "2.png").write_text("no picture")
    (result,) = decode(tmp_path, DecodeJob(folder, ("1.png", "2.png")))
    assert isinstance(result, Rejected)
    assert result.reason.startswith("2.png c")


def test_frame_size_must_not_change(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for name, side in (("1.png", 64), ("2.png", 64), ("3.png", 96)):
        cv2.imwrite(str(folder / name), np.full((side, side, 3), 9, np.uint8))
    (result,) = decode(tmp_path, DecodeJob(folder, ("1.png", "2.png", "3.png")))
    assert result.reason == "the frame size changes at frame 2"


def test_pixel_limit(tmp_path):
    file = write_video(tmp_path / "a.mkv", [quadrants()] * 3)
    rejected, _ = decode(tmp_path, file, file, max_pixels=128 * 96 - 1)
    assert isinstance(rejected, Rejected)
    assert isinstance(decode(tmp_path, file, max_pixels=128 * 96)[0], DecodedVideo)


def test_memory_limit(tmp_path):
    large = write_video(tmp_path / "large.mkv", [quadrants(2000, 3000)] * 3)
    small = write_video(tmp_path / "small.mkv", [quadrants()] * 3)
    rejected, good = decode(tmp_path, large, small, memory_mb=60, seconds=60)
    assert isinstance(rejected, Rejected)
    assert "memory" in rejected.reason
    assert len(good.tiles) == 3
    assert isinstance(decode(tmp_path, large)[0], DecodedVideo)


@pytest.fixture
def children(monkeypatch):
    """The decoding processes started; `children.signal` is sent to the first as it starts."""

    class Children(list):
        signal = 0

    started = Children()
    popen = decode_module.subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        if len(started) == 1:
            started[0].send_signal(started.signal)
        return started[-1]

    monkeypatch.setattr(decode_module.subprocess, "Popen", start)
    return started


def test_child_that_hangs_is_killed(tmp_path, children):
    children.signal = signal.SIGSTOP
    file = write_video(tmp_path / "a.mkv", [quadrants()] * 3)
    first, _ = decode(tmp_path, file, file, seconds=0.7)
    assert isinstance(first, Rejected)
    assert first.reason == "decoding took more than 0.7 s"
    assert len(children) == 2  # the second file never reads the late answer to the first
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


def opening_in_child(monkeypatch, folder, statement):
    """Let a decoding process run `statement` when it opens the file a.mkv."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import errno, os, pathlib, signal\n"
        "opened = pathlib.Path.open\n"
        "def changed(path, *arguments, **options):\n"
        f"    if path.name == 'a.mkv': {statement}\n"
        "    return opened(path, *arguments, **options)\n"
        "pathlib.Path.open = changed\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_child_that_dies_is_replaced(tmp_path, monkeypatch, children):
    opening_in_child(monkeypatch, tmp_path / "changed", "os.kill(os.getpid(), signal.SIGSEGV)")
    files = [write_video(tmp_path / f"{name}.mkv", [quadrants()] * 3) for name in "ab"]
    first, second = decode(tmp_path, *files)
    assert isinstance(first, Rejected)
    assert first.reason == "the decoder crashed (signal 11)"
    assert len(second.tiles) == 3
    assert len(children) == 2


@pytest.mark.parametrize("moment", ["as it starts", "at work"])
def test_child_that_is_killed_for_memory_is_not_blamed_on_the_video(tmp_path, monkeypatch, children, moment):
    """Linux kills with signal 9 when memory runs out."""
    if moment == "at work":
        opening_in_child(monkeypatch, tmp_path / "changed", "os.kill(os.getpid(), signal.SIGKILL)")
    else:
        children.signal = signal.SIGKILL
    file = write_video(tmp_path / "a.mkv", [quadrants()] * 3)
    with pytest.raises(VglannError, match=r"a\.mkv.*memory.*--workers"):
        decode(tmp_path, file)


@pytest.mark.parametrize("name", ["EBUSY", "ESTALE", "ETIMEDOUT"])
def test_file_that_cannot_be_read_now_is_not_rejected(tmp_path, monkeypatch, name):
    opening_in_child(monkeypatch, tmp_path / "changed", f"raise OSError(errno.{name}, 'not now', str(path))")
    file = write_video(tmp_path / "a.mkv", [quadrants()] * 3)
    with pytest.raises(UnreadableError, match=r"a\.mkv.*not now"):
        decode(tmp_path, file)


def test_closing_early_kills_the_children(tmp_path, children):
    file = write_video(tmp_path / "a.mkv", [quadrants()] * 3)
    results = decode_all([DecodeJob(file)] * 6, tmp_path, DecodeLimits(), 2)
    next(results)
    results.close()
    assert children
    assert all(child.returncode is not None for child in children)


def test_full_disk_is_not_blamed_on_the_video(tmp_path):
    file = write_video(tmp_path / "a.mkv", [quadrants()] * 3)
    (tmp_path / "0.tiles").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        list(decode_all([DecodeJob(file)], tmp_path, DecodeLimits(), 1))


def test_limits_are_checked():
    for field in ("seconds", "memory_mb", "max_frames", "max_pixels"):
        for value in (0, -1, float("nan"), float("inf")):
            with pytest.raises(VglannError, match=field):
                DecodeLimits(**{field: value})
