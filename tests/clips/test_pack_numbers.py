"""Numbers of any integer and float type are taken by pack and its parts; anything else is refused by name."""

import json
from fractions import Fraction

import numpy as np
import pytest

from vglann_fast.clips.cut import PackOptions
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.decode import DecodeJob, DecodeLimits
from vglann_fast.errors import VglannError


class Whole(int):
    """As argument parsers make them."""


INTEGERS = [np.int64, np.int32, np.uint8, Whole]
WHOLE = {"frames": 8, "size": 32, "stride": 2, "start_every": 4, "tiles": 2, "seed": 3}
REAL = {"min_motion": 0.25, "test_fraction": 0.5}


@pytest.mark.parametrize("number", INTEGERS)
def test_options_become_plain_numbers(number):
    options = PackOptions(
        **{name: number(value) for name, value in WHOLE.items()},
        **{name: np.float32(value) for name, value in REAL.items()},
        stabilize=np.True_,
    )
    assert options == PackOptions(**WHOLE, **REAL, stabilize=True)
    json.dumps(vars(options))
    assert {type(getattr(options, name)) for name in WHOLE} == {int}
    assert {type(getattr(options, name)) for name in REAL} == {float}
    assert PackOptions(min_motion=1, test_fraction=Fraction(1, 4)).min_motion == 1.0


@pytest.mark.parametrize(
    "bad", [True, np.True_, 8.0, np.float64(8), float("nan"), float("inf"), "8", None, [8]]
)
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_a_whole_number_is_refused_by_name(name, bad):
    if name == "start_every" and bad is None:
        assert PackOptions(start_every=None).start_every is None
        return
    with pytest.raises(VglannError, match=name):
        PackOptions(**{name: bad})


@pytest.mark.parametrize(
    "bad", [True, np.False_, float("nan"), np.float32("nan"), float("inf"), 10**400, "0.5", 1j]
)
@pytest.mark.parametrize("name", REAL)
def test_what_is_not_a_number_is_refused_by_name(name, bad):
    with pytest.raises(VglannError, match=name):
        PackOptions(**{name: bad})


def test_switches_are_true_or_false():
    for bad in (1, 0, "no", None):
        with pytest.raises(VglannError, match="stabilize"):
            PackOptions(stabilize=bad)


@pytest.mark.parametrize("name", ["memory_mb", "max_frames", "max_pixels"])
def test_limits_become_plain_numbers(name):
    limits = DecodeLimits(**{name: np.int64(5)}, seconds=np.float32(0.5))
    assert (type(getattr(limits, name)), type(limits.seconds)) == (int, float)
    for bad in (True, 5.0, 5.5, float("inf"), "5", 0, -1, 2**31):
        with pytest.raises(VglannError, match=name):
            DecodeLimits(**{name: bad})


def test_jobs_become_plain_numbers(tmp_path):
    job = DecodeJob(
        tmp_path, first_frame=np.int64(2), last_frame=Whole(5), tiles=np.uint8(1), strip=np.False_
    )
    assert [type(value) for value in (job.first_frame, job.last_frame, job.tiles, job.strip)] == [
        int,
        int,
        int,
        bool,
    ]
    with pytest.raises(VglannError, match="last_frame"):
        DecodeJob(tmp_path, last_frame=5.0)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    pytest.importorskip("av")
    pytest.importorskip("cv2")
    from decoding import pictures
    from video_files import write_video

    return write_video(tmp_path_factory.mktemp("videos") / "a.mkv", pictures(12))


def test_pack_takes_numbers_of_numpy_and_refuses_the_rest_by_name(video, tmp_path):
    from vglann_fast.clips.pack import pack

    plain = {"frames": 4, "size": 32, "min_motion": 0.25, "workers": 1, "seed": 3}
    numpy_like = {"frames": np.int64(4), "size": np.int32(32), "min_motion": np.float32(0.25)}
    pack(video, tmp_path / "plain", **plain)
    pack(video, tmp_path / "numpy", **{**plain, **numpy_like, "workers": np.int8(1), "seed": Whole(3)})
    indexes = [(tmp_path / name / "index.json").read_bytes() for name in ("plain", "numpy")]
    assert indexes[0] == indexes[1]
    for bad in ({"workers": True}, {"workers": 1.0}, {"workers": 0}, {"overwrite": 1}, {"stabilize": "no"}):
        with pytest.raises(VglannError, match=next(iter(bad))):
            pack(video, tmp_path / "none", **{**plain, **bad})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seed", ["0", "3"])
def test_seed_is_taken_from_the_command_line(video, tmp_path, seed):
    from vglann_fast.cli.main import main

    arguments = [
        "clips",
        "pack",
        str(video),
        "--out",
        str(tmp_path / "clips"),
        "--frames",
        "4",
        "--size",
        "32",
    ]
    main(
        [*arguments, "--workers", "1", "--seed", seed, "--test-share", "0.5", "--stride", "1", "--tiles", "1"]
    )
    options = json.loads((tmp_path / "clips" / "index.json").read_text())["options"]
    assert options["seed"] == int(seed)


def test_rows_are_whole_numbers(video, tmp_path):
    from vglann_fast.clips.pack import pack

    pack(video, tmp_path / "clips", frames=4, size=32, workers=1)
    clips = ClipSet.open(tmp_path / "clips")
    assert len(clips) == 3
    np.testing.assert_array_equal(clips.read([np.int16(2), True + 0]), clips.read([2, 1]))
    assert len(clips.read(np.zeros(0))) == 0
    for bad in ([True, False, True], np.ones(3, bool), [0.0], ["0"]):
        with pytest.raises(IndexError, match="rows"):
            clips.read(bad)
