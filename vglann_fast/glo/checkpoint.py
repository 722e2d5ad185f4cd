"""Checkpoints of a GLO training, and loading what was trained.

A checkpoint has the parts `generator` (its state dict), `latents` (`LatentTable.tensors` of all clips, and "lr"),
`optimizer` (`GeneratorOptimizer.tensors`) and with --ema `average` (the state dict of the averaged generator), and in
state.json

    step       updates taken since the training began
    epoch      whole passes over the clips since then
    position   updates taken in the pass that is not whole yet
    processes  how many there were; another number repeats the pass that is not whole
    finished   whether it was the last step
    ids        the clip ids in the order of the latents
    weights    sha256 of the weight file of each network in the loss, by the network's name

It does not depend on how many processes trained: process 0 writes the latents of all of them in clip order. Nor does
it hold a time: the same training writes the same bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.glo.average import GeneratorAverage
from vglann_fast.glo.background import inflate
from vglann_fast.glo.batchnorm import latent_batches, recompute_batchnorm
from vglann_fast.glo.generator import UPSAMPLING, TwoStreamGenerator
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.optimizer import GeneratorOptimizer
from vglann_fast.glo.perceptual import check_weights
from vglann_fast.glo.resume import check_clips, matched_latents
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import OnMismatch, TrainOptions
from vglann_fast.run.files import tensors_header
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.numerics import seeded

KEEP = 2  # checkpoints of a run: the newest, and the one before should that be torn


@dataclass(frozen=True)
class Place:
    """Progress of a training: `step` updates in all, `epoch` whole passes, `position` updates in the pass since."""

    step: int
    epoch: int
    position: int


@dataclass(frozen=True)
class LearnedState:
    """All of a training that its steps change."""

    generator: TwoStreamGenerator
    latents: LatentTable
    optimizer: GeneratorOptimizer
    average: GeneratorAverage | None = None

    def is_finite(self) -> bool:
        """Return True if all tensors of this process's share are finite."""
        tensors = [
            *self.generator.state_dict().values(),
            *self.latents.tensors().values(),
            *self.optimizer.tensors().values(),
            *(self.average.generator.parameters() if self.average is not None else ()),
        ]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


