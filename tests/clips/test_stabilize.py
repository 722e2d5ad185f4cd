"""stabilize.py: motions that are known are found, and the camera stands still afterwards."""

import json
from itertools import pairwise

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

from vglann_fast.clips.dataset import ClipSet  # noqa: E402
from vglann_fast.clips.pack import pack  # noqa: E402
from vglann_fast.clips.stabilize import Tracker, resizing, stabilize  # noqa: E402
from vglann_fast.errors import VglannError  # noqa: E402

WIDTH, HEIGHT, FRAMES = 320, 240, 10


def textured_picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Colored noise of every scale from 4 pixels on, uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 128.0)
    for scale in (4, 8, 16, 32, 64):
        noise = random.normal(size=(height // scale + 2, width // scale + 2, 3)) * 12 * scale**0.3
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture.clip(1, 255).astype(np.uint8)  # nowhere black


def about_the_centre(matrix) -> np.ndarray:
    center = np.array([[1, 0, (WIDTH - 1) / 2], [0, 1, (HEIGHT - 1) / 2], [0, 0, 1]])
    return center @ np.asarray(matrix, float) @ np.linalg.inv(center)


def turned(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return about_the_centre([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


CAMERAS = {
    "pan": lambda t: np.array([[1, 0, 2.7 * t], [0, 1, -1.3 * t], [0, 0, 1.0]]),
    "zoom": lambda t: about_the_centre(np.diag([1.01**t, 1.01**t, 1])),
    "rotation": lambda t: turned(0.9 * t),
    "all at once": lambda t: np.array([[1, 0, -1.6 * t], [0, 1, 0.8 * t], [0, 0, 1.0]]) @ turned(0.5 * t),
}


def filmed(camera, frames: int = FRAMES) -> tuple[np.ndarray, list[np.ndarray]]:
    """Frames (frames, HEIGHT, WIDTH, 3) of a still scene, and the homographies from each to the first."""
    scene = textured_picture(WIDTH + 200, HEIGHT + 200)
    to_first = [camera(t) for t in range(frames)]
    shift = np.array([[1, 0, 100], [0, 1, 100], [0, 0, 1.0]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pictures = [cv2.warpPerspective(scene, shift @ matrix, (WIDTH, HEIGHT), flags=how) for matrix in to_first]
    return np.stack(pictures), to_first


def track(frames: np.ndarray) -> np.ndarray:
    tracker = Tracker()
    return np.stack([tracker(frame) for frame in frames])


def farthest(found: np.ndarray, true: np.ndarray) -> float:
    """Largest distance in pixels between where two homographies take the corners and sides of the frame."""
    x, y = np.meshgrid(np.linspace(0, WIDTH - 1, 5), np.linspace(0, HEIGHT - 1, 5))
    points = np.stack([x, y], -1).reshape(-1, 1, 2)
    both = [cv2.perspectiveTransform(points, matrix) for matrix in (found, true)]
    return float(np.linalg.norm(both[0] - both[1], axis=-1).max())


def flow(frames: np.ndarray) -> float:
    """Mean optical flow in pixels between neighboring frames, away from the borders."""
    grays = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = [method.calc(a, b, None)[50:-50, 50:-50] for a, b in pairwise(grays)]
    return float(np.linalg.norm(flows, axis=-1).mean())


@pytest.mark.parametrize("name", CAMERAS)
def test_known_camera_motion_is_found_and_removed(name):
    frames, to_first = filmed(CAMERAS[name])
    motions = track(frames)
    assert np.isnan(motions[0, 0])
    sofar = np.eye(3)
    for t in range(1, FRAMES):
        step = motions[t, :9].reshape(3, 3)
        assert farthest(step, np.linalg.inv(to_first[t - 1]) @ to_first[t]) < 0.5
        sofar = sofar @ step
        assert farthest(sofar, to_first[t]) < 0.5
        assert motions[t, 9] > 100  # inliers
        assert motions[t, 9] <= motions[t, 10]
        assert motions[t, 11] < 0.3  # their median miss
    steady, quality = stabilize(frames, list(motions[1:, None]), (WIDTH, HEIGHT))
    assert flow(frames) > 10 * flow(steady)
    assert quality.rejected_frames == 0
    assert quality.residual < 0.3
    assert steady.min() > 0  # never black, also beyond the border of what was seen
    assert steady.mean(axis=0).std() > 0.97 * frames[0].std()  # an average of moving frames is a blur


def test_borders_show_the_frame_before():
    frames, _ = filmed(CAMERAS["pan"])
    steady, quality = stabilize(frames, list(track(frames)[1:, None]), (WIDTH, HEIGHT))
    # The camera went right by 24.3 in all: the first 22 columns show an earlier frame to the end.
    assert np.array_equal(steady[-1][:, :3], frames[0][:, :3])
    share = 1 - (WIDTH - 2.7 * np.arange(FRAMES)) * (HEIGHT - 1.3 * np.arange(FRAMES)) / (WIDTH * HEIGHT)
    assert quality.filled == pytest.approx(share.mean(), abs=0.02)  # and the eroded rim


def test_resized_frames_take_the_motions_of_their_source():
    frames, _ = filmed(CAMERAS["all at once"])
    small = np.stack([cv2.resize(frame, (160, 120), interpolation=cv2.INTER_AREA) for frame in frames])
    steady, _ = stabilize(small, list(track(frames)[1:, None]), (WIDTH, HEIGHT))
    inside = np.abs(steady[-1].astype(int) - steady[0])[30:-30, 30:-30].mean()
    assert inside < 0.15 * np.abs(small[-1].astype(int) - small[0])[30:-30, 30:-30].mean()


def test_resizing_keeps_the_corners():
    matrix = resizing(100, 50, 50, 100)
    corners = np.array([[[-0.5, -0.5]], [[99.5, 49.5]]])  # of the pixels, not their centers
    np.testing.assert_allclose(cv2.perspectiveTransform(corners, matrix)[:, 0], [[-0.5, -0.5], [49.5, 99.5]])


def test_a_frame_that_cannot_be_placed_fails_the_clip():
    frames, _ = filmed(CAMERAS["pan"])
    frames[4] = 128
    motions = track(frames)
    assert np.isnan(motions[[4, 5], 0]).all()
    steady, quality = stabilize(frames, list(motions[1:, None]), (WIDTH, HEIGHT))
    assert steady is None
    assert quality.rejected_frames == pytest.approx(2 / (FRAMES - 1))
    assert quality.as_json()["inliers"] > 100  # of the others


def test_a_camera_that_turns_away_fails_the_clip():
    frames, _ = filmed(CAMERAS["pan"])
    away = track(frames)[1:2].repeat(60, axis=0)
    steady, quality = stabilize(frames[:1].repeat(61, axis=0), list(away[:, None]), (WIDTH, HEIGHT))
    assert steady is None
    assert quality.filled > 0.5


def write_video(path, frames):
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return path


def test_packed_clips_stand_still_and_say_how_well(tmp_path):
    frames, _ = filmed(CAMERAS["pan"], 24)
    lost = frames.copy()
    lost[12] = frames[12][:, ::-1]  # the same colors, so no cut
    videos = [write_video(tmp_path / "good.mkv", frames), write_video(tmp_path / "lost.mkv", lost)]
    options = {"frames": 8, "min_motion": 0, "stride": 1}
    pack(videos, tmp_path / "plain", **options)
    report = pack(videos, tmp_path / "steady", stabilize=True, **options)
    plain, steady = ClipSet.open(tmp_path / "plain"), ClipSet.open(tmp_path / "steady")
    assert (report.clips, report.unstable, report.rejected) == (5, 1, 0)
    assert "1 clips could not be stabilized" in str(report)
    assert not set(plain.ids) & set(steady.ids)
    moved, stood = (np.abs(np.diff(clips.read()[:3].astype(int), axis=2)).mean() for clips in (plain, steady))
    assert moved > 5 * stood
    assert steady.read().min() > 0
    for clip in steady.clips:
        assert clip["stabilization"].keys() == {"inliers", "residual", "rejected_frames", "filled"}
        assert clip["stabilization"]["inliers"] > 100
        assert clip["crop"] == [40, 0, 240, 240]
    (line,) = map(json.loads, (tmp_path / "steady" / "rejected.jsonl").read_text().splitlines())
    assert (line["source"], line["clip"]["first_frame"]) == ("lost.mkv", 8)
    assert line["clip"]["stabilization"]["rejected_frames"] == pytest.approx(2 / 7, abs=1e-3)
    with pytest.raises(VglannError, match=r"other options .stabilize"):
        pack(videos, tmp_path / "plain", stabilize=True, **options)
    assert pack(videos, tmp_path / "steady", stabilize=True, **options).reused


def test_stride_and_tiles(tmp_path):
    frames, _ = filmed(CAMERAS["pan"], 13)
    video = write_video(tmp_path / "a.mkv", frames)
    pack(video, tmp_path / "clips", frames=5, size=32, stride=3, tiles=2, min_motion=0, stabilize=True)
    clips = ClipSet.open(tmp_path / "clips")
    assert [clip["crop"] for clip in clips.clips] == [[x, y, 120, 120] for y in (0, 120) for x in (40, 160)]
    for row, clip in enumerate(clips.clips):
        x, y, width, height = clip["crop"]
        first = np.ascontiguousarray(frames[0][y : y + height, x : x + width])
        expected = cv2.resize(first, (32, 32), interpolation=cv2.INTER_AREA).transpose(2, 0, 1)
        video = clips.read([row])[0]
        assert np.abs(video[:, 0].astype(int) - expected).mean() < 6  # resized in two steps: 120, 64, 32
        assert np.abs(video[:, -1].astype(int) - expected)[:, 4:-4, 8:-8].mean() < 8


def test_a_strip_is_stabilized_to_its_end_and_beyond(tmp_path):
    frames, _ = filmed(CAMERAS["pan"], 6)
    strip = np.concatenate([frame[:128, :128] for frame in frames])
    cv2.imwrite(str(tmp_path / "a.jpg"), strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 97])
    pack(tmp_path / "a.jpg", tmp_path / "plain", frames=9, min_motion=0)
    pack(tmp_path / "a.jpg", tmp_path / "steady", frames=9, min_motion=0, stabilize=True)
    moved, stood = (ClipSet.open(tmp_path / name).read()[0].astype(int) for name in ("plain", "steady"))
    assert np.array_equal(stood[:, 5], stood[:, 8])  # the last of six is repeated
    first, last = (np.abs(clip[:, 5] - clip[:, 0])[:, 8:-8, 8:-8].mean() for clip in (moved, stood))
    assert first > 4 * last
