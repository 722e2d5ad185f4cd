"""As many clips as a cluster packs: a folder of 150,000, in sparse files that take no room on the disk."""

import json

from forked_process import Forked

from vglann_fast.experiments.sparse_clips import write_sparse_clips

CLIPS = 150_000
# Bytes of memory a clip: the text and the objects of its index entry, its latent with Adam's moments, and the
# permutations of an epoch.
BYTES = 1500
STEP = """
import json, sys
from pathlib import Path
from faults.load import peak_bytes
from tiny import tiny_options
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo.assemble import new_training
from vglann_fast.run.folder import RunDir
options = tiny_options("modern", latent_dim=8, latent_init="sphere", epochs=1)

def steps_of(folder):
    clips = ClipSet.open(folder, "train", verify=False)
    training = new_training(clips, options, RunDir(Path(sys.argv[3]), {}))
    rows = [row for _ in range(3) for row in training.train_step()[2].rows.tolist()]
    return {"clips": len(clips), "steps": training.steps_per_epoch, "rows": rows}

steps_of(sys.argv[1])
before = peak_bytes()
found = steps_of(sys.argv[2])
print(json.dumps(found | {"grown": peak_bytes() - before}), flush=True)
"""


def test_they_are_opened_shuffled_and_stepped_through_in_bounded_memory(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    many.mkdir()
    write_sparse_clips(few, 30)
    write_sparse_clips(many, CLIPS)
    # A process of its own, whose peak is of this alone. With few clips first: PyTorch takes memory once.
    words = [str(few), str(many), str(tmp_path / "run")]
    process = Forked(STEP, words, tmp_path / "said.txt")
    assert process.wait(300) == 0, process.said()
    found = json.loads(process.said().splitlines()[-1])
    assert found["clips"] == CLIPS
    assert found["steps"] == CLIPS // 3
    # Drawn from the whole folder, each once.
    assert len(set(found["rows"])) == 9
    assert max(found["rows"]) > CLIPS // 2
    assert found["grown"] < CLIPS * BYTES
