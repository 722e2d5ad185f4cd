"""The tables of docs/scale.md: the cost of a training of many clips, and the largest batch of a GPU.

    python -m vglann_fast.experiments.scale FOLDER [--step-ms 1040]

FOLDER: an empty folder for clip folders of holes, which are removed again. Disk, index and its loading are measured
there. Memory is as in `memory_table`, as `vglann train` prints it when a device is full: activations are estimated,
the rest is exact. It knows nothing of the CUDA context, of cuDNN's workspaces and of what PyTorch's allocator leaves
unused, so a batch counts as fitting up to `ROOM` of the memory. No figure of a GPU is measured.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.sparse_clips import CLIP_BYTES, write_sparse_clips
from vglann_fast.glo.checkpoint import new_generator
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.memory import memory_table
from vglann_fast.options.presets import PRESETS
from vglann_fast.options.training import TrainOptions

COUNTS = (20, 10_000, 50_000, 600_000)
MEMORIES = (8, 12, 24, 80, 141)  # of GPUs, in GB of 10^9 bytes
SIZES = (64, 128)
FRAMES = 32
ROOM = 0.85
PINNED = 2  # batches of clips that `--data pinned` holds on the device


def clips_table(folder: Path, step_ms: float) -> str:
    """Markdown: a line for each of `COUNTS`, at 32 frames of 64x64 and the options of `modern`."""
    options = PRESETS["modern"].train
    lines = [
        "| clips | disk | index.json | opened in, CPU s | latents and their Adam | steps an epoch | hours an epoch |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count in COUNTS:
        index, seconds = _measured_index(folder / str(count), count)
        steps = max(1, count // options.batch_size)
        cells = [
            f"{count:,}",
            _bytes(count * CLIP_BYTES),
            _bytes(index),
            f"{seconds:.2g}",
            _bytes(latents_bytes(count, options)),
            f"{steps:,}",
            f"{steps * step_ms / 3.6e6:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def batches_table() -> str:
    """Markdown: the largest batch of each preset, size and memory; a dash where three videos do not fit."""
    lines = [
        f"| preset | size | {' | '.join(f'{memory} GB' for memory in MEMORIES)} |",
        "|---|---|" + "---:|" * len(MEMORIES),
    ]
    for name in ("modern", "paper", "demo"):
        for size in SIZES:
            found = [largest_batch(PRESETS[name].train, size, ROOM * memory * 1e9) for memory in MEMORIES]
            cells = ["–" if batch < 3 else f"{batch:,}" for batch in found]
            lines.append(f"| `{name}` | {FRAMES}x{size}x{size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def latents_bytes(count: int, options: TrainOptions) -> int:
    """Bytes of the latent table of `count` clips and its Adam."""
    with torch.device("meta"):
        table = LatentTable(torch.empty(count, options.latent_dim), [""] * count, options)
    return sum(tensor.numel() * tensor.element_size() for tensor in table.tensors().values())


def largest_batch(options: TrainOptions, size: int, room: float) -> int:
    """Return the most videos a batch may have in `room` bytes of a GPU that computes in bfloat16; 0 for none.

    Clips are `--data pinned`; latents are few.
    """
    with torch.device("meta"):
        generator = new_generator(options, FRAMES, size)
    step = total_bytes(generator, options, size, 2) - total_bytes(generator, options, size, 1)
    rest = total_bytes(generator, options, size, 0)
    return max(0, int((room - rest) // step))


def total_bytes(generator: TwoStreamGenerator, options: TrainOptions, size: int, batch: int) -> int:
    """Bytes of a training with batches of `batch` videos."""
    parts = memory_table(
        generator, [], options, batch_size=batch, frames=FRAMES, size=size, clips=PINNED * batch, half=True
    )
    return sum(amount for _, amount in parts)


def _measured_index(folder: Path, count: int) -> tuple[int, float]:
    """(bytes of index.json, CPU seconds to open the folder without its checksums)."""
    folder.mkdir(parents=True)
    try:
        write_sparse_clips(folder, count)
        started = time.process_time()
        ClipSet.open(folder, "train", verify=False)
        return (folder / "index.json").stat().st_size, time.process_time() - started
    finally:
        shutil.rmtree(folder)


def _bytes(amount: float) -> str:
    """Bytes in the largest unit that leaves at least one of it."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount:.0f} B"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--step-ms",
        type=float,
        default=1040.0,
        help="of 15 videos, width 64; measured with `paper` [%(default)s]",
    )
    a = parser.parse_args()
    print(clips_table(a.folder, a.step_ms), batches_table(), sep="\n\n")


if __name__ == "__main__":
    main()
