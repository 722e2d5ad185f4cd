"""Trainings from one seed that differ in how they compute, and how far their reconstructions are apart.

    python -m vglann_fast.experiments.parity --clips CLIPS [--preset modern] [--steps 300] [--width 64] [--batch 15]

All steps are full ones, and the preset's schedule ends with the last. The clips are the same in the same order. The
first training is in float32 with plain PyTorch; each of the others changes one thing more: bfloat16, the Triton
kernels, the CUDA graph. Prints the PSNR of each over all clips, rendered in float32 by plain PyTorch with BatchNorm's
statistics estimated again. Exit code 1 when one is more than 0.3 dB from the first or could not be trained. A CPU has
the first two rows.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vglann_kernels import ImplUnavailable, choices
from vglann_kernels.impl import using_impl

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import psnr, to_uint8
from vglann_fast.errors import VglannError
from vglann_fast.experiments.step_rows import ROWS, open_clips
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import latent_batches, recompute_batchnorm
from vglann_fast.glo.precision import training_numerics
from vglann_fast.glo.training import Training
from vglann_fast.options.presets import preset
from vglann_fast.run.folder import RunDir

MAX_APART = 0.3  # dB
LOG_EVERY = 10
ROWS_ON = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "bf16 kernels", "bf16 kernels graph")}


def trained_psnr(
    row: str, clips: ClipSet, name: str, steps: int, device: torch.device, **size: int
) -> dict[str, Any]:
    """Train one row; {"psnr": [N] dB of the clips, "loss": of the last step, "seconds": of all, "ops"}.

    `size`: width and batch_size. Raises `VglannError` or `ImplUnavailable` for a row that cannot run on `device`.
    """
    changes, kernels = ROWS[row]
    values: dict[str, Any] = {**size, "cuda_graph": "off", "background_share": 0.0, **changes}
    options = replace(preset(name).train, **values)
    per_epoch = len(clips) // min(len(clips), options.batch_size)
    options = replace(options, epochs=-(-steps // per_epoch))
    with (
        tempfile.TemporaryDirectory() as folder,
        using_impl(kernels),
        training_numerics(options, device),
    ):
        training = new_training(clips, options, RunDir(Path(folder), {}), device=device)
        started = time.perf_counter()
        for step in range(steps):
            loss, *_ = training.train_step(with_video=step % LOG_EVERY == 0)  # as the loop, which logs
        found: dict[str, Any] = {"loss": loss.item(), "seconds": time.perf_counter() - started}
        training.check_finite()
        training.source.close()
        found["ops"] = sorted({choice.impl for choice in choices(device)})
    with using_impl("reference"):
        return {**found, "psnr": reconstruction_psnr(training)}


@torch.no_grad()
def reconstruction_psnr(training: Training) -> Tensor:
    """PSNR [N] of all clips, as `vglann reconstruct` has it: in float32, BatchNorm in eval mode."""
    generator, table = training.generator, training.latents.rows
    recompute_batchnorm(generator, latent_batches(table, training.batch_size))
    generator.eval()
    found = []
    for rows in torch.arange(len(table)).split(training.batch_size):
        made = to_uint8(generator(table[rows.to(table.device)]), training.options.target_limits)
        found.append(psnr(made.cpu(), torch.from_numpy(training.clips.read(rows.numpy()))))
    return torch.cat(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the rows, print them, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", help="clip folder; default: made up")
    parser.add_argument("--preset", default="modern", choices=("modern", "modern-2026a", "paper"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=15)
    a = parser.parse_args(arguments)
    device, clips = torch.device(a.device), open_clips(a.clips, a.batch)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{len(clips)} clips, preset {a.preset}, {a.steps} steps of {a.batch}, width {a.width}, "
        f"torch {torch.__version__}, {name}"
    )
    first, failed = None, []
    for row in ROWS_ON[device.type]:
        try:
            found = trained_psnr(row, clips, a.preset, a.steps, device, width=a.width, batch_size=a.batch)
        except (
            VglannError,
            ImplUnavailable,
            RuntimeError,
        ) as error:  # also what a capture or a compiler raises
            failed.append(row)
            print(f"{row:20} {type(error).__name__}: {' '.join(str(error).split())[:500]}", flush=True)
            continue
        first = found if first is None else first
        apart = found["psnr"].mean() - first["psnr"].mean()
        by_clip = (found["psnr"] - first["psnr"]).abs().max()
        print(
            f"{row:20} {found['psnr'].mean():6.2f} dB ({apart:+.2f}; of one clip at most {by_clip:.2f}), last loss "
            f"{found['loss']:.4f}, {found['seconds']:.1f} s, {' and '.join(found['ops'])}",
            flush=True,
        )
        if not abs(apart) <= MAX_APART:
            failed.append(row)
    print(f"more than {MAX_APART} dB apart: {', '.join(failed)}" if failed else f"all within {MAX_APART} dB")
    return 1 if failed else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress
    sys.exit(main())
