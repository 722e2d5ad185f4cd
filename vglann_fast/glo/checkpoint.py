"""Checkpoints of a GLO training, and loading what was trained.

A checkpoint has the parts `generator` (its state dict), `latents` (`LatentTable.tensors` of all clips, and "lr")
and `optimizer` (`GeneratorAdam.tensors`), and in state.json

    step       updates taken since the training began
    epoch      whole passes over the clips since then
    position   updates taken in the pass that is not whole yet
    processes  how many there were; another number repeats the pass that is not whole
    seconds    of training so far
    finished   whether it was the last step
    ids        the clip ids in the order of the latents

It does not depend on how many processes trained: process 0 writes the latents of all of them in clip order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vglann_fast.config import TrainOptions, options_from_json
from vglann_fast.errors import VglannError
from vglann_fast.glo.distributed import Ranks
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.latents import LatentTable
from vglann_fast.run_dir import RunDir

RECOMPUTE_LATENTS = 2048  # latents over which BatchNorm statistics are averaged


@dataclass(frozen=True)
class Trained:
    """What a GLO training left behind, ready to use."""

    generator: TwoStreamGenerator
    latents: Tensor  # [N, d] on the generator's device
    ids: list[str]
    options: TrainOptions
    step: int


def load_trained(run: RunDir, device: torch.device | str = "cpu") -> Trained:
    """Generator and latents of a run's newest checkpoint, the generator in the mode it samples in.

    Raises `VglannError` when there is no whole checkpoint, or when it is of another generator than the options.
    """
    state, parts = run.load_checkpoint()
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    generator = new_generator(options, run.options["frames"], run.options["size"])
    try:
        generator.load_state_dict(parts["generator"])
        rows = parts["latents"]["rows"]
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise VglannError(f"{run.path}: checkpoint and options.json do not fit together: {reason}") from error
    generator.to(device).channels_last().train(options.batchnorm == "train").requires_grad_(False)
    return Trained(generator, rows.to(device), state["ids"], options, state["step"])


def new_generator(options: TrainOptions, frames: int, size: int) -> TwoStreamGenerator:
    """The generator these options describe. Raises `VglannError` for clips it cannot make."""
    try:
        return TwoStreamGenerator(
            options.variant,
            options.latent_dim,
            options.width,
            frames=frames,
            size=size,
            latent_norm=options.latent_norm,
            reuse_norms=options.reuse_norms,
        )
    except ValueError as error:
        raise VglannError(f"clips of {frames} frames of {size}x{size}: {error}") from error


def gathered_latents(latents: LatentTable, ranks: Ranks, count: int) -> dict[str, Tensor]:
    """The tensors of the whole latent table, from the rows of all processes: complete in process 0."""
    tensors = latents.tensors()
    whole = {name: ranks.gather_rows(t, count) if t.ndim else t for name, t in tensors.items()}
    return {**whole, "lr": latents.lr}


def place_in_run(state: dict[str, Any], processes: int) -> tuple[int, int]:
    """(epoch, position) at which `processes` processes continue; the epoch's start if their number changed."""
    same = state["processes"] == processes
    return state["epoch"], state["position"] if same else 0


def latent_batches(rows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches for `recompute_batchnorm`: at most 2,048 of the latents, evenly spaced, none alone in its batch."""
    chosen = rows[:: -(-len(rows) // RECOMPUTE_LATENTS)]
    yield from torch.tensor_split(chosen, max(1, len(chosen) // batch_size))


def check_same_clips(trained: list[str], present: list[str]) -> None:
    """Raise `VglannError`, listing what is missing and new, unless both hold the same clips in the same order."""
    if trained == present:
        return
    missing, new = sorted(set(trained) - set(present)), sorted(set(present) - set(trained))
    if not missing and not new:
        raise VglannError("the clips are in another order than when the run began; pack them as they were")
    raise VglannError(
        f"the clip set changed since the run began: {len(missing)} missing ({', '.join(missing[:3])}), "
        f"{len(new)} new ({', '.join(new[:3])}); give the run its old clips or start a new one"
    )
