"""Every bad video there is, as a table: what it is, and what becomes of it when it is packed among good ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("cv2")

from video_files import gif_bytes, write_video  # noqa: E402

from vglann_fast.clips import writer as writer_module  # noqa: E402
from vglann_fast.clips.dataset import ClipSet  # noqa: E402
from vglann_fast.clips.decode import DecodeLimits  # noqa: E402
from vglann_fast.clips.pack import pack  # noqa: E402

WRITE_ONLY = Path("/sys/bus/platform/drivers_probe")  # of the few files that even root cannot read


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """A square crosses a field of noise, (64, 64, 3) each."""
    random = np.random.default_rng(seed)
    field = random.integers(0, 100, (64, 64, 3), np.uint8)
    out = []
    for t in range(count):
        image = field.copy()
        image[20:40, t % 40 : t % 40 + 20] = 200
        out.append(image)
    return out


def video(folder, name, count=12, **options):
    return write_video(folder / name, pictures(count, len(name)), "libx264", "yuv420p", **options)


def truncated(folder):
    start = {"movflags": "faststart"}
    data = video(folder, "whole.mp4", 60, options=start).read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "truncated.mp4").write_bytes(data[: len(data) * 6 // 10])


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def no_video_stream(folder):
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def variable_rate(folder):
    write_video(folder / "vfr.mkv", pictures(12), times=[0, 1, 2, 9, 40, 41, 42, 43, 90, 91, 200, 201])


def an_hour(folder):
    # 3,600 frames at one a second: more than the `max_frames` of the test
    times = [24 * t for t in range(3600)]
    write_video(folder / "hour.mkv", pictures(3600), "mpeg4", "yuv420p", times=times)


def transparent_gif(folder):
    frames = [bytes([0 if (i + t) % 64 < 32 else 1 for i in range(64 * 64)]) for t in range(6)]
    (folder / "alpha.gif").write_bytes(gif_bytes(frames, 64))


def unreadable(folder):
    if os.geteuid():
        video(folder, "secret.mp4").chmod(0)
    elif WRITE_ONLY.exists():
        (folder / "secret.mp4").symlink_to(WRITE_ONLY)
    else:
        pytest.skip("root can read everything here")


def symlink_loop(folder):
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "again").symlink_to(folder)  # a folder that holds itself: its videos count once


HUGE_Y4M = b"YUV4MPEG2 W30000 H30000 F25:1 C420\n" + b"FRAME\n" * 3
ODD_NAME = "gîte\n'x' 東 \U0001f3a5.mp4"

# What it is -> (how it is made, the file, words of the reason it is rejected for, or the frames it has).
TABLE = {
    "truncated": (truncated, "truncated.mp4", "cut off"),
    "zero-byte": (written("empty.mp4", b""), "empty.mp4", "empty file"),
    "renamed text": (written("diary.mp4", b"Dear diary, no video.\n" * 50), "diary.mp4", "cannot be read"),
    "one frame": (lambda folder: video(folder, "one.mp4", 1), "one.mp4", "only 1 frame"),
    "no video stream": (no_video_stream, "sound.mp4", "no video stream"),
    "30,000 pixels, GIF": (written("huge.gif", gif_bytes([bytes(100)] * 3, 10, 30_000)), "huge.gif", ""),
    "30,000 pixels, Y4M": (written("huge.y4m", HUGE_Y4M), "huge.y4m", ""),
    "an hour long": (an_hour, "hour.mkv", 1000),
    "variable rate": (variable_rate, "vfr.mkv", 12),
    "transparent GIF": (transparent_gif, "alpha.gif", 6),
    "unicode and newline in the name": (lambda folder: video(folder, ODD_NAME), ODD_NAME, 12),
    "symlink loop": (symlink_loop, "loop.mp4", "does not exist"),
    "unreadable": (unreadable, "secret.mp4", "denied"),
}


@pytest.mark.parametrize("case", TABLE)
def test_a_bad_video_is_rejected_with_a_reason_or_packed(case, tmp_path, monkeypatch):
    make, name, expected = TABLE[case]
    folder = tmp_path / "videos"
    folder.mkdir()
    video(folder, "a good one.mp4")
    make(folder)
    monkeypatch.setattr(writer_module, "MAX_REJECTED_SHARE", 0.5)
    limits = DecodeLimits(seconds=60, max_frames=1000)
    report = pack(folder, tmp_path / "clips", frames=4, size=32, limits=limits, workers=1)
    clips = ClipSet.open(tmp_path / "clips")
    sources = {source["name"]: source for source in clips.sources}
    lines = [json.loads(line) for line in (tmp_path / "clips" / "rejected.jsonl").read_text().splitlines()]
    assert sources.keys() == {"a good one.mp4", name}
    assert sources["a good one.mp4"]["clips"] == 3  # it never suffers from the other
    if isinstance(expected, str):
        (line,) = lines
        assert line["source"] == name
        assert expected in line["reason"]
        assert line["reason"]
        assert "\n" not in line["reason"]
        assert str(tmp_path) not in line["reason"]
        assert (report.rejected, sources[name]["clips"]) == (1, 0)
    else:
        assert lines == []
        assert sources[name]["frames"] == expected
        assert sources[name]["clips"] >= 1
        assert sources[name]["truncated"] == (case == "an hour long")
    assert not list(tmp_path.glob(".tmp-*"))
