"""Events of a training: a loss that is not finite, clips that move, new rates, two processes, few checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.loader import clip_order
from vglann_fast.glo.train import train
from vglann_fast.glo.training import Training
from vglann_fast.run.folder import RunDir

TINY = ["--width", "4", "--latent-dim", "8", "--levels", "2", "--batch-size", "2", "--background-share", "0"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(6))


def training_on(clips, run, options):
    return new_training(ClipSet.open(clips, "train"), options, run)


def tensors(run):
    _, parts = run.checkpoints.load()
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def different(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def poison(training, after):
    """From the update after `after` on, NaN goes through the generator, its BatchNorms included."""
    logits = training.logits
    training.logits = lambda z: logits(z * float("nan") if training.step >= after else z)


@pytest.mark.parametrize(("preset", "log_every"), [("modern", 1), ("paper", 100)], ids=["at once", "later"])
def test_a_loss_that_is_not_finite_leaves_the_state_before_it(clips, tmp_path, preset, log_every):
    options = tiny_options(preset, batch_size=2)  # 3 updates an epoch: the fifth is bad, a sixth taken
    good, bad = (new_run(tmp_path / name, clips, options) for name in ("good", "bad"))
    training_on(clips, good, options).loop(max_steps=4, log_every=log_every)
    training = training_on(clips, bad, options)
    poison(training, after=4)
    named = ", ".join(training.latents.ids[row] for row in clip_order(0, 1, 6)[2:4])
    with pytest.raises(VglannError, match=f"not finite at step 5, on clips {named}; .*saved as step 4"):
        training.loop(log_every=log_every)
    assert not different(tensors(good), tensors(bad))
    assert good.checkpoints.load()[0] == bad.checkpoints.load()[0]


def test_a_state_that_is_spoiled_itself_is_not_saved(clips, tmp_path):
    options = tiny_options(batch_size=2)
    run = new_run(tmp_path / "run", clips, options)
    training = training_on(clips, run, options)
    training.loop(max_steps=4)
    before = tensors(run)
    with torch.no_grad():
        training.generator.stem.weight[0, 0] = float("inf")  # as an update may, whose own loss was finite
    with pytest.raises(VglannError, match=r"not finite at step 5.*no checkpoint was added"):
        training.loop()
    assert len(list((run.path / "checkpoints").iterdir())) == 1
    assert not different(before, tensors(run))


def test_it_goes_on_with_a_lower_rate_which_holds_at_once_and_is_recorded(
    clips, tmp_path, monkeypatch, capsys
):
    options = tiny_options(batch_size=2, latent_mode="lazy", lr_generator=0.002)
    run = new_run(tmp_path / "run", clips, options)
    training = training_on(clips, run, options)
    poison(training, after=4)
    monkeypatch.setattr("vglann_fast.glo.train.new_training", lambda *args, **kwargs: training)
    assert main(["train", "--resume", str(run.path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in error) == 1
    assert f"--resume {run.path} with a lower --lr-generator" in error[-1]
    monkeypatch.undo()
    seen = []
    update = Training.update
    monkeypatch.setattr(
        Training,
        "update",
        lambda self, *given: (
            seen.append((self.optimizer.lr.item(), self.latents.lr.item())) or update(self, *given)
        ),
    )
    rates = ["--lr-generator", "0.0002", "--lr-latents", "0.001"]
    assert main(["train", "--resume", str(run.path), *rates, "--device", "cpu"]) == 0
    factor = seen[0][0] / 0.0002
    assert 0.5 < factor < 1  # the cosine, within the second pass
    assert seen[0][1] == pytest.approx(factor * 0.001)
    (entry,) = RunDir.open(run.path).options["resumed"]
    assert entry["step"] == 4
    assert entry["changed"] == {"lr_generator": [0.002, 0.0002], "lr_latents": [0.01, 0.001]}


def test_resuming_with_the_same_rates_changes_no_bit_and_records_nothing(clips, tmp_path):
    options = tiny_options(batch_size=2, latent_mode="lazy")
    whole, parts = (new_run(tmp_path / name, clips, options) for name in ("whole", "parts"))
    train(ClipSet.open(clips, "train"), whole)
    training_on(clips, parts, options).loop(max_steps=4)
    assert main(["train", "--resume", str(parts.path), "--lr-latents", "0.01", "--device", "cpu"]) == 0
    assert not different(tensors(whole), tensors(parts))
    assert "resumed" not in RunDir.open(parts.path).options


def test_clips_that_moved(clips, tmp_path, capsys):
    old = write_clip_folder(tmp_path / "old", moving_squares(6))
    options = tiny_options(batch_size=2)
    run = new_run(tmp_path / "run", old, options)
    training_on(old, run, options).loop(max_steps=4)
    new = old.rename(tmp_path / "new")
    other = write_clip_folder(tmp_path / "other", moving_squares(6)[1:])
    resume = ["--resume", str(run.path), "--device", "cpu"]
    assert main(["train", *resume]) == 2
    assert f"vglann train CLIPS --resume {run.path}" in capsys.readouterr().err
    assert main(["train", str(other), *resume]) == 2
    assert "1 missing" in capsys.readouterr().err
    assert RunDir.open(run.path).options["clips"] == str(old)  # an error changes nothing
    assert main(["train", str(new), *resume]) == 0
    after = RunDir.open(run.path)
    assert after.options["clips"] == str(new)
    assert after.options["resumed"][0]["changed"] == {"clips": [str(old), str(new)]}
    assert after.checkpoints.load()[0]["finished"]
    assert main(["reconstruct", str(run.path)]) == 0


def test_another_machine_is_recorded_once(clips, tmp_path, monkeypatch):
    options = tiny_options(batch_size=2)
    run = new_run(tmp_path / "run", clips, options)
    began = json.loads((run.path / "environment.json").read_text())
    (run.path / "environment.json").write_text(json.dumps({**began, "torch": "2.10.0"}))
    opened = ClipSet.open(clips, "train")
    for _ in range(2):
        train(opened, RunDir.open(run.path), resume=True)
    (entry,) = RunDir.open(run.path).options["resumed"]
    assert entry == {"step": 0, "changed": {}, "environment": {"torch": ["2.10.0", torch.__version__]}}


HOLD = """
import sys, time
from vglann_fast.run.folder import RunDir
with RunDir.open(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_on_one_run(clips, tmp_path, capsys):
    run = new_run(tmp_path / "run", clips, tiny_options(batch_size=2, epochs=1))
    train(ClipSet.open(clips, "train"), run)
    before = {
        file: file.read_bytes() for file in run.path.rglob("*") if file.is_file() and file.name != ".lock"
    }
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for command in (["train", "--resume", str(run.path)], ["map", str(run.path)]):
            assert main([*command, "--device", "cpu"]) == 2
            assert f"{run.path} is being written by process {holder.pid} on " in capsys.readouterr().err
        assert all(file.read_bytes() == content for file, content in before.items())
    finally:
        holder.kill()
        holder.communicate()
    assert main(["train", "--resume", str(run.path), "--device", "cpu"]) == 0  # the lock died with its holder


def test_a_folder_that_was_taken_meanwhile(clips, tmp_path):
    options = tiny_options(batch_size=2, epochs=1)
    late = RunDir.new(tmp_path / "run", {"train": {}})
    run = new_run(tmp_path / "run", clips, options)
    training_on(clips, run, options).loop(max_steps=1)
    with pytest.raises(VglannError, match="is there already"), late.locked():
        late.begin()
    assert RunDir.open(run.path).options == run.options


def test_how_many_checkpoints_stay(clips, tmp_path):
    command = ["train", str(clips), *TINY, "--epochs", "5", "--checkpoint-every", "1", "--device", "cpu"]
    for keep in (1, 3):
        assert main([*command, "--out", str(tmp_path / str(keep)), "--keep-checkpoints", str(keep)]) == 0
    kept = {keep: sorted(f.name for f in (tmp_path / keep / "checkpoints").iterdir()) for keep in ("1", "3")}
    assert kept == {"1": ["step-00000015"], "3": ["step-00000009", "step-00000012", "step-00000015"]}


def test_deterministic_gives_the_same_bytes_twice(clips, tmp_path):
    command = ["train", str(clips), *TINY, "--epochs", "2", "--deterministic", "--device", "cpu"]
    for name in ("one", "two"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
        assert not torch.are_deterministic_algorithms_enabled()  # as it was before
    one, two = (sorted(Path(tmp_path / name / "checkpoints").rglob("*.*")) for name in ("one", "two"))
    assert [file.name for file in one] == [file.name for file in two]
    assert len(one) == 4
    assert all(first.read_bytes() == second.read_bytes() for first, second in zip(one, two, strict=True))
    assert json.loads((tmp_path / "one" / "options.json").read_text())["train"]["deterministic"] is True


BAD = {
    "graph with accumulate": ["--cuda-graph", "on", "--accumulate", "2"],
    "fp16 on a CPU": ["--precision", "fp16"],
    "tf32 on a CPU": ["--precision", "tf32"],
    "pinned without a GPU": ["--data", "pinned"],
    "compiled and deterministic": ["--compile", "--deterministic"],
    "no room for a width": ["--width", "1000000"],
    "no rate": ["--lr-generator", "0"],
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_what_does_not_go_together_is_one_line_and_makes_nothing(clips, tmp_path, capsys, options):
    command = ["train", str(clips), "--out", str(tmp_path / "run"), *TINY, *options, "--device", "cpu"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("vglann: error: --")
    assert not (tmp_path / "run").exists()
