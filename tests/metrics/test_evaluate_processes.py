"""An evaluation in several processes: the figures of one."""

import json
from functools import partial

import pytest
from evaluated import instead_of_networks, trained_run
from forked_process import ranks

from vglann_fast.cli.main import main
from vglann_fast.metrics import evaluate, reconstruction
from vglann_fast.samples.invert import invert

pytestmark = pytest.mark.usefixtures("one_thread")

EVALUATE = """
import sys
from functools import partial
from pytest import MonkeyPatch
from evaluated import instead_of_networks
from vglann_fast.cli.main import main
from vglann_fast.metrics import evaluate, reconstruction
from vglann_fast.samples.invert import invert
instead_of_networks(MonkeyPatch(), sys.argv[1])
reconstruction.invert = partial(invert, starts=2, steps=2)
evaluate._BLOCK = int(sys.argv[2])
runs = int(sys.argv[3])
sys.exit(max(main(["evaluate", run, *sys.argv[4 + runs :]]) for run in sys.argv[4 : 4 + runs]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the same clips in both modes of BatchNorm: with "train" a video depends on the batch it is made in."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        trained_run(folder / mode, training=13, held_out=11, epochs=2, batchnorm=mode)
        for mode in ("eval", "train")
    ]


def records(run):
    """The records of an evaluation by name; their files are removed."""
    found = {}
    for file in (run.path / "evaluation").iterdir():
        found[file.stem] = json.loads(file.read_text())
        file.unlink()
    return found


@pytest.mark.parametrize(
    ("block", "modes", "words"),
    [
        # Shares of two blocks and of one; a process without a clip to invert.
        (3, 2, ["--invert", "2"]),
        # A process without a video of either side.
        (64, 1, ["--invert", "0", "-n", "2"]),
    ],
)
def test_three_processes_find_what_one_finds(runs, tmp_path, monkeypatch, block, modes, words):
    runs = runs[:modes]
    monkeypatch.setattr(reconstruction, "invert", partial(invert, starts=2, steps=2))
    monkeypatch.setattr(evaluate, "_BLOCK", block)
    paths, words = [str(run.path) for run in runs], ["--features", "lite0", "--device", "cpu", *words]
    with monkeypatch.context() as patch:
        instead_of_networks(patch, tmp_path / "cache-of-one")
        assert all(main(["evaluate", path, *words]) == 0 for path in paths)
    alone = [records(run) for run in runs]
    assert set(alone[0]) == {"reconstruction", "training-latents", "imle", "gaussian"}

    started = ranks(EVALUATE, tmp_path / "cache", block, modes, *paths, *words, folder=tmp_path, size=3)
    codes = [process.wait(300) for process in started]
    assert codes == [0, 0, 0], [process.said() for process in started]
    together = [records(run) for run in runs]
    for name in alone[0]:
        assert [one[name] for one in together] == [one[name] for one in alone]
    # The second run has the clips of the first, so their features were known, to all processes.
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
