"""A training of many tiny steps, watched for what grows: memory, open files, the log.

    python tests/soak.py [STEPS]     prints the figures; 100,000 steps take about half an hour on one CPU core

`tests/test_soak.py` takes a few hundred of them.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from tiny import moving_squares, new_run, tiny_options, write_clip_folder

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo.train import Training


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """File handles of this process."""
    return len(os.listdir("/proc/self/fd"))


def soak(steps: int, folder: Path, warm_up: int = 100) -> dict[str, float]:
    """Train `steps` tiny steps, with a line of the log every 10 and a checkpoint every 50.

    Returns what was more after them than after `warm_up` steps: {"bytes", "files", "checkpoints"}, and of the log
    "bytes_per_line" over the last tenth of the lines as a share of that over the first.
    """
    clips = write_clip_folder(folder / "clips", moving_squares(4, size=32))
    options = tiny_options("modern", width=1, latent_dim=4, batch_size=2, levels=1, epochs=10**6)
    run = new_run(folder / "run", clips, options)
    training = Training(ClipSet.open(clips, "train"), options, run)
    training.loop(max_steps=warm_up, checkpoint_every=25)
    before = resident_bytes(), open_files(), len(list((run.path / "checkpoints").iterdir()))
    training.loop(max_steps=warm_up + steps, checkpoint_every=25)
    after = resident_bytes(), open_files(), len(list((run.path / "checkpoints").iterdir()))
    training.source.close()
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == (warm_up + steps) // 10
    tenth = max(1, len(lines) // 10)
    sizes = [sum(map(len, part)) / tenth for part in (lines[:tenth], lines[-tenth:])]
    grown = [late - early for early, late in zip(before, after, strict=True)]
    return dict(zip(("bytes", "files", "checkpoints"), grown, strict=True)) | {
        "bytes_per_line": sizes[1] / sizes[0]
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        print(soak(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, Path(temporary)))
