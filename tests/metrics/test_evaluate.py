"""evaluate.py and what it stands on: a whole evaluation at tiny size, with an extractor of a few numbers."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from evaluated import instead_of_networks, mixed_folder, trained_run
from tiny import COLORS, mean_colors

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.metrics import evaluate as evaluation
from vglann_fast.metrics import reconstruction
from vglann_fast.metrics.compare import compare, measure
from vglann_fast.metrics.evaluate import evaluate
from vglann_fast.metrics.features import extract
from vglann_fast.metrics.frechet import FeatureMoments, frechet_distance
from vglann_fast.metrics.record import doubts, markdown, tables
from vglann_fast.metrics.sides import prepare
from vglann_fast.metrics.temporal import frame_steps, motion_statistics
from vglann_fast.samples import nearest
from vglann_fast.samples.invert import invert
from vglann_fast.samples.nearest import nearest_clips
from vglann_fast.samples.sample import sample


def colors_of(clips):
    return extract({"x": COLORS}, clips)["x"]


@pytest.fixture(autouse=True)
def colors_only(monkeypatch, tmp_path):
    """Inversion is cut short, too."""
    instead_of_networks(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(reconstruction, "invert", partial(invert, starts=2, steps=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("evaluate"), training=40, held_out=33, epochs=2)


def test_a_whole_evaluation(run, capsys):
    command = ["evaluate", str(run.path), "--features", "lite0", "--invert", "1", "--seed", "3"]
    assert main(command) == 0
    printed = capsys.readouterr()
    folder = run.path / "evaluation"
    assert {file.stem for file in folder.iterdir()} == {
        "reconstruction",
        "training-latents",
        "imle",
        "gaussian",
    }
    record = json.loads((folder / "imle.json").read_text())
    assert (record["format"], record["version"], record["name"]) == ("vglann-evaluation", 1, "imle")
    assert record["seed"] == 3
    assert record["real"] | {"sha256": 0} == {"split": "test", "clips": 33, "of": 33, "sha256": 0}
    assert len(record["real"]["sha256"]) == 64
    assert record["generated"]["clips"] == 33
    assert record["training"]["clips"] == 40
    compared = record["features"]["frechet[lite0]"]
    assert compared["protocol"] == COLORS.protocol
    assert compared["generated"]["n"] == compared["floor"]["n"] == 33
    assert compared["generated"]["quarters"]["n"] == 8
    assert compared["generated"]["dimensions"] == 4
    assert compared["generated"]["splits"]["n"] == compared["truth"]["n"] == 16
    assert compared["truth"]["splits"] == 20
    assert len(compared["generated"]["quarters"]["values"]) == 4

    # the same numbers, the long way round
    sample(run.path, n=33, seed=3, kind="imle")
    made = colors_of(np.load(run.path / "media" / "samples" / "video.npy"))
    clips = ClipSet.open(run.path.parent / "clips")
    real, known = (colors_of(ClipSet.open(clips.folder, split).read()) for split in ("test", "train"))
    expected = frechet_distance(FeatureMoments.of(real), FeatureMoments.of(made))
    assert compared["generated"]["frechet"] == pytest.approx(expected, rel=1e-3)  # batches of another size
    lowest = np.argsort(ClipSet.open(clips.folder, "train").ids)[:33]
    floor = frechet_distance(FeatureMoments.of(real), FeatureMoments.of(known[lowest]))
    assert compared["floor"]["frechet"] == pytest.approx(floor, rel=1e-9)

    table = printed.out
    for source in ("real clips (floor)", "real against real (truth)", "training-latents", "imle", "gaussian"):
        assert re.search(rf"\| {re.escape(source)} +\| +-?[\d.]+", table), source
    assert "frechet[lite0], n = 33" in table
    assert "FVD" not in table
    assert "held-out clips, inverted" in table
    assert str(folder) in table
    assert "warning" not in printed.err


def test_a_column_one_character_wide_has_a_whole_rule():
    rule = markdown(["a", "b"], [["1", "2"]]).splitlines()[1]
    assert re.fullmatch(r"\|( -+:? \|){2}", rule), rule


def test_training_clips_held_against_real_ones_are_of_shots_too(run, monkeypatch):
    pairs = torch.arange(20) // 2
    monkeypatch.setattr(evaluation, "shot_numbers", lambda clips: pairs)
    compared, distance = [], evaluation.compare
    monkeypatch.setattr(evaluation, "compare", lambda *given: compared.append(given) or distance(*given))
    evaluate(run.path, kinds=["gaussian"], features=["lite0"], n=20, invert=0)
    shots = [(real, made) for _, _, real, made in compared]
    # The floor, the training latents, the samples.
    assert [made is None for _, made in shots] == [False, False, True]
    assert all(torch.equal(real, pairs) for real, _ in shots)
    assert all(torch.equal(made, pairs) for _, made in shots[:2])


def test_the_seed_decides_alone(run, monkeypatch):
    def figures():
        record = evaluate(run.path, kinds=["imle"], features=["lite0"], n=20, invert=0, seed=1).records[
            "imle"
        ]
        return {
            key: record[key] for key in ("features", "motion", "nearest_training_clip", "real", "generated")
        }

    first = figures()
    monkeypatch.setattr(evaluation, "_BLOCK", 7)
    monkeypatch.setattr(nearest, "_CLIPS", 3)
    again = figures()
    # The generator's own batches may round otherwise, to one step of a color; everything else is exact.
    assert again["real"] == first["real"]
    assert again["motion"]["real"] == first["motion"]["real"]
    close = pytest.approx(first["features"]["frechet[lite0]"]["generated"]["frechet"], rel=1e-3)
    assert again["features"]["frechet[lite0]"]["generated"]["frechet"] == close


def test_the_order_of_clips_does_not_matter(run, tmp_path):
    clips = ClipSet.open(run.options["clips"], "test")
    rows = np.argsort(clips.ids)
    real = measure("a", [clips.read(rows[:20]), clips.read(rows[20:])], 33, {"x": COLORS})
    same = measure("b", [clips.read(rows[::-1])], 33, {"x": COLORS})
    assert real.sha256 == same.sha256
    assert torch.equal(real.features["x"], same.features["x"].flip(0))
    other = measure("c", [clips.read(rows[1:])], 32, {"x": COLORS})
    assert other.sha256 != real.sha256


def test_without_held_out_clips_half_of_the_training_clips_stand_in(tmp_path):
    run = trained_run(tmp_path, training=9, held_out=1, epochs=1)
    result = evaluate(run.path, kinds=["gaussian"], features=["lite0"])
    assert "1 clips are held out" in result.warnings[0]
    assert list(result.records) == ["reconstruction", "training-latents", "gaussian"]
    record = result.records["gaussian"]
    assert record["real"]["split"] == "train"
    assert record["real"]["clips"] == record["generated"]["clips"] == 4
    assert record["warnings"] == result.warnings
    assert "real" not in record["nearest_training_clip"]
    assert "held_out" not in result.records["reconstruction"]
    figures = record["features"]["frechet[lite0]"]
    assert figures["generated"]["precision"] is None
    assert figures["generated"]["quarters"] is None
    lines = doubts(result.records)
    assert any("4 videos for 4 features" in line and "of gaussian" in line for line in lines)
    assert any("too few for precision" in line for line in lines)
    assert "none" in tables(result.records)


def test_features_may_be_left_out(run, capsys):
    command = ["evaluate", str(run.path), "--kind", "gaussian,imle", "--features", "none", "--invert", "0"]
    assert main([*command, "-n", "5"]) == 0
    table = capsys.readouterr().out
    assert "motion" in table
    assert "frechet" not in table
    assert table.index("gaussian") < table.index("imle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "vqgan"], "vqgan"),
        (["--kind", "vae"], "vglann map"),
        (["-n", "34"], "34 videos on each side asked for, but there are 33 test clips"),
        (["-n", "1"], "at least 2 videos on each side"),
        (["--features", "i3d"], "FVD takes at least 2048 videos on each side, here are 33"),
    ],
)
def test_mistakes(run, capsys, arguments, message):
    assert main(["evaluate", str(run.path), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vglann: error: ")
    assert message in error


def test_mistakes_of_the_run(run, tmp_path, monkeypatch):
    instead_of_networks(monkeypatch, tmp_path, replace(COLORS, min_frames=17))
    with pytest.raises(VglannError, match="at least 17 frames, the run's have 16"):
        evaluate(run.path, features=["i3d-16"])
    with pytest.raises(VglannError, match="not a run"):
        evaluate(tmp_path)
    shutil.copy(run.path / "options.json", tmp_path)
    with pytest.raises(VglannError, match="no mapping to sample from"):
        evaluate(tmp_path)


def test_sixteen_videos_have_a_name_of_their_own(run):
    record = evaluate(run.path, kinds=["imle"], features=["i3d-16"], invert=0).records["imle"]
    assert list(record["features"]) == ["frechet[i3d, 16 videos]"]
    assert record["features"]["frechet[i3d, 16 videos]"]["generated"]["n"] == 16


def test_constant_features_are_an_error_that_names_their_source(run, tmp_path, monkeypatch):
    instead_of_networks(monkeypatch, tmp_path, replace(COLORS, network=torch.ones_like, reduce=mean_colors))
    with pytest.raises(
        VglannError, match=r"frechet\[lite0\] of the floor: the features of all 33 real videos"
    ):
        evaluate(run.path, kinds=["imle"], features=["lite0"], invert=0)


def test_comparing_a_set_with_itself_is_warned_of():
    rows = colors_of(moving_squares(40))
    figures = compare(rows, rows)
    assert figures["frechet"] < 1e-8
    assert (figures["precision"], figures["coverage"]) == (1, 1)
    assert any("identical" in line for line in figures["warnings"])
    assert not compare(rows[:20], rows[20:])["warnings"]


def test_no_more_are_compared_than_there_are_training_clips(tmp_path):
    """The floor takes as many training clips as there are real ones."""
    training = ClipSet.open(mixed_folder(tmp_path / "clips", 5, 9), "train")
    sides, _ = prepare(training, [], None, "cpu", [])
    assert sides.n == len(sides.training_rows[sides.floor]) == 5
    with pytest.raises(VglannError, match="9 test clips and 5 others: 5 at most"):
        prepare(training, [], 6, "cpu", [])


def test_the_spread_is_over_disjoint_quarters():
    real, made = torch.randn(67, 3, dtype=torch.float64), torch.randn(70, 3, dtype=torch.float64) + 1
    figures = compare(real, made)
    assert figures["n"] == 67
    assert any("67 real and 70 generated" in line for line in figures["warnings"])
    pairs = [(real[i * 16 : i * 16 + 16], made[i * 16 : i * 16 + 16]) for i in range(4)]
    expected = [frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b)) for a, b in pairs]
    assert figures["quarters"]["values"] == pytest.approx(expected)
    assert figures["quarters"]["sd"] == pytest.approx(np.std(expected, ddof=1))
    assert figures["frechet"] < figures["quarters"]["mean"]


def test_nearest_clips_by_brute_force(tmp_path, monkeypatch):
    monkeypatch.setattr(nearest, "_CLIPS", 4)
    monkeypatch.setattr(nearest, "_VIDEOS", 2)
    clips = moving_squares(11)
    clips[8] = clips[3]  # a tie: the lower row is named
    folder = tmp_path / "clips"
    training = ClipSet.open(write_clip_folder(folder, np.delete(clips, 8, 0)))
    videos = np.concatenate([clips[3:4], moving_squares(4, seed=9), clips[:1] // 2])
    squares = ((videos[:, None].astype(float) - training.read()) ** 2).mean((2, 3, 4, 5))
    rows, found = nearest_clips(videos, training)
    assert rows.tolist() == squares.argmin(1).tolist()
    np.testing.assert_allclose(found, squares.min(1), rtol=1e-12)
    assert found[0] == 0
    with pytest.raises(ValueError, match="the training clips are"):
        nearest_clips(videos[:, :, :8], training)


def test_motion_and_the_last_frame():
    clips = np.zeros((2, 3, 5, 8, 8), np.uint8)
    clips[0] += np.array([0, 2, 4, 6, 16], np.uint8)[:, None, None]  # steps 2, 2, 2, 10
    clips[1] += np.array([250, 246, 250, 246, 250], np.uint8)[:, None, None]
    steps = frame_steps(torch.from_numpy(clips))
    assert steps.tolist() == [[2, 2, 2, 10], [4, 4, 4, 4]]
    found = motion_statistics(steps)
    assert found["energy"]["mean"] == 4
    assert found["energy"]["sd"] == 0
    assert found["last_frame_jump"] == pytest.approx(7 / 3)
    assert found["steps"] == [3, 3, 3, 7]
    assert motion_statistics(torch.zeros(2, 4, dtype=torch.float64))["last_frame_jump"] is None
    with pytest.raises(ValueError, match="at least 3"):
        frame_steps(torch.from_numpy(clips[:, :, :2]))
