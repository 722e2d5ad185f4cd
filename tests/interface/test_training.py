"""`vf.train` and `vf.resume`: what they record, what they refuse, and that the caller's process stays as it was."""

import json
import logging
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch
from vglann_kernels import resolve

import vglann_fast as vf
from vglann_fast.cli.main import main
from vglann_fast.interface import training
from vglann_fast.interface.machine import computing
from vglann_fast.runtime.signals import Interrupted


def checkpoint(path):
    """The bytes of the newest checkpoint of a run, by file name."""
    return {file.name: file.read_bytes() for file in max((path / "checkpoints").iterdir()).iterdir()}


def test_a_run_is_what_the_command_makes(clips, tiny, tmp_path, capsys):
    options = {**tiny, "epochs": 2, "lr_latents": 0.02, "mask_weight": 1}
    run = vf.train(vf.ClipSet.open(clips), tmp_path / "a", seed=4, **options)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["train", str(clips), "--out", str(tmp_path / "b"), "--seed", "4", *words]) == 0
    a, b = (json.loads((tmp_path / name / "options.json").read_text()) for name in "ab")
    assert a == b
    assert checkpoint(run.path) == checkpoint(tmp_path / "b")
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["vglann-fast"] == vf.__version__


MISTAKES = {
    "misspelled": ({"epoch": 3}, "did you mean epochs?"),
    "with a dash": ({"batch-size": 3}, "did you mean batch_size?"),
    "misspelled keyword": ({"sede": 3}, "did you mean seed?"),
    "like nothing": ({"zzz": 3}, "vglann train --help"),
    "a string": ({"epochs": "3"}, "epochs: expected a whole number"),
    "a fraction": ({"epochs": 2.5}, "epochs: expected a whole number"),
    "a yes": ({"width": True}, "width: expected a whole number"),
    "a number for a yes": ({"compile": 1}, "compile: expected True or False"),
    "out of range": ({"batch_size": 1}, "batch-size"),
    "unknown choice": ({"latent_init": "zeros"}, "latent-init"),
    "unknown preset": ({"preset": "best"}, "modern"),
    "negative seed": ({"seed": -1}, "seed"),
    "log never": ({"log_every": 0}, "log-every"),
    "no such device": ({"device": "tpu9"}, "--device tpu9"),
    "no such kernels": ({"kernels": "warp"}, "--kernels"),
    "a GPU's precision": ({"device": "cpu", "precision": "fp16"}, "--precision fp16"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence_and_makes_nothing(clips, tmp_path, name):
    options, words = MISTAKES[name]
    with pytest.raises(vf.VglannError, match=re.escape(words)) as caught:
        vf.train(clips, tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_numbers(clips, tiny, tmp_path):
    run = vf.train(clips, tmp_path / "run", **{**tiny, "epochs": np.int64(1), "lr_latents": np.float32(0.5)})
    assert vf.load(run.path).options.epochs == 1
    assert run.options.lr_latents == 0.5


def test_a_stopped_training_is_resumed_to_the_same_bits(clips, tiny, tmp_path):
    whole = vf.train(clips, tmp_path / "whole", **tiny)

    class Stop(logging.Handler):
        """The training logs its first line after its first step. A second signal would kill."""

        def emit(self, record):
            logger.removeHandler(self)
            os.kill(os.getpid(), signal.SIGTERM)

    stop, logger = Stop(logging.INFO), logging.getLogger("vglann_fast")
    level = logger.level
    logger.addHandler(stop)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(Interrupted):
            vf.train(clips, tmp_path / "run", **tiny)
    finally:
        logger.removeHandler(stop)
        logger.setLevel(level)
    assert 0 < vf.load(tmp_path / "run").step < whole.step
    run = vf.resume(tmp_path / "run", clips)
    assert run.step == whole.step
    assert checkpoint(run.path) == checkpoint(whole.path)


def test_a_resume_takes_rates_and_no_option_that_is_fixed(run):
    before = (run.path / "options.json").read_bytes()
    for options, words in (({"epochs": 9}, "epochs"), ({"lr_generater": 0.1}, "did you mean lr_generator?")):
        with pytest.raises(vf.VglannError, match=re.escape(words)):
            vf.resume(run.path, **options)
    with pytest.raises(vf.VglannError, match="not a run"):
        vf.resume(run.path / "checkpoints")
    assert (run.path / "options.json").read_bytes() == before
    assert vf.resume(run.path).step == run.step


def test_a_second_training_in_the_process_is_refused_until_the_first_has_ended(
    clips, tiny, tmp_path, monkeypatch
):
    started, finish = threading.Event(), threading.Event()

    def slow(*arguments, **keywords):
        started.set()
        assert finish.wait(60)
        raise ValueError("a training that fails")

    monkeypatch.setattr(training, "train_run", slow)
    errors = []

    def first():
        try:
            vf.train(clips, tmp_path / "a", **tiny)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    assert started.wait(60)
    monkeypatch.undo()
    with pytest.raises(vf.VglannError, match="training already"):
        vf.train(clips, tmp_path / "b", **tiny)
    assert not (tmp_path / "b").exists()
    finish.set()
    thread.join()
    assert errors == ["a training that fails"]
    assert vf.train(clips, tmp_path / "b", **tiny).step == 6


def in_a_thread(results, call):
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread


def test_a_training_in_a_thread_and_other_calls_do_not_disturb_each_other(clips, tiny, tmp_path, run):
    alone = vf.train(clips, tmp_path / "alone", **tiny)
    sampled = run.sample(3, seed=1)
    mapped = run.fit_mapping("vae", epochs=2).joinpath("mapping.safetensors").read_bytes()
    trained, samples = [], []
    thread = in_a_thread(trained, lambda: vf.train(clips, tmp_path / "thread", **tiny))
    others = [in_a_thread(samples, lambda: vf.load(run.path).sample(3, seed=1)) for _ in range(3)]
    again = run.fit_mapping("vae", epochs=2).joinpath("mapping.safetensors").read_bytes()
    for other in [thread, *others]:
        other.join()
    assert checkpoint(trained[0].path) == checkpoint(alone.path)
    assert len(samples) == 3
    assert all(np.array_equal(sample, sampled) for sample in samples)
    assert again == mapped


@pytest.fixture
def foreign():
    """A program with its own default dtype and device, random state and number of threads."""
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_dtype(before[0])
    torch.set_default_device(None)
    torch.set_num_threads(before[1])


def state():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "random": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "kernels": str(resolve("nearest", device="cpu")),
        "signal": signal.getsignal(signal.SIGINT),
    }


def test_every_call_leaves_the_process_as_it_was_and_does_not_mind_how_it_was(foreign, clips, tiny, tmp_path):
    before = state()
    kernels = "reference,nearest=faiss"
    made = vf.train(clips, tmp_path / "run", **tiny, device="cpu", kernels=kernels, deterministic=True)
    assert state() == before
    calls = [
        lambda: made.fit_mapping("imle", epochs=1),
        lambda: made.sample(2),
        lambda: made.reconstruct(made.ids[:1]),
        lambda: made.invert(made.reconstruct(made.ids[:1]), starts=1, steps=1),
        lambda: made.interpolate(made.ids[0], made.ids[1], 2),
        lambda: made.evaluate(features=()),
        made.report,
        lambda: vf.load(made.path, device="cpu", kernels=kernels),
    ]
    for call in calls:
        call()
        assert state() == before
    assert made.latents.dtype == torch.float32
    assert made.latents.device.type == "cpu"


def test_kernels_hold_inside_a_call_and_in_its_thread_alone():
    def other_thread():
        results = []
        in_a_thread(results, lambda: resolve("nearest", device="cpu").impl).join()
        return results[0]

    with computing(torch.device("cpu"), "reference,nearest=faiss"):
        assert resolve("nearest", device="cpu").impl == "faiss"
        assert other_thread() == "reference"
    assert resolve("nearest", device="cpu").impl == "reference"


def test_nothing_is_printed(clips, tiny, tmp_path, capfd):
    run = vf.train(clips, tmp_path / "run", **tiny)
    run.fit_mapping("imle", epochs=2)
    run.sample(2)
    run.invert(run.reconstruct(run.ids[:1]), starts=1, steps=1)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