class Checkpoints:
    """Writes and reads the checkpoints of a run; `keep` of them stay. All processes call `save` together."""

    def __init__(self, run: RunDir, ranks: Ranks, ids: list[str], weights: dict[str, str]) -> None:
        self.run, self.ranks, self.ids, self.weights = run, ranks, ids, weights
        self.keep = KEEP
        self._newest: tuple[Place, bool] | None = None

    def save(self, learned: LearnedState, place: Place, *, finished: bool = False) -> None:
        """Write a checkpoint, unless this is the newest already; when this returns it is whole, in every process."""
        if self._newest == (place, finished):
            return
        parts = {
            "generator": learned.generator.state_dict(),
            "latents": gathered_latents(learned.latents, self.ranks, len(self.ids)),
            "optimizer": learned.optimizer.tensors(),
        }
        if learned.average is not None:
            parts["average"] = learned.average.generator.state_dict()
        state = {
            "epoch": place.epoch,
            "position": place.position,
            "processes": self.ranks.size,
            "finished": finished,
            "ids": self.ids,
            "weights": self.weights,
        }
        if self.ranks.rank == 0:
            self.run.checkpoints.save(place.step, parts, state, self.keep)
        self.ranks.wait()  # no process leaves, and no launcher ends the job, before the checkpoint is whole
        self._newest = (place, finished)

    def restore(
        self, learned: LearnedState, on_mismatch: OnMismatch, passes: int, steps_per_pass: int
    ) -> tuple[Place, bool]:
        """Take over the newest whole checkpoint; the run is only read. Returns where the training continues, and
        whether the pass it was in begins again.

        Raises `VglannError` when there is none, when it is not of this training of `passes`, or for other clips as
        `on_mismatch` says.
        """
        state, parts = self.run.checkpoints.load()
        try:
            check_weights(dict(state.get("weights", {})), self.weights)
            learned.generator.load_state_dict(parts["generator"])
            learned.latents.lr.copy_(parts["latents"].pop("lr"))
            changes = check_clips(state["ids"], self.ids, on_mismatch)
            if changes and state["finished"]:
                raise VglannError(
                    f"{self.run.path} is finished; there is nothing left to train on other clips"
                )
            if changes:
                self.run.warnings.append(changes)
                state["processes"] = 0  # the pass that is not whole begins again, with the clips of now
            matched = matched_latents(
                parts["latents"], state["ids"], learned.latents, on_mismatch if changes else "keep"
            )
            learned.latents.load(matched)
            learned.optimizer.load(parts["optimizer"])
            if learned.average is not None:
                learned.average.generator.load_state_dict(parts["average"])
            place = place_in_run(state, self.ranks.size)
            if place.position >= steps_per_pass or (place.epoch, place.position) > (passes, 0):
                raise ValueError(
                    f"step {place.position} of pass {place.epoch}, of {passes} passes of {steps_per_pass}"
                )
            return place, place.position != state["position"]
        except (RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
            raise _unfit(self.run, error) from error


@dataclass(frozen=True)
class Trained:
    """Result of a GLO training, ready to use."""

    generator: TwoStreamGenerator
    latents: Tensor  # [N, d] on the generator's device
    ids: list[str]
    options: TrainOptions
    step: int
    weights: dict[str, str]  # of the networks in its loss, as `weight_records`; empty if not recorded


def load_trained(run: RunDir, device: torch.device | str = "cpu") -> Trained:
    """Generator and latents of a run's newest checkpoint, the generator in the mode it samples in.

    With --ema it is the averaged generator. In the background phase it shows the background, and no foreground that
    has not been trained. Raises `VglannError` when no checkpoint is whole, or when it is of another generator
    than the options.
    """
    state, parts = run.checkpoints.load()
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    saved = {name: tuple(tensor.shape) for name, tensor in parts.get("generator", {}).items()}
    if problem := _misfit(run, options, saved):
        raise _unfit(run, problem)
    # The first parameters are overwritten, but drawing them must not disturb a training in another thread.
    with seeded(0):
        generator = new_generator(options, run.options["frames"], run.options["size"])
    try:
        generator.load_state_dict(parts["average" if options.ema else "generator"])
        rows = parts["latents"]["rows"]
        weights = dict(state.get("weights", {}))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise _unfit(run, error) from error
    if rows.shape != (len(state["ids"]), options.latent_dim) or rows.dtype != torch.float32:
        raise _unfit(run, f"latents {rows.dtype} {list(rows.shape)} of {len(state['ids'])} clips")
    generator.to(device).channels_last().train(options.batchnorm == "train").requires_grad_(False)
    rows = rows.to(device)
    if state.get("epoch", 0) < options.background_passes:
        inflate(generator)
    if options.ema and not state.get("finished") and options.batchnorm == "eval":
        recompute_batchnorm(generator, latent_batches(rows, options.batch_size))
    return Trained(generator, rows, state["ids"], options, state["step"], weights)


def check_saved_size(run: RunDir, options: TrainOptions) -> None:
    """Raise `VglannError` when the run has checkpoints and none is of a generator of the size that the options say.

    Only headers are read, so that a torn checkpoint counts as well as a whole one.
    """
    problem = ""
    for folder in reversed(run.checkpoints.folders()):
        problem = _misfit(run, options, _shapes(folder / "generator.safetensors"))
        if not problem:
            return
    if problem:
        run.checkpoints.load()  # where none can be read, that is what is wrong
        raise _unfit(run, problem)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors that the header of a safetensors file claims; empty for one that is missing or damaged."""
    try:
        return tensors_header(path)[0]
    except (FileNotFoundError, ValueError):
        return {}


def _misfit(run: RunDir, options: TrainOptions, saved: Mapping[str, tuple[int, ...]]) -> str:
    """Return an error message if the two largest tensors are not as wide as the options say, else "".

    Checked before anything is allocated, because the options may be wrong but the size of the file is not.
    """
    rows, columns = run.options["size"] // UPSAMPLING, run.options["frames"] // UPSAMPLING + 1
    channels = 8 * options.width
    wanted = {
        "stem.weight": (rows * rows * columns * channels, options.latent_dim),
        "video.conv2.weight": (channels, channels // 2, 4, 4, 4),
    }
    return ", ".join(
        f"{name} is not {list(shape)}" for name, shape in wanted.items() if saved.get(name) != shape
    )


def _unfit(run: RunDir, reason: object) -> VglannError:
    words = str(reason).splitlines()[-1].strip() if str(reason) else type(reason).__name__
    return VglannError(f"{run.path}: checkpoint and options.json do not fit together: {words}")


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


def place_in_run(state: dict[str, Any], processes: int) -> Place:
    """Return the place where `processes` processes continue: the start of the pass if their number changed."""
    same = state["processes"] == processes
    return Place(state["step"], state["epoch"], state["position"] if same else 0)
