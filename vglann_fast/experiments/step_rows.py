"""The rows of the step benchmark: the GLANN-VIDEO step and ours, from the same weights over the same clips."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.glann_video_step import GlannVideoGenerator, GlannVideoStep
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.loader import clip_order
from vglann_fast.glo.training import Training
from vglann_fast.interop.glann_video import load_generator
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir

# Every kernel where `auto` takes one; and the convolutions, too.
KERNELS = "triton,upsample_conv=reference"
ALL_KERNELS = "triton"
# Row -> (options of the training, kernels). The author's row is not one of ours.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "author": ({}, ""),
    "fp32": ({"precision": "fp32"}, "reference"),
    "tf32": ({"precision": "tf32"}, "reference"),
    "bf16": ({"precision": "bf16"}, "reference"),
    "bf16 compile": ({"precision": "bf16", "compile": True}, "reference"),
    "bf16 kernels": ({"precision": "bf16"}, KERNELS),
    "bf16 compile kernels": ({"precision": "bf16", "compile": True}, KERNELS),
    "bf16 kernels graph": ({"precision": "bf16", "cuda_graph": "on", "data": "resident"}, KERNELS),
    "bf16 kernels convolutions graph": (
        {"precision": "bf16", "cuda_graph": "on", "data": "resident"},
        ALL_KERNELS,
    ),
}


WARM_UP = 2


Step = Callable[[int], Tensor]


def open_clips(folder: str | None, batch: int) -> ClipSet:
    """The training clips of `folder`, or some moving squares."""
    if folder is None:
        where = Path(tempfile.mkdtemp()) / "clips"
        folder = str(write_clip_folder(where, moving_squares(2 * batch, frames=32, size=64)))
    return ClipSet.open(folder, "train")


def author_and_ours(
    clips: ClipSet, batch: int, width: int, device: torch.device, changes: dict[str, Any]
) -> tuple[Step, Step, Training]:
    """Both steps from the same weights and latents, over the same clips in the same order."""
    given = {"width": width, "batch_size": batch, "data": "resident", "cuda_graph": "off", "epochs": 1000}
    options = replace(PRESETS["paper"].train, reuse_norms=False, **{**given, **changes})
    run = RunDir(Path(tempfile.mkdtemp()), {})
    training = new_training(clips, options, run, device=device)
    torch.manual_seed(0)
    theirs = GlannVideoGenerator(options.latent_dim, width).to(device)
    same = load_generator({name: value.cpu() for name, value in theirs.state_dict().items()})
    training.generator.load_state_dict(same.state_dict())
    table = torch.from_numpy(clips.read()).to(device)
    step = GlannVideoStep(theirs, training.latents.rows, table)
    per_epoch = training.steps_per_epoch

    def author(number: int) -> Tensor:
        epoch, position = divmod(number, per_epoch)
        rows = clip_order(0, epoch, len(clips))[position * batch : (position + 1) * batch]
        return step(torch.from_numpy(rows).to(device))

    def ours(number: int) -> Tensor:
        assert training.step == number
        return training.train_step(with_video=False)[0]

    return author, ours, training


def seconds_of(step: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """(seconds of one step, its loss); the device is idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, loss.item()
