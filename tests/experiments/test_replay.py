"""`vglann replay RUN`: what was made once comes out again, bit for bit, and what did not is named."""

import errno
import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from vglann_fast.cli.main import main
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.experiments.replay import _stretches
from vglann_fast.mapping import fit
from vglann_fast.run.files import sha256
from vglann_fast.run.folder import RunDir
from vglann_fast.samples import sample

# Three passes of 3 steps for the background, then 4 full ones.
PHASES = ["--background-share", "0.0375"]
TINY = ["--width", "4", "--latent-dim", "8", "--levels", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that was stopped, resumed with another rate, mapped twice and sampled; and its clips."""
    folder = tmp_path_factory.mktemp("made")
    clips = write_clip_folder(folder / "clips", moving_squares(6))
    run, cpu = str(folder / "run"), ["--device", "cpu"]
    assert (
        main(["train", str(clips), "--out", run, *TINY, "--epochs", "4", "--seed", "3", *PHASES, *cpu]) == 0
    )
    stop_at(RunDir.open(run), 7)
    for command in (
        ["train", "--resume", run, "--lr-latents", "0.002"],
        ["map", run, "--epochs", "1"],
        ["map", run, "--epochs", "2", "--seed", "5"],
        ["sample", run, "-n", "3", "--seed", "7"],
        ["interpolate", run, "--steps", "2"],
    ):
        assert main([*command, *cpu]) == 0, command
    return folder


def stop_at(run, step):
    """As if the finished training had been stopped there."""
    from vglann_fast.clips.dataset import ClipSet
    from vglann_fast.glo.assemble import new_training
    from vglann_fast.options.fields import options_from_json
    from vglann_fast.options.training import TrainOptions

    shutil.rmtree(run.path / "checkpoints")
    options = options_from_json(TrainOptions, run.options["train"])
    training = new_training(ClipSet.open(run.options["clips"]), options, run, seed=run.options["seed"])
    training.loop(max_steps=step)


def verdicts(capsys):
    return dict(reversed(line.split(" ", 1)) for line in capsys.readouterr().out.splitlines())


def test_everything_comes_out_the_same(made, tmp_path, capsys):
    capsys.readouterr()
    assert main(["replay", str(made / "run"), "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    parts = [f"checkpoint 21, {part}" for part in ("generator", "latents", "optimizer")]
    artifacts = ["checkpoint 21", *parts, "metrics", "mapping/imle", "media/samples", "media/nearest"]
    assert verdicts(capsys) == dict.fromkeys([*artifacts, "media/interpolation"], "SAME")
    assert RunDir.open(tmp_path / "again").checkpoints.load()[0]["step"] == 21


def test_kinds_that_draw_at_every_step_come_out_the_same(made, tmp_path, capsys):
    run = shutil.copytree(made / "run", tmp_path / "run")
    kinds = ("drifting", "flow-matching")
    for kind in kinds:
        assert (
            main(["map", str(run), "--kind", kind, "--epochs", "2", "--hidden", "4", "--device", "cpu"]) == 0
        )
    capsys.readouterr()
    assert main(["replay", str(run), "--device", "cpu"]) == 0
    found = verdicts(capsys)
    assert [found[f"mapping/{kind}"] for kind in kinds] == ["SAME", "SAME"]


def test_what_was_changed_is_named(made, tmp_path, capsys):
    """A latent, a metric and a video, and a picture that nobody recorded."""
    run = RunDir.open(shutil.copytree(made / "run", tmp_path / "run"))
    checkpoint = run.path / "checkpoints" / "step-00000021"
    tensors = load_file(checkpoint / "latents.safetensors")
    tensors["rows"][1, 2] += 1e-6
    save_file(tensors, checkpoint / "latents.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"]["latents.safetensors"] = sha256(checkpoint / "latents.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state))
    (run.path / "media" / "interpolation" / "video.npy").write_bytes(b"")
    (run.path / "media" / "reconstruction").mkdir()
    text = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text(text.replace('"psnr": ', '"psnr": 1'))
    capsys.readouterr()
    assert main(["replay", str(run.path), "--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "SAME checkpoint 21, generator" in printed
    assert any(line.startswith("DIFF checkpoint 21, latents: 1 of 6 tensors, by up to 1") for line in printed)
    assert any(line.startswith("DIFF metrics: ") for line in printed)
    assert "DIFF media/interpolation: 1 of" in "\n".join(printed)
    assert "SKIP media/reconstruction: no record of the command that made it" in printed


def test_moved_clips_have_to_be_given(made, tmp_path, capsys):
    run = RunDir.open(shutil.copytree(made / "run", tmp_path / "run"))
    shutil.rmtree(run.path / "media")
    run.options["clips"] = str(tmp_path / "gone")
    (run.path / "options.json").write_text(json.dumps(run.options))
    assert main(["replay", str(run.path), "--device", "cpu"]) == 2
    assert "are not in" in capsys.readouterr().err
    assert main(["replay", str(run.path), "--clips", str(made / "clips"), "--device", "cpu"]) == 0
    other = write_clip_folder(tmp_path / "other", moving_squares(5))
    assert main(["replay", str(run.path), "--clips", str(other), "--device", "cpu"]) == 2
    assert "the clip set changed" in capsys.readouterr().err


def test_a_full_standard_error_does_not_end_the_work(made, tmp_path, capsys, monkeypatch):
    """The output of the repeated commands goes there, and nobody asked for it."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Full())
        assert main(["replay", str(made / "run"), "--device", "cpu"]) == 0
    assert "media/samples" in capsys.readouterr().out


def test_a_second_run_that_cannot_be_finished_does_not_block_the_next_try(made, tmp_path, monkeypatch):
    words = ["replay", str(made / "run"), "--device", "cpu", "--out", str(tmp_path / "second")]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "render", lambda *_, **__: (_ for _ in ()).throw(VglannError("no room")))
        assert main(words) == 2
    assert not list(tmp_path.iterdir())
    assert main(words) == 0
    assert (tmp_path / "second" / "options.json").exists()


