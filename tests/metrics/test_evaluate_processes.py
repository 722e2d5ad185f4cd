"""An evaluation in several processes: the figures of one."""

import json
from functools import partial

import pytest
import torch
from evaluated import instead_of_networks, trained_run
from several_processes import finish, processes

from vglann_fast.cli.main import main
from vglann_fast.metrics import reconstruction
from vglann_fast.samples.invert import invert

# Three processes: none of them has as many blocks as another, and one has no clip to invert.
ARGUMENTS = ["--features", "lite0", "--invert", "2", "--device", "cpu"]
EVALUATE = """
import sys
from functools import partial
from pytest import MonkeyPatch
from evaluated import instead_of_networks
from vglann_fast.cli.main import main
from vglann_fast.metrics import reconstruction
from vglann_fast.samples.invert import invert
instead_of_networks(MonkeyPatch(), sys.argv[1])
reconstruction.invert = partial(invert, starts=2, steps=2)
sys.exit(max(main(["evaluate", run, *sys.argv[4:]]) for run in sys.argv[2:4]))
"""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def records(run):
    """Read what an evaluation wrote, by name, and remove each file."""
    found = {}
    for file in (run.path / "evaluation").iterdir():
        found[file.stem] = json.loads(file.read_text())
        file.unlink()
    return found


def test_three_processes_find_what_one_finds(tmp_path, monkeypatch, one_thread):
    """In both modes of BatchNorm: with mode "train" a video depends on the batch it is made in."""
    monkeypatch.setattr(reconstruction, "invert", partial(invert, starts=2, steps=2))
    runs = [
        trained_run(tmp_path / mode, training=13, held_out=11, epochs=2, batchnorm=mode)
        for mode in ("eval", "train")
    ]
    paths = [str(run.path) for run in runs]
    with monkeypatch.context() as patch:
        instead_of_networks(patch, tmp_path / "cache-of-one")
        assert all(main(["evaluate", path, *ARGUMENTS]) == 0 for path in paths)
    alone = [records(run) for run in runs]
    assert set(alone[0]) == {"reconstruction", "training-latents", "imle", "gaussian"}

    codes, said = finish(processes(EVALUATE, tmp_path / "cache", *paths, *ARGUMENTS, size=3))
    assert codes == [0, 0, 0], said
    assert [records(run) for run in runs] == alone
    # The second run's clips are the clips of the first, so their features were known, to all processes.
    kept = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(kept) == 2
