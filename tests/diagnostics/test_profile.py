"""`vglann profile`: its figures add up, it warns of what it should, and the run stays as it was."""

import hashlib
import json

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.diagnostics.profile import profile, report, warnings_about
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    clips = write_clip_folder(folder / "clips", moving_squares(6))
    run = new_run(folder / "run", clips, tiny_options("modern-2026a", epochs=2, width=8))
    train(ClipSet.open(clips, "train"), run)
    return run


def content(path):
    return {
        file.relative_to(path): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.parent.name != "profile"
    }


def test_the_figures_add_up_and_the_run_stays_as_it_was(run, capsys):
    before = content(run.path)
    assert main(["profile", str(run.path), "--steps", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert content(run.path) == before
    record = json.loads((run.path / "profile" / "profile.json").read_text())
    assert record["steps"] == 4
    assert record["precision"] == "fp32"
    assert set(record["stages"]) == {"data", "generator", "loss", "backward", "update"}
    assert all(ms > 0 for ms in record["stages"].values())
    assert sum(record["stages"].values()) > 0.4 * record["ms_per_step"]
    assert record["videos_per_second"] == pytest.approx(3e3 / record["ms_per_step"])
    assert record["launches_per_step"] is None
    # Forward and backward of 3 videos, an eighth of 32 x 64 x 64 each: 3.97 GFLOP at width 64 that grow with the
    # square of the width, 0.54 that grow with it, and the products of the blur on top.
    expected = 3 * 3 / 8 * (3.97e9 * (8 / 64) ** 2 + 0.54e9 * (8 / 64))
    assert expected < record["flop_per_step"] < 1.5 * expected
    assert 0 < record["matmul_share"] < 1
    assert "ms a step" in said
    assert "backward" in said
    assert any("convolution" in name for name, _ in record["top"])
    trace = json.loads((run.path / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "generator" for event in trace["traceEvents"])


def test_it_warns_of_layout_changes_and_fallbacks():
    names = ["aten::mm", "void cudnn::ops::nchwToNhwcKernel<float>", "aten::slow_conv_transpose3d"]
    lines = warnings_about(names)
    assert len(lines) == 2
    assert "change of memory layout" in lines[0]
    assert "slow fallback" in lines[1]


def test_a_gpu_report_has_launches(tmp_path):
    record = {
        "device": "Card",
        "precision": "bf16",
        "steps": 20,
        "ms_per_step": 2.0,
        "videos_per_second": 7500.0,
        "stages": {"data": 0.1},
        "launches_per_step": 180.0,
        "top": [["kernel", 0.5]],
        "flop_per_step": 2e11,
        "matmul_flops": 7e14,
        "matmul_share": 0.14,
        "warnings": ["x: slow"],
    }
    text = report(record, tmp_path / "trace.json")
    assert "180 launches a step" in text
    assert "14.0%" in text
    assert "warning: x: slow" in text


def test_mistakes(run, tmp_path):
    with pytest.raises(VglannError, match="--steps: expected at least 1, got 0"):
        profile(run.path, steps=0)
    with pytest.raises(VglannError, match="is not a run"):
        profile(tmp_path)


def test_it_runs_in_the_precision_of_the_run(tmp_path):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(6))
    run = new_run(tmp_path / "run", clips, tiny_options("modern", precision="bf16", accumulate=2))
    profile(run.path, steps=1, device=torch.device("cpu"))  # no checkpoint: from the start
    assert json.loads((run.path / "profile" / "profile.json").read_text())["precision"] == "bf16"


def test_a_run_with_a_background_phase_shows_what_its_steps_cost(tmp_path):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(6))
    options = tiny_options("modern", optimizer="muon", background_share=0.03)
    run = new_run(tmp_path / "run", clips, options)
    text = profile(run.path, steps=1, device=torch.device("cpu"))
    record = json.loads((run.path / "profile" / "profile.json").read_text())
    assert record["background_ms_per_step"] > 0
    assert "background phase" in text
