"""As many clips as a cluster packs: a folder of 600,000, in sparse files that take no room on the disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vglann_fast.experiments.sparse_clips import write_sparse_clips

CLIPS, DIMENSIONS = 600_000, 8
# Bytes of memory a clip: the text and the objects of its index entry, its latent with Adam's moments, and the
# permutations of an epoch.
BYTES = 1500
STEP = """
import json, sys
from pathlib import Path
import torch
from faults.load import peak_bytes
from tiny import tiny_options
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo.assemble import new_training
from vglann_fast.run.folder import RunDir
torch.set_num_threads(1)
before = peak_bytes()
clips = ClipSet.open(sys.argv[1], "train", verify=False)
options = tiny_options("modern", latent_dim=8, latent_init="sphere", epochs=1)
training = new_training(clips, options, RunDir(Path(sys.argv[2]), {}))
rows = []
for _ in range(3):
    rows += training.train_step()[2].rows.tolist()
found = {"clips": len(clips), "steps": training.steps_per_epoch, "rows": rows, "grown": peak_bytes() - before}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("many")
    write_sparse_clips(where, CLIPS)
    return where


def test_they_are_opened_shuffled_and_stepped_through_in_bounded_memory(folder, tmp_path):
    # A process of its own, whose peak is of this alone.
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = {[str(tests), str(tests / 'fixtures')]!r}\n{STEP}"
    command = [sys.executable, "-c", code, folder, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["clips"] == CLIPS
    assert found["steps"] == CLIPS // 3
    # Drawn from the whole folder, each once.
    assert len(set(found["rows"])) == 9
    assert max(found["rows"]) > CLIPS // 2
    assert found["grown"] < CLIPS * BYTES
