"""The training loop: it learns, it resumes exactly, it survives being killed, it stops when the loss is NaN."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked_process import Forked
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import latent_batches
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.loader import clip_order
from vglann_fast.glo.optimizer import learning_rate_factor
from vglann_fast.glo.train import train
from vglann_fast.metrics.reconstruction import reconstruction_metrics
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.signals import Interrupted


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(6))


def training_on(clips, run, seed=0):
    from vglann_fast.options.fields import options_from_json
    from vglann_fast.options.training import TrainOptions

    return new_training(
        ClipSet.open(clips, "train"), options_from_json(TrainOptions, run.options["train"]), run, seed=seed
    )


def final_tensors(run):
    _, parts = run.checkpoints.load()
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_it_learns(clips, tmp_path):
    run = new_run(tmp_path / "run", clips, tiny_options(width=8, epochs=60, latent_dim=32, lr_generator=0.01))
    train(ClipSet.open(clips, "train"), run, checkpoint_every=1000)
    trained = load_trained(run)
    assert not trained.generator.training
    real = ClipSet.open(clips, "train").read()
    from vglann_fast.samples.sample import render

    made = render(trained, trained.latents)
    measures = reconstruction_metrics(torch.from_numpy(made.video), torch.from_numpy(real))
    assert measures["psnr"].mean() > measures["psnr_mean_color"].mean() + 3
    rows = run.logs.metrics("glo")
    assert rows[-1]["step"] == 120
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert torch.allclose(trained.latents.norm(dim=1), torch.ones(6))


VARIANTS = {
    "modern": {},
    "paper": {"preset": "paper"},
    "lazy": {"latent_mode": "lazy", "schedule": "halve-every-tenth"},
    "expanded": {"variant": "expanded", "mask_weight": 0.1, "loss": "l1"},
    "accumulate": {"accumulate": 2, "epochs": 10},
    "bf16": {"precision": "bf16", "data": "resident"},
    "checkpointed": {"checkpoint_activations": True, "variant": "expanded"},
    "deterministic": {"deterministic": True, "sync_bn": True},
    "muon": {"optimizer": "muon", "ema": 0.99, "accumulate": 2, "epochs": 10, "checkpoint_activations": True},
    "muon per epoch": {"optimizer": "muon", "adam_state": "per-epoch", "variant": "expanded"},
    "sums": {"loss": "laplacian:1,l1:0.1,l2", "adam_state": "per-epoch", "latent_init": "normal"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_ten_steps_are_five_and_a_resume_and_five(clips, tmp_path, changes):
    changes = dict(changes)
    options = tiny_options(changes.pop("preset", "modern"), **changes)
    whole, parts = (new_run(tmp_path / name, clips, options) for name in ("whole", "parts"))
    train(ClipSet.open(clips, "train"), whole, log_every=1)
    training_on(clips, parts).loop(max_steps=5, log_every=1)  # in the middle of an epoch of two steps
    assert parts.checkpoints.load()[0]["step"] == 5
    train(ClipSet.open(clips, "train"), RunDir.open(parts.path), log_every=1, resume=True)
    assert_same(final_tensors(whole), final_tensors(parts))
    figures = [[(r["step"], r["loss"], r["psnr"]) for r in run.logs.metrics("glo")] for run in (whole, parts)]
    assert figures[0] == figures[1]
    assert [step for step, *_ in figures[0]] == list(range(1, 11))


def test_resuming_a_finished_run_changes_nothing(clips, tmp_path):
    run = new_run(tmp_path / "run", clips, tiny_options(epochs=1))
    train(ClipSet.open(clips, "train"), run)
    before = final_tensors(run)
    train(ClipSet.open(clips, "train"), run, resume=True)
    assert_same(before, final_tensors(run))


def test_lazy_follows_the_dense_table(clips, tmp_path):
    """Same trajectory, computed lazily; float32 rounding apart."""
    latents = []
    for mode in ("dense", "lazy"):
        options = tiny_options("paper", latent_mode=mode, latent_init="sphere", batch_size=2, epochs=4)
        run = new_run(tmp_path / mode, clips, options)
        train(ClipSet.open(clips, "train"), run)
        latents.append(final_tensors(run)["latents/rows"])
    assert torch.allclose(*latents, atol=1e-3)
    assert torch.allclose(latents[0].norm(dim=1), torch.ones(6))


def test_resumed_metrics_are_not_logged_twice(clips, tmp_path):
    run = new_run(tmp_path / "run", clips, tiny_options(epochs=3))
    training = training_on(clips, run)
    training.loop(max_steps=2, log_every=1)
    for _ in range(2):  # steps that were logged but whose checkpoint was never written
        loss, video, batch = training.train_step()
        training._log(loss, video, batch)
    train(ClipSet.open(clips, "train"), run, log_every=1, resume=True)
    assert [row["step"] for row in run.logs.metrics("glo")] == [1, 2, 3, 4, 5, 6]


def test_a_changed_clip_set_is_refused_with_a_list(clips, tmp_path):
    run = new_run(tmp_path / "run", clips, tiny_options())
    training_on(clips, run).loop(max_steps=1)
    fewer = write_clip_folder(tmp_path / "fewer", moving_squares(6)[1:])
    gone = ClipSet.open(clips, "train").ids[0]
    with pytest.raises(VglannError, match=rf"1 missing \({gone}\), 0 new"):
        train(ClipSet.open(fewer, "train"), run, resume=True)
    turned = write_clip_folder(tmp_path / "turned", moving_squares(6)[::-1])
    with pytest.raises(VglannError, match="another order"):
        train(ClipSet.open(turned, "train"), run, resume=True)


RESUME = ["--checkpoint-every", "1", "--log-every", "1", "--device", "cpu"]
CHILD = """
import sys
from vglann_fast.cli.main import main
sys.exit(main(["train", "--resume", *sys.argv[1:]]))
"""


def wait_for_checkpoint(run, after, process):
    for _ in range(2400):
        if run.checkpoints.exist() and run.checkpoints.folders()[-1].name > f"step-{after:08d}":
            return
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError("no checkpoint in two minutes")


def test_sigkill_never_loses_the_previous_checkpoint(clips, tmp_path):
    """Killed three times at moments when it does little but write checkpoints; each time one is whole."""
    run = new_run(tmp_path / "run", clips, tiny_options(epochs=100_000))
    random, last = np.random.default_rng(0), -1
    for _ in range(3):
        process = Forked(CHILD, [str(run.path), *RESUME], tmp_path / "said.txt", CUDA_VISIBLE_DEVICES="")
        wait_for_checkpoint(run, max(last, 0), process)
        time.sleep(random.uniform(0, 0.1))
        process.end(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, process.said()
        step = RunDir.open(run.path).checkpoints.load()[0]["step"]
        assert step > last
        last = step


def test_sigterm_finishes_the_step_saves_and_exits_143(clips, tmp_path):
    run = new_run(tmp_path / "run", clips, tiny_options(epochs=100_000))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", CHILD, str(run.path), *RESUME]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    wait_for_checkpoint(run, 0, process)
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert b"stopped by SIGTERM and saved" in process.stderr.read()
    process.stderr.close()
    assert run.checkpoints.load()[0]["step"] >= run.logs.metrics("glo")[-1]["step"]


def test_interrupted_is_raised_after_saving(clips, tmp_path):
    run = new_run(tmp_path / "run", clips, tiny_options(epochs=100))
    training = training_on(clips, run)
    step = training.train_step

    def step_and_signal(**wanted):
        if training.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(**wanted)

    training.train_step = step_and_signal
    with pytest.raises(Interrupted) as caught:
        training.loop()
    assert caught.value.exit_code == 143
    assert run.checkpoints.load()[0]["step"] == 4
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_torn_checkpoint_is_passed_over(clips, tmp_path):
    run = new_run(tmp_path / "run", clips, tiny_options())
    training = training_on(clips, run)
    for until in (2, 4):
        training.loop(max_steps=until)
    newest = run.checkpoints.folders()[-1] / "latents.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    reopened = RunDir.open(run.path)
    assert reopened.checkpoints.load()[0]["step"] == 2
    assert "step-00000004" in reopened.warnings[0]
    for folder in run.checkpoints.folders():
        (folder / "state.json").unlink()
    with pytest.raises(VglannError, match="no checkpoint that can be read"):
        RunDir.open(run.path).checkpoints.load()


def test_order_visits_every_clip_and_depends_on_seed_and_epoch_alone():
    first = clip_order(0, 0, 50)
    assert sorted(first) == list(range(50))
    assert np.array_equal(first, clip_order(0, 0, 50))
    assert not np.array_equal(first, clip_order(0, 1, 50))
    assert not np.array_equal(first, clip_order(1, 0, 50))


def test_schedules():
    paper, modern = tiny_options("paper", epochs=200), tiny_options("modern", epochs=200)
    assert [learning_rate_factor(paper, epoch) for epoch in (0, 19, 20, 199)] == [1, 1, 0.5, 0.5**9]
    assert learning_rate_factor(modern, 0) == 1
    assert learning_rate_factor(modern, 100) == pytest.approx(0.5)
    assert 0 < learning_rate_factor(modern, 199) < 1e-4


@pytest.mark.parametrize("count", [2, 3, 7, 2048, 5000])
def test_statistics_are_taken_over_few_latents_and_never_over_one(count):
    batches = list(latent_batches(torch.zeros(count, 4), 3))
    assert sum(map(len, batches)) <= 2048
    assert all(2 <= len(batch) <= 5 for batch in batches)


def test_what_cannot_be_trained_on(clips, tmp_path):
    options = tiny_options()
    one = write_clip_folder(tmp_path / "one", moving_squares(1))
    run = RunDir(tmp_path / "none", {})
    with pytest.raises(VglannError, match="at least 2 clips"):
        new_training(ClipSet.open(one, "train"), options, run)
    odd = write_clip_folder(tmp_path / "odd", moving_squares(2, frames=10))
    with pytest.raises(VglannError, match="frames: expected a positive multiple of 16, got 10"):
        new_training(ClipSet.open(odd, "train"), options, run)


def test_seed_decides_the_start(clips, tmp_path):
    runs = [RunDir(tmp_path / "none", {})] * 3
    starts = [training_on_options(clips, run, seed) for run, seed in zip(runs, (0, 0, 1), strict=True)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def training_on_options(clips, run, seed):
    training = new_training(ClipSet.open(clips, "train"), replace(tiny_options(), epochs=1), run, seed=seed)
    return training.generator.stem.weight.detach()
