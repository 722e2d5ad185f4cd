"""strips.py: the MIT videos' form, against recorded output of the paper's author's loader."""

import json
import os

import numpy as np
import pytest
from golden_data import golden, seeded_state

cv2 = pytest.importorskip("cv2")
pytest.importorskip("av")

from vglann_fast.clips.dataset import ClipSet  # noqa: E402
from vglann_fast.clips.pack import pack  # noqa: E402
from vglann_fast.clips.sources import find_sources  # noqa: E402
from vglann_fast.clips.strips import NotAStrip, frame_numbers, is_strip, read_strip, strip_frames  # noqa: E402
from vglann_fast.errors import VglannError  # noqa: E402

JPEG_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 92]


def strip_picture(frames: int, seed: int = 0, extra_rows: int = 0) -> np.ndarray:
    """A bright square crosses a colored field: uint8 BGR (frames * 128 + extra_rows, 128, 3)."""
    random = np.random.default_rng(seed)
    picture = np.empty((frames * 128 + extra_rows, 128, 3), np.uint8)
    picture[:] = random.integers(0, 120, 3)
    color = random.integers(130, 256, 3)
    for t in range(frames):
        top, left = t * 128 + 40, 2 + 2 * t % 80
        picture[top : top + 40, left : left + 40] = color
    return picture


def write_strip(path, frames, seed=0, extra_rows=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), strip_picture(frames, seed, extra_rows), JPEG_QUALITY)
    return path


def half(frames: np.ndarray) -> np.ndarray:
    """Halve (n, 128, 128, 3) by the rounded mean of 2x2, in whole numbers -> (n, 64, 64, 3)."""
    sums = frames.reshape(-1, 64, 2, 64, 2, 3).astype(int).sum((2, 4))
    return ((sums + 2) >> 2).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "rows", "frames"),
    [
        ("n40", 40 * 128, [0, 31]),
        ("n20", 20 * 128, [0, 4, 5, 6, 19, 31]),
        ("n5half", 5 * 128 + 64, [0, 4, 5, 6, 19, 31]),
    ],
)
def test_frames_and_resize_are_the_authors_bit_for_bit(name, rows, frames):
    key = "n5" if name == "n5half" else name
    strip = seeded_state.integers(f"dl.{key}", (rows, 128, 3), 256).astype(np.uint8)
    numbers = frame_numbers(0, 32, 1, len(strip_frames(strip)))[frames]
    expected = golden("data_loader")[f"{name}.frames_{'_'.join(map(str, frames))}"].numpy()
    chosen = strip_frames(strip)[numbers]
    resized = [cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA) for frame in chosen]
    np.testing.assert_array_equal(np.stack(resized).transpose(0, 3, 1, 2), expected)
    np.testing.assert_array_equal(half(chosen), np.stack(resized))


def test_packed_strips_are_their_frames_in_rgb(tmp_path):
    """Of 40, 20 and 5.5 frames: 32 of the first, the others with the last repeated."""
    lengths = {"a10.jpg": (20, 0), "a2.jpg": (40, 0), "b.jpeg": (5, 64)}
    for seed, (name, (frames, rows)) in enumerate(lengths.items()):
        write_strip(tmp_path / "golf" / name, frames, seed, rows)
    report = pack(tmp_path / "golf", tmp_path / "clips", min_motion=0.2)
    clips = ClipSet.open(tmp_path / "clips")
    assert (report.clips, report.sources, report.shots) == (3, 3, 3)
    assert [clips.sources[c["source"]]["name"] for c in clips.clips] == ["a2.jpg", "a10.jpg", "b.jpeg"]
    assert [source["frames"] for source in clips.sources] == [40, 20, 7]
    for clip, pixels in zip(clips.clips, clips.read(), strict=True):
        bgr = cv2.imread(str(tmp_path / "golf" / clips.sources[clip["source"]]["name"]))
        frames = strip_frames(bgr)
        expected = half(frames[np.minimum(np.arange(32), len(frames) - 1)])[..., ::-1]  # BGR -> RGB
        np.testing.assert_array_equal(pixels, expected.transpose(3, 0, 1, 2))
        assert (clip["shot"], clip["first_frame"], clip["crop"]) == (0, 0, [0, 0, 128, 128])


