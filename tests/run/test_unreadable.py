"""A file that cannot be read now is neither missing nor damaged: one line, and nothing older or else in its place."""

import errno
import os

import pytest
import torch
from failing_calls import fail_where
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import UnreadableError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import check_saved_size
from vglann_fast.mapping.fit import load_mapping
from vglann_fast.mapping.gaussian import Gaussian
from vglann_fast.mapping.split import run_shots
from vglann_fast.options.mapping import GaussianOptions
from vglann_fast.run.files import open_regular, read_json, sha256
from vglann_fast.run.folder import RunDir

PASSING = ["EBUSY", "EACCES", "EIO", "ESTALE", "EMFILE", "ETIMEDOUT"]


def fail_to_open(monkeypatch, number, name):
    """Let opening a file of this name fail."""
    fail_where(monkeypatch, "open", number, lambda path, *_: os.path.basename(path) == name)


@pytest.fixture
def run(tmp_path):
    run = RunDir.new(tmp_path / "run", {}).begin()
    for step in (1, 2):
        run.checkpoints.save(step, {"part": {"x": torch.full((1,), step)}}, {"ids": []})
    return run


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("file", ["state.json", "part.safetensors"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(run, monkeypatch, file, name):
    fail_to_open(monkeypatch, getattr(errno, name), file)
    with pytest.raises(UnreadableError, match=r"step-00000002.*move .* away"):
        run.checkpoints.load()
    assert not run.warnings


def test_an_error_in_the_middle_of_reading_counts_as_one_of_opening(tmp_path):
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UnreadableError, match="file"), open_regular(tmp_path / "file"):
        raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("file", ["state.json", "part.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "folder", "pipe", "loop", "EUCLEAN"])
def test_a_checkpoint_that_is_damaged_is_passed_over(run, monkeypatch, file, damage):
    damaged = run.path / "checkpoints" / "step-00000002" / file
    damaged.unlink()
    if damage == "folder":
        damaged.mkdir()
    elif damage == "pipe":
        os.mkfifo(damaged)
    elif damage == "loop":
        damaged.symlink_to(damaged.name)
    elif damage == "EUCLEAN":
        fail_where(monkeypatch, "open", errno.EUCLEAN, lambda path, *_: path == damaged)
    state, parts = run.checkpoints.load()
    assert (state["step"], parts["part"]["x"].item()) == (1, 1)
    assert "step-00000002 is damaged" in run.warnings[0]


@pytest.mark.parametrize("name", PASSING)
def test_every_reader_tells_it_from_damage(tmp_path, monkeypatch, name):
    """A clip folder is not to be packed again for it, a mapping not to be fitted again."""
    clips = write_clip_folder(tmp_path / "clips", moving_squares(4))
    options = tiny_options()
    run = new_run(tmp_path / "run", clips, options)
    ids = ClipSet.open(clips).ids
    tensors = {"generator": {"x": torch.ones(1)}, "latents": {"rows": torch.eye(4, 8)}}
    run.checkpoints.save(1, tensors, {"ids": ids})
    readers = {
        "index.json": [lambda: ClipSet.open(clips), lambda: run_shots(run, ids)],
        "clips-00000.npy": [lambda: ClipSet.open(clips)],
        "generator.safetensors": [lambda: check_saved_size(run, options)],
        "options.json": [lambda: RunDir.open(run.path)],
        "environment.json": [lambda: read_json(run.path / "environment.json"), run.recorded_environment],
        "metrics": [lambda: sha256(run.path / "metrics")],
    }
    (run.path / "metrics").touch()
    for file, reads in readers.items():
        for read in reads:
            with monkeypatch.context() as patch:
                fail_to_open(patch, getattr(errno, name), file)
                with pytest.raises(UnreadableError, match=file):
                    read()


def test_a_mapping_that_cannot_be_read_now_need_not_be_fitted_again(tmp_path, monkeypatch):
    folder = tmp_path / "mapping" / "gaussian"
    folder.mkdir(parents=True)
    mapping = Gaussian(8, GaussianOptions())
    mapping.fit(torch.eye(4, 8), torch.Generator().manual_seed(0))
    mapping.save(folder)
    run = RunDir(tmp_path, {})
    assert load_mapping(run, "gaussian").latent_dim == 8
    for file in ("mapping.json", "mapping.safetensors"):
        with monkeypatch.context() as patch:
            fail_to_open(patch, errno.EBUSY, file)
            with pytest.raises(UnreadableError, match=file):
                load_mapping(run, "gaussian")
