"""The stages called as functions by a program that computes in its own way: it finds its state as it left it."""

import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from evaluated import instead_of_networks, mixed_folder
from tiny import COLORS, new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo.train import train
from vglann_fast.mapping.fit import fit_mapping
from vglann_fast.metrics import reconstruction
from vglann_fast.metrics.evaluate import evaluate
from vglann_fast.metrics.reconstruction import reconstruct
from vglann_fast.options.presets import PRESETS
from vglann_fast.report.page import write_report
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.invert import invert, invert_videos
from vglann_fast.samples.sample import interpolate, sample

STAGES = {
    "train": lambda run: train(ClipSet.open(run.parent / "clips", "train"), RunDir.open(run), resume=True),
    "map": lambda run: fit_mapping(run, "gaussian", PRESETS["modern"].map["gaussian"]),
    "map vae": lambda run: fit_mapping(run, "vae", PRESETS["demo"].map["vae"]),
    "sample": lambda run: sample(run, n=2, kind="gaussian"),
    "reconstruct": reconstruct,
    "interpolate": lambda run: interpolate(run, steps=2),
    "invert": lambda run: invert_videos(run, [run.parent / "clips"], starts=1, steps=2),
    "evaluate": lambda run: evaluate(run, kinds=["gaussian"], features=["x"], invert=1),
    "report": write_report,
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    mixed_folder(folder / "clips", 5, 3)
    run = new_run(folder / "run", folder / "clips", tiny_options(batch_size=2, epochs=2, batchnorm="eval"))
    train(ClipSet.open(folder / "clips", "train"), run)
    fit_mapping(run.path, "gaussian", PRESETS["modern"].map["gaussian"])
    sample(run.path, n=2, kind="gaussian")
    return folder


@pytest.fixture
def run(template, tmp_path, monkeypatch):
    instead_of_networks(monkeypatch, tmp_path / "cache", COLORS)
    monkeypatch.setattr(reconstruction, "invert", partial(invert, starts=1, steps=2))
    return shutil.copytree(template, tmp_path / "work") / "run"


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def host_state(request):
    """Settings that a host program may have made, and a way to look at them."""
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(request.param)
    torch.manual_seed(5)
    yield lambda: (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    )
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_the_state_of_its_caller(stage, run, host_state):
    before = host_state()
    STAGES[stage](run)
    assert host_state() == before


@pytest.mark.parametrize("kind", ["video.npy", "latents.npy"])
def test_the_same_samples_under_any_default_dtype(kind, template, run, host_state):
    sample(run, n=2, kind="gaussian")
    expected = np.load(template / "run" / "media" / "samples" / kind)
    assert np.array_equal(np.load(run / "media" / "samples" / kind), expected)