def test_a_list_file_names_the_strips(tmp_path):
    """As the data set comes: folders of one strip each, and a list that takes some of them in its order."""
    for number in range(3):
        write_strip(tmp_path / "golf" / f"video{number}" / "0001.jpg", 12, number)
    listed = tmp_path / "golf.txt"
    listed.write_text("golf/video2/0001.jpg\n\ngolf/video0/0001.jpg\r\n")
    pack(listed, tmp_path / "listed", frames=8)
    pack(tmp_path / "golf", tmp_path / "all", frames=8)
    some, whole = ClipSet.open(tmp_path / "listed"), ClipSet.open(tmp_path / "all")
    assert some.ids == [whole.ids[2], whole.ids[0]]
    np.testing.assert_array_equal(some.read(), whole.read([2, 0]))
    for text, message in (("golf/none.jpg\n", "golf/none.jpg"), ("", "no files"), (b"\xff\xfe", "list")):
        listed.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(VglannError, match=message):
            pack(listed, tmp_path / "none")


def test_starts_and_stride_within_a_strip(tmp_path):
    write_strip(tmp_path / "a.jpg", 20)
    pack(tmp_path / "a.jpg", tmp_path / "clips", frames=4, stride=2, start_every=6)
    clips = ClipSet.open(tmp_path / "clips")
    frames = half(strip_frames(cv2.imread(str(tmp_path / "a.jpg"))))[..., ::-1]
    assert [clip["first_frame"] for clip in clips.clips] == [0, 6, 12]
    expected = frames[[12, 14, 16, 18]].transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(clips.read([2])[0], expected)


def test_what_is_a_strip(tmp_path):
    assert is_strip(write_strip(tmp_path / "a.jpg", 4))
    assert not is_strip(write_strip(tmp_path / "short.jpg", 3))  # may well be a portrait picture
    cv2.imwrite(str(tmp_path / "wide.jpg"), np.zeros((640, 136, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "a.png"), strip_picture(4))
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:20])
    for name in ("wide.jpg", "a.png", "text.jpg", "torn.jpg", "missing.jpg"):
        assert not is_strip(tmp_path / name), name
    # Frames of a video, as images, are still one video.
    for number in range(4):
        cv2.imwrite(str(tmp_path / "frames" / f"{number}.jpg"), strip_picture(1)) if number else os.mkdir(
            tmp_path / "frames"
        )
    (source,) = find_sources(tmp_path / "frames")
    assert not source.strip
    assert len(source.frame_files) == 3


def test_bad_strips_are_rejected_with_a_reason(tmp_path):
    whole = write_strip(tmp_path / "0.jpg", 33).read_bytes()
    for number in range(1, 100):
        write_strip(tmp_path / f"{number}.jpg", 6, number)
    reasons = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"dear diary", "not a JPEG"),
        "torn.jpg": (whole[: len(whole) // 2], "cut off"),
        "wide.jpg": (cv2.imencode(".jpg", np.zeros((640, 256, 3), np.uint8))[1].tobytes(), "256x640"),
        "one.jpg": (cv2.imencode(".jpg", strip_picture(1))[1].tobytes(), "only 1 frame"),
    }
    for name, (data, _) in reasons.items():
        (tmp_path / name).write_bytes(data)
    report = pack(tmp_path, tmp_path / "clips", frames=4, size=32, workers=2)
    assert (report.rejected, report.clips) == (5, 107)  # 33 frames are 8 clips
    for line in map(json.loads, (tmp_path / "clips" / "rejected.jsonl").read_text().splitlines()):
        assert reasons[line["source"]][1] in line["reason"]


def test_a_declared_size_is_checked_before_decoding(tmp_path):
    data = bytearray(write_strip(tmp_path / "a.jpg", 8).read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 2] = (60_000).to_bytes(2, "big")
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(NotAStrip, match="128x60000"):
        read_strip(tmp_path / "a.jpg", 128 * 50_000)
