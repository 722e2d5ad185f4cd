"""The latents of a run that are held out: whole shots, where they are known."""

import json
import shutil

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.train import train
from vglann_fast.mapping.fit import fit_mapping, load_mapping
from vglann_fast.mapping.split import run_shots, set_aside, shot_numbers
from vglann_fast.options.mapping import GaussianOptions

SINGLE = "single clips are held out, not whole shots"


def split(shots, share, seed=0):
    """The rows that are fitted, and those set aside."""
    fitted, aside = set_aside(torch.arange(len(shots))[:, None], shots, share, seed)
    return fitted[:, 0], aside[:, 0]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_no_shot_lies_on_both_sides(share):
    random = torch.Generator().manual_seed(0)
    shots = torch.cat([torch.arange(20), torch.randint(20, (180,), generator=random)])
    fitted, aside = split(shots, share, seed=3)
    assert not set(shots[fitted].tolist()) & set(shots[aside].tolist())
    assert sorted([*fitted.tolist(), *aside.tolist()]) == list(range(200))
    largest = int(shots.bincount().max())
    assert share * 200 <= len(aside) < share * 200 + largest


def test_a_shot_is_left_on_either_side(caplog):
    halves = torch.arange(10) // 5
    for share in (0.01, 0.99):
        assert [len(part) for part in split(halves, share)] == [5, 5]
    assert not caplog.text


def test_the_seed_decides_which(caplog):
    shots = torch.arange(100)
    fitted, aside = split(shots, 0.25, seed=3)
    assert (len(fitted), len(aside)) == (75, 25)
    assert torch.equal(aside, aside.sort().values)
    assert torch.equal(aside, split(shots, 0.25, seed=3)[1])
    assert not torch.equal(aside, split(shots, 0.25, seed=4)[1])
    assert set_aside(shots[:, None], shots, 0.0, 3)[1] is None
    assert not caplog.text


def test_of_one_shot_single_clips_are_taken(caplog):
    fitted, aside = split(torch.zeros(10, dtype=torch.int64), 0.2)
    assert (len(fitted), len(aside)) == (8, 2)
    assert SINGLE in caplog.text


def test_too_few_left():
    with pytest.raises(VglannError, match=r"--holdout-fraction 0\.5 leaves fewer than 2 of 2"):
        split(torch.arange(2), 0.5)


def test_shots_of_two_videos_are_two():
    clips = [{"source": source, "shot": shot} for source, shot in [(1, 0), (0, 0), (1, 0), (0, 1)]]
    assert shot_numbers(clips).tolist() == [0, 1, 0, 2]


@pytest.fixture(scope="module")
def four_a_shot(tmp_path_factory):
    """A trained run of three shots of four clips each, whose clips lie shot after shot in turns."""
    folder = tmp_path_factory.mktemp("split")
    clips = write_clip_folder(folder / "clips", moving_squares(12))
    _edit(clips, lambda row, clip: clip.update(shot=row % 3))
    run = new_run(folder / "run", clips, tiny_options(epochs=1))
    train(ClipSet.open(clips, "train"), run)
    return run


def _edit(clips, change):
    index = json.loads((clips / "index.json").read_text())
    for row, clip in enumerate(index["clips"]):
        change(row, clip)
    (clips / "index.json").write_text(json.dumps(index))


def test_a_fit_sets_a_whole_shot_aside(four_a_shot, caplog):
    ids = load_trained(four_a_shot).ids
    assert run_shots(four_a_shot, ids).tolist() == [0, 1, 2] * 4
    assert run_shots(four_a_shot, ids[::-1]).tolist() == [0, 1, 2] * 4  # by id, not by row
    fit_mapping(four_a_shot.path, "gaussian", GaussianOptions(holdout_fraction=0.1))
    gap = load_mapping(four_a_shot, "gaussian").gap
    assert (gap["fitted"]["latents"], gap["held_out"]["latents"]) == (8, 4)
    assert not [record for record in caplog.records if "--holdout-fraction" in record.message]


UNKNOWN = {
    "imported": lambda run, clips: run.options.update(clips=None),
    "gone": lambda run, clips: shutil.rmtree(clips),
    "other clips": lambda run, clips: _edit(clips, lambda row, clip: clip.update(id=f"{row:016x}")),
    "no shots": lambda run, clips: _edit(clips, lambda row, clip: clip.pop("shot")),
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_where_shots_are_not_known_single_clips_are_taken(four_a_shot, why, tmp_path, caplog):
    clips = shutil.copytree(four_a_shot.options["clips"], tmp_path / "clips")
    ids = load_trained(four_a_shot).ids
    run = new_run(tmp_path / "run", clips, tiny_options())
    UNKNOWN[why](run, clips)
    assert run_shots(run, ids).tolist() == list(range(12))
    assert SINGLE in caplog.text
    assert len(caplog.records) == 1
