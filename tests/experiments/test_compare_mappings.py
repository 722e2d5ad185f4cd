"""The comparison of mappings: its rule, and one small run from end to end."""

import sys

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments import compare_mappings
from vglann_fast.experiments.compare_mappings import (
    KINDS,
    Targets,
    default_kind,
    fit_and_measure,
    over_seeds,
    scaled,
)
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.train import train
from vglann_fast.metrics.truth import Truth
from vglann_fast.options.presets import PRESETS

TRUTH = {"mmd": {"mean": 0.0, "sd": 0.01}, "coverage": {"mean": 0.76, "sd": 0.02}}


def kind(mmd, coverage, spread=0.0):
    return {"mmd": mmd, "coverage": coverage, "mmd_spread": spread}


def test_the_lowest_mmd_wins_among_kinds_with_the_coverage_of_the_truth():
    kinds = {"imle": kind(0.08, 0.80), "vae": kind(0.001, 0.88), "drifting": kind(0.05, 0.79)}
    assert default_kind(TRUTH, kinds) == "drifting"


def test_a_tie_keeps_imle_and_a_coverage_far_from_the_truth_does_not():
    kinds = {"imle": kind(0.058, 0.80), "drifting": kind(0.05, 0.79)}
    assert default_kind(TRUTH, kinds) == "imle"
    assert default_kind(TRUTH, {**kinds, "imle": kind(0.058, 0.88)}) == "drifting"
    assert default_kind(TRUTH, {**kinds, "imle": kind(0.07, 0.80)}) == "drifting"
    assert default_kind(TRUTH, {"imle": kind(0.07, 0.80), "drifting": kind(0.05, 0.79, 0.03)}) == "imle"


def test_no_kind_may_have_the_coverage_of_the_truth():
    assert default_kind(TRUTH, {"imle": kind(0.01, 0.2)}) is None


def test_one_seed_has_no_spread():
    assert over_seeds([{"mmd": 2.0}])["mmd_spread"] != over_seeds([{"mmd": 2.0}])["mmd_spread"]
    assert over_seeds([{"mmd": 1.0}, {"mmd": 3.0}]) == {"mmd": 2.0, "mmd_spread": pytest.approx(2**0.5)}


@pytest.mark.parametrize(("kind", "chooses"), [("gmm", True), ("flow-matching", False)])
def test_no_kind_sees_the_latents_it_is_judged_by(kind, chooses, monkeypatch):
    rows = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    shots = torch.arange(60) // 3
    at = Targets(rows[:36], shots[:36], rows[36:], shots[36:], Truth(scaled(rows[36:]), shots[36:]))
    seen = []

    class Spy(KINDS[kind]):
        def fit(self, latents, generator, log=None, held_out=None):
            seen.append((latents, held_out))

        def sample(self, n, generator):
            return rows[torch.randint(36, (n,), generator=generator)]

        def log_density(self, latents):
            return None

    monkeypatch.setitem(KINDS, kind, Spy)
    fit_and_measure(kind, PRESETS["modern"].map[kind], at, 0, "cpu")
    [(fitted, choosing)] = seen
    assert (choosing is not None) == chooses
    used = torch.cat([fitted, *([choosing] if chooses else [])])
    assert sorted(used.tolist()) == sorted(rows[:36].tolist())


def test_one_command_makes_the_table(tmp_path, monkeypatch, capsys):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(40))
    run = new_run(tmp_path / "run", clips, tiny_options(epochs=1))
    train(ClipSet.open(clips, "train"), run)
    words = [str(run.path), "--only", "gaussian", "--seeds", "0,1", "--holdout-fraction", "0.5"]
    monkeypatch.setattr(sys, "argv", ["compare_mappings", *words])
    compare_mappings.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == [
        "mapping",
        "truth",
        "latents",
        "gaussian",
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert lines[-1].startswith("Default kind by the rule: ")
