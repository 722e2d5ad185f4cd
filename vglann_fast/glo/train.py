"""GLO training: the loop around the step, its checkpoints, and loading what was trained.

A checkpoint has the parts `generator` (its state dict), `latents` (`LatentTable.tensors`) and `optimizer`
("<state>.<parameter>"), and in state.json "epoch", "finished" and "ids", the clip ids in the order of the latents.
Nothing random happens after the first step but the order of the clips, which is a function of seed and epoch;
so a resumed training takes the same steps as one that was never stopped.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.config import TrainOptions, options_from_json
from vglann_fast.errors import VglannError
from vglann_fast.glo.generator import TwoStreamGenerator, recompute_batchnorm
from vglann_fast.glo.latents import BETAS, LatentTable, initial_latents
from vglann_fast.glo.losses import psnr, to_uint8
from vglann_fast.glo.step import Guard, glo_step
from vglann_fast.progress import Progress
from vglann_fast.run_dir import RunDir

RECOMPUTE_LATENTS = 2048  # latents over which BatchNorm statistics are averaged


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the training was saved after the step in progress."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} and saved")
        self.exit_code = 128 + signal_number


class Training:
    """Everything a GLO training consists of, and the loop over it.

    Args:
        clips: what to train on; they stay on disk and are read batch by batch.
        options: see `TrainOptions`.
        run: where metrics and checkpoints go.
        seed: of the first parameters, the first latents and the order of the clips.
        device, dtype: float32 but for conformance tests.

    Raises:
        VglannError: fewer than two clips, or clips the generator cannot make.
    """

    def __init__(
        self,
        clips: ClipSet,
        options: TrainOptions,
        run: RunDir,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(clips) < 2:
            raise VglannError(f"training needs at least 2 clips, the folder has {len(clips)} in this split")
        self.clips = clips
        self.options = options
        self.run = run
        self.seed = seed
        self.device = torch.device(device)
        self.batch_size = min(options.batch_size, len(clips))
        self.steps_per_epoch = len(clips) // self.batch_size
        with torch.random.fork_rng(devices=[]):  # CPU only: the same parameters on every device
            torch.manual_seed(seed)
            generator = new_generator(options, clips.frames, clips.size)
            rows = initial_latents(len(clips), options, torch.default_generator, clips.read)
        self.generator = generator.to(self.device, dtype).channels_last()
        self.latents = LatentTable(rows.to(self.device, dtype), clips.ids, options)
        self.guard = Guard.new(self.batch_size, self.device)
        self.optimizer = self._new_optimizer()
        self.step = 0
        self.seconds = 0.0

    def loop(self, *, log_every: int = 10, checkpoint_every: int = 10, max_steps: int | None = None) -> None:
        """Train to the end of `options.epochs`, or until `max_steps` steps were taken in all, and save.

        Args:
            log_every: steps between lines in metrics.jsonl.
            checkpoint_every: epochs between checkpoints.

        Raises:
            Interrupted: SIGTERM or SIGINT, after saving.
            VglannError: a loss that is not finite; the checkpoint before it stays.
        """
        last = self.options.epochs * self.steps_per_epoch
        if self.step == last:
            return
        until = last if max_steps is None else min(max_steps, last)
        started = time.monotonic() - self.seconds
        with _signals() as received, Progress("glo", last, "step", self.step) as progress:
            while self.step < until and not received:
                loss, video, index = self.train_step()
                self.seconds = time.monotonic() - started
                progress.advance()
                epoch_done = self.step % self.steps_per_epoch == 0
                if self.step % log_every == 0 or self.step == until:
                    row = self._log(loss, video, index)
                    progress.show(loss=row["loss"], psnr=row["psnr"])
                if (
                    epoch_done
                    and (self.step // self.steps_per_epoch) % checkpoint_every == 0
                    and self.step < until
                ):
                    self.save()
            if self.step == last:
                self._finish()
            self.save(finished=self.step == last)
        if received:
            raise Interrupted(received[0])

    def train_step(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """The next step: (loss [], video [B, 3, T, H, W], rows of the clips [B])."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if position == 0:
            self.begin_epoch(epoch)
        order = clip_order(self.seed, epoch, len(self.clips))
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        loss, video = self.step_on(torch.from_numpy(self.clips.read(rows)), torch.from_numpy(rows))
        self.step += 1
        if self.step % self.steps_per_epoch == 0:
            self.latents.end_epoch()
        return loss, video, rows

    def step_on(self, clips: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """`glo_step` on uint8 clips [B, 3, T, H, W] whose latents are rows `index` [B]."""
        clips, index = clips.to(self.device, non_blocking=True), index.to(self.device, non_blocking=True)
        return glo_step(self.generator, self.latents, self.optimizer, self.guard, clips, index, self.options)

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rates of this epoch, and start Adam anew if the options say so."""
        forget = self.options.adam_state == "per-epoch"
        if forget:
            self.optimizer = self._new_optimizer()
        factor = learning_rate_factor(self.options, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr_generator * factor
        if self.options.latent_mode == "catchup" and epoch:
            assert bool((self.latents.adam.row_step == self.latents.adam.step).all()), (
                "rows lag at a change of lr"
            )
        self.latents.begin_epoch(self.options.lr_latents * factor, forget=forget)
        self.generator.train()

    def save(self, *, finished: bool = False) -> None:
        """Write a checkpoint of this step, unless a non-finite loss has frozen the training."""
        if bool(self.guard.frozen):
            raise self._diverged()
        parts = {
            "generator": self.generator.state_dict(),
            "latents": {**self.latents.tensors(), "lr": self.latents.lr},
            "optimizer": self._optimizer_tensors(),
        }
        state = {
            "epoch": self.step // self.steps_per_epoch,
            "seconds": round(self.seconds, 3),
            "finished": finished,
            "ids": list(self.latents.ids),
        }
        self.run.save_checkpoint(self.step, parts, state)

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run, or from the start if it was stopped before its first.

        Raises `VglannError` if the clips are not those the run began with.
        """
        if not self.run.has_checkpoint():
            return
        state, parts = self.run.load_checkpoint()
        check_same_clips(state["ids"], self.clips.ids)
        self.generator.load_state_dict(parts["generator"])
        self.latents.lr.copy_(parts["latents"].pop("lr"))
        self.latents.load(parts["latents"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self._load_optimizer(parts["optimizer"])
        self.guard.step.fill_(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr_generator * learning_rate_factor(
                self.options, self.step // self.steps_per_epoch
            )
        self.generator.train()
        self.run.drop_metrics("glo", after_step=self.step)

    def _log(self, loss: Tensor, video: Tensor, rows: np.ndarray) -> dict[str, Any]:
        if bool(self.guard.frozen):
            raise self._diverged()
        real = torch.from_numpy(self.clips.read(rows)).to(self.device)
        quality = psnr(to_uint8(video, self.options.target_limits), real).mean().item()
        row = {
            "stage": "glo",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": loss.item(),
            "psnr": quality,
            "lr_generator": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        self.run.log(row)
        return row

    def _diverged(self) -> VglannError:
        clips = ", ".join(self.latents.ids[row] for row in self.guard.rows.tolist())
        return VglannError(
            f"the loss was not finite at step {self.guard.step.item() + 1}, on clips {clips}; nothing was updated "
            "since. The checkpoint before it is whole; lower --lr-generator or leave these clips out"
        )

    def _finish(self) -> None:
        """Statistics for eval mode, over the latents as they are now."""
        if self.options.batchnorm == "eval":
            recompute_batchnorm(self.generator, latent_batches(self.latents.rows, self.batch_size))

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            self.generator.parameters(), self.options.lr_generator, betas=BETAS, fused=True
        )

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        states = self.optimizer.state
        return {
            f"{key}.{name}": value
            for name, parameter in self.generator.named_parameters()
            for key, value in states[parameter].items()
        }

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.generator.named_parameters():
            self.optimizer.state[parameter] = {
                key: _like_parameter(tensors[f"{key}.{name}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }


def _like_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """An Adam tensor in its parameter's memory format and device; the step counter stays a float32 scalar."""
    if tensor.ndim == 0:
        return tensor.to(parameter.device)
    return torch.empty_like(parameter).copy_(tensor)


def train(
    clips: ClipSet,
    run: RunDir,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log_every: int = 10,
    checkpoint_every: int = 10,
    resume: bool = False,
    tensorboard: bool = False,
) -> Training:
    """Train the run's options on `clips`, from the start or, with `resume`, from its newest checkpoint.

    A new run is begun only when nothing speaks against training. Raises as `Training` and `Training.loop`; with
    `resume` also when the clips are not those the run began with.
    """
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    training = Training(clips, options, run, seed=seed, device=device)
    if resume:
        training.resume()
    else:
        run.begin()
    if tensorboard:
        run.start_tensorboard()
    training.loop(log_every=log_every, checkpoint_every=checkpoint_every)
    return training


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


def learning_rate_factor(options: TrainOptions, epoch: int) -> float:
    """What the starting rates are multiplied by in `epoch`, counted from 0."""
    if options.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * epoch / options.epochs))
    return 0.5 ** (epoch * 10 // options.epochs)


def clip_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the clips in an epoch: a permutation [count], int64, of seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


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


@dataclass(frozen=True)
class Trained:
    """What a GLO training left behind, ready to use."""

    generator: TwoStreamGenerator
    latents: Tensor  # [N, d] on the generator's device
    ids: list[str]
    options: TrainOptions
    step: int


def load_trained(run: RunDir, device: torch.device | str = "cpu") -> Trained:
    """Generator and latents of a run's newest checkpoint, the generator in the mode it samples in."""
    state, parts = run.load_checkpoint()
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    generator = new_generator(options, run.options["frames"], run.options["size"])
    generator.load_state_dict(parts["generator"])
    generator.to(device).channels_last().train(options.batchnorm == "train").requires_grad_(False)
    return Trained(generator, parts["latents"]["rows"].to(device), state["ids"], options, state["step"])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one of a kind kills as usual."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, before[number])