def test_training_after_a_resume_from_an_older_step_is_left_out():
    """Rates of 1, then from step 30 of 2, from step 100 of 3; the last resume went on from step 50 with 4."""
    rates = [(30, [1, 2]), (100, [2, 3]), (50, [3, 4])]
    resumed = [{"step": step, "changed": {"lr_latents": pair}} for step, pair in rates]
    found = list(_stretches({"train": {"lr_latents": 4}, "resumed": resumed}, 200))
    assert found == [(30, {"lr_latents": 1}, {}), (50, {"lr_latents": 2}, {}), (200, {"lr_latents": 4}, {})]


def test_each_part_of_a_training_has_the_choices_that_it_took():
    both, precision = {"precision": "bf16", "data": "resident"}, {"precision": "bf16"}
    resumed = [{"step": 10, "changed": {}}, {"step": 20, "changed": {}, "choices": [both, precision]}]
    options = {"train": {}, "resumed": resumed, "measured": {"choices": precision}}
    assert list(_stretches(options, 30)) == [(10, {}, both), (20, {}, both), (30, {}, precision)]


RESUME = {"step": 7, "changed": {}, "environment": {}}
UNREPEATABLE = {
    "begun by two": ({"processes": 2}, {}, "by 2 processes"),
    "resumed by four": ({}, {"environment": {"processes": [1, 4]}}, "by 4 processes"),
    "other clips": ({}, {"latents_on_mismatch": "keep"}, "--latents-on-mismatch keep"),
}


@pytest.mark.parametrize(("began", "resume", "message"), UNREPEATABLE.values(), ids=UNREPEATABLE)
def test_a_training_that_cannot_be_repeated_is_one_line(made, tmp_path, capsys, began, resume, message):
    run = RunDir.open(shutil.copytree(made / "run", tmp_path / "run"))
    there = json.loads((run.path / "environment.json").read_text())
    (run.path / "environment.json").write_text(json.dumps(there | began))
    run.options["resumed"].append(RESUME | resume)
    (run.path / "options.json").write_text(json.dumps(run.options))
    assert main(["replay", str(run.path), "--out", str(tmp_path / "again"), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_what_replay_needs_to_know_of_a_resume_is_recorded(made, tmp_path):
    run = RunDir.open(shutil.copytree(made / "run", tmp_path / "run"))
    RunDir.open(run.path).resumed(12, "init")
    assert RunDir.open(run.path).options["resumed"][-1]["latents_on_mismatch"] == "init"
    assert json.loads((run.path / "environment.json").read_text())["processes"] == 1


def test_an_older_run_without_metrics(made, tmp_path, capsys):
    run = RunDir.open(shutil.copytree(made / "run", tmp_path / "run"))
    shutil.rmtree(run.path / "media")
    shutil.rmtree(run.path / "mapping")
    there = json.loads((run.path / "environment.json").read_text())
    del there["processes"]
    (run.path / "environment.json").write_text(json.dumps(there))
    (run.path / "metrics.jsonl").write_text("")
    capsys.readouterr()
    assert main(["replay", str(run.path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "SKIP metrics: no common lines" in printed
    assert "SAME checkpoint 21, generator" in printed


def test_each_step_is_deterministic_or_not_as_recorded(made, tmp_path, capsys, monkeypatch):
    """One was made with --deterministic, the later ones without."""
    run = RunDir.open(shutil.copytree(made / "run", tmp_path / "run"))
    lines = run.logs.history()
    for line in lines:
        line["options"]["deterministic"] = line["verb"] == "sample"
    (run.path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    modes = {}
    for verb, called in (
        ("map", fit.fit_mapping),
        ("sample", sample.sample),
        ("interpolate", sample.interpolate),
    ):

        def noting(*arguments, verb=verb, called=called, **options):
            modes[verb] = torch.are_deterministic_algorithms_enabled()
            return called(*arguments, **options)

        monkeypatch.setattr(f"{called.__module__}.{called.__name__}", noting)
    assert main(["replay", str(run.path), "--device", "cpu"]) == 0
    assert modes == {"map": False, "sample": True, "interpolate": False}
