"""A training of many tiny steps, watched for what grows: memory, open files, the log.

    python tests/soak.py [STEPS]     prints the figures; 100,000 steps take about half an hour on one CPU core

`tests/test_soak.py` takes a few hundred of them.
"""

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

import torch
from tiny import moving_squares, new_run, tiny_options, write_clip_folder

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo.assemble import new_training


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2, see mallinfo(3)."""

    _fields_ = tuple((f"field{n}", ctypes.c_size_t) for n in range(10))
    mapped = property(lambda self: self.field4)  # hblkhd
    given_out = property(lambda self: self.field7)  # uordblks


def allocated() -> tuple[int, int]:
    """(bytes that malloc has given out, tensors among them; blocks of Python's own allocator).

    What a leak adds to. Resident memory also has what was freed and kept, which wanders by a megabyte and more.
    """
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = MallocInfo
    found = libc.mallinfo2()
    return found.given_out + found.mapped, sys.getallocatedblocks()


def open_files() -> int:
    """File handles of this process."""
    return len(os.listdir("/proc/self/fd"))


def soak(steps: int, folder: Path, warm_up: int = 100) -> dict[str, float]:
    """Train `steps` tiny steps, with a line of the log every 10 and a checkpoint every 50.

    Returns what was more after them than after `warm_up` steps: {"bytes" resident, "malloc" bytes and Python's
    "blocks" as `allocated` counts, "files", "checkpoints"}, and of the log "bytes_per_line" over the last tenth of
    the lines as a share of that over the first.
    """
    clips = write_clip_folder(folder / "clips", moving_squares(4, size=32))
    options = tiny_options("modern", width=1, latent_dim=4, batch_size=2, levels=1, epochs=10**6)
    run = new_run(folder / "run", clips, options)
    training = new_training(ClipSet.open(clips, "train"), options, run)
    training.loop(max_steps=warm_up, checkpoint_every=25)
    before = measured(run.path)
    training.loop(max_steps=warm_up + steps, checkpoint_every=25)
    after = measured(run.path)
    training.source.close()
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == (warm_up + steps) // 10
    tenth = max(1, len(lines) // 10)
    sizes = [sum(map(len, part)) / tenth for part in (lines[:tenth], lines[-tenth:])]
    grown = {name: after[name] - before[name] for name in before}
    return grown | {"bytes_per_line": sizes[1] / sizes[0]}


def measured(run: Path) -> dict[str, float]:
    """What must not grow."""
    malloc, blocks = allocated()
    checkpoints = len(list((run / "checkpoints").iterdir()))
    return {
        "bytes": resident_bytes(),
        "malloc": malloc,
        "blocks": blocks,
        "files": open_files(),
        "checkpoints": checkpoints,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        print(soak(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, Path(temporary)))
