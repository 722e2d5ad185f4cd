"""Time to quality: where trainings are measured, what a point is, and how seconds and targets are read off."""

import json
import signal
from pathlib import Path

import pytest
from tiny import tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments import time_to_quality as study
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.training import Training

ROOT = Path(__file__).parents[2]
WANTED = study.PlannedTraining("modern", 4, 0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = write_clip_folder(tmp_path_factory.mktemp("quality") / "clips", moving_squares(8))
    return ClipSet.open(folder, "train")


@pytest.fixture
def small(monkeypatch):
    """A tiny generator, 2 steps a pass; 2 passes of the background, then 4 full ones; measured thrice."""
    options = tiny_options("modern", batch_size=4, epochs=4, background_share=0.025, loss="laplacian:1,l2:2")
    assert (options.background_passes, options.full_passes) == (2, 4)
    monkeypatch.setattr(study.PlannedTraining, "options", options)
    monkeypatch.setattr(study, "BACKGROUND_COST", 0.5)
    monkeypatch.setattr(study, "COSTS", (1, 2, 5))


def test_a_training_is_measured_where_it_has_cost_as_much_and_at_its_end():
    # 100 steps of the background cost as much as 5 full ones.
    steps = study.measured_steps(background=100, last=400)
    costs = [min(step, 100) * study.BACKGROUND_COST + max(step - 100, 0) for step in steps]
    assert costs == [*(cost for cost in study.COSTS if cost < 305), 305]
    assert study.measured_steps(background=0, last=28) == [5, 10, 20, 28]


def test_points_count_steps_of_both_kinds(clips, small, tmp_path):
    study.train_one(WANTED, clips, tmp_path / "run")
    points = study.points_of(tmp_path / "run")
    counts = [(point["background_steps"], point["full_steps"]) for point in points]
    assert counts == [(2, 0), (4, 0), (4, 3), (4, 8)]
    assert all(point["psnr"] > 0 for point in points)


def test_a_stopped_training_is_measured_as_if_it_had_not_been(clips, small, tmp_path, monkeypatch):
    study.train_one(WANTED, clips, tmp_path / "whole")
    train_step = Training.train_step

    def stopped(self, **kwargs):
        if self.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_step", stopped)
        with pytest.raises(Exception, match="SIGTERM"):
            study.train_one(WANTED, clips, tmp_path / "parts")
    study.train_one(WANTED, clips, tmp_path / "parts")
    assert study.points_of(tmp_path / "parts") == study.points_of(tmp_path / "whole")


def test_seconds_are_steps_of_each_kind_at_their_price():
    points = [
        {"background_steps": 40, "full_steps": 0, "psnr": 18.0, "motion_r2": 0.0},
        {"background_steps": 60, "full_steps": 10, "psnr": 20.0, "motion_r2": 0.15},
    ]
    row = study.row_of("modern", WANTED, {"background": 50.0, "full": 1000.0}, points)
    assert [point["seconds"] for point in row["points"]] == [2.0, 13.0]
    record = {"targets": {"psnr": [17.0, 19.0], "motion_r2": [0.1, 0.2]}, "rows": [row]}
    cells = [cell.strip() for cell in study.table(record).splitlines()[-1].split("|")]
    assert cells[4:8] == ["2", "13", "13", "–"]


def test_the_documented_table_is_the_recorded_one():
    record = json.loads((ROOT / "bench" / "results" / "time_to_quality.json").read_text())
    assert study.table(record) in (ROOT / "docs" / "ablation.md").read_text()


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    record = json.loads((ROOT / "bench" / "results" / "time_to_quality.json").read_text())
    study.draw(record, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
