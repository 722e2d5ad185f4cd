"""A GLO training: the loop around the step, on one device or in several processes.

Nothing random happens after the first step but the order of the clips, which is a function of seed, epoch and share;
so a resumed training takes the same steps as one that was never stopped.

With --background-share the first passes are the background phase, see `background.py`. Its steps are the steps of any
other pass with another network and another target; the pass that ends it also inflates the generator.
"""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function as stage

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.glo import memory
from vglann_fast.glo.average import GeneratorAverage
from vglann_fast.glo.background import background_options, copy_stem_rows, inflate
from vglann_fast.glo.batchnorm import RunningStatistics, latent_batches, recompute_batchnorm
from vglann_fast.glo.checkpoint import Checkpoints, LearnedState, Place
from vglann_fast.glo.cuda_graph import GraphedStep
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.guard import Guard
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.loader import Batch, ClipSource, batches_of, clip_order
from vglann_fast.glo.logger import Logger
from vglann_fast.glo.optimizer import GeneratorOptimizer, learning_rate_factor
from vglann_fast.glo.perceptual import FeatureLoss, weight_records
from vglann_fast.glo.precision import (
    Logits,
)
from vglann_fast.glo.step import StepLogits, glo_step
from vglann_fast.options.training import OnMismatch, Precision, TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks, StopAgreement
from vglann_fast.runtime.memory import forget_peak, peak_memory
from vglann_fast.runtime.signals import Interrupted, signals_collected

log = logging.getLogger("vglann_fast")


@dataclass
class Training:
    """Everything a GLO training consists of, and the loop over it. `new_training` makes one.

    What it says goes through its `logger`, what it leaves through its `checkpoints`.

    clips: what to train on, the same set in every process. run: where metrics and checkpoints go; only process 0
    writes. own: rows of the clips that belong to this process, int64. logits: the generator's, in the precision,
    compiled or not; background_logits: the background's alone. average: of the generator, or None. graphed: the step
    as a CUDA graph, or None.
    """

    clips: ClipSet
    options: TrainOptions
    run: RunDir
    seed: int
    device: torch.device
    ranks: Ranks
    batch_size: int
    precision: Precision
    features: dict[str, FeatureLoss]
    generator: TwoStreamGenerator
    logits: Logits
    background_logits: StepLogits
    own: Tensor
    latents: LatentTable
    guard: Guard
    optimizer: GeneratorOptimizer
    average: GeneratorAverage | None
    source: ClipSource
    graphed: GraphedStep | None = None

    def __post_init__(self) -> None:
        self.steps_per_epoch = (
            len(self.clips) // self.ranks.size // (self.batch_size * self.options.accumulate)
        )
        self.background_options = background_options(self.options)
        self.statistics = RunningStatistics(self.generator)
        self.logger = Logger(self.run, self.ranks, self.options.target_limits)
        self.checkpoints = Checkpoints(
            self.run, self.ranks, list(self.clips.ids), weight_records(self.features)
        )
        self.step = self.epoch = self.position = 0
        # The newest one, and the order of the pass in progress.
        self._batch: Batch
        self._order: list[np.ndarray] = []
        self._ordered_epoch = -1

    @property
    def last_step(self) -> int:
        """The step after which all passes are over."""
        return self._step_at(self.options.passes)

    @property
    def in_background_phase(self) -> bool:
        """Return True if the next step trains the background alone."""
        return self.epoch < self.options.background_passes

    def _step_at(self, epoch: int) -> int:
        """The step after which `epoch` passes are over, from where the training is now."""
        return self.step + (epoch - self.epoch) * self.steps_per_epoch - self.position

    def loop(self, *, log_every: int = 10, checkpoint_every: int = 10, max_steps: int | None = None) -> None:
        """Train to the end of all passes, or until `max_steps` steps were taken in all, and save.

        Args:
            log_every: steps between lines in metrics.jsonl.
            checkpoint_every: epochs between checkpoints.

        Raises:
            Interrupted: SIGTERM or SIGINT in any process, after saving.
            VglannError: as `check_finite`; or another process ended, and the checkpoint before stays.
        """
        last, passes = self.last_step, self.options.background_passes
        background_end = self._step_at(passes) if passes else 0
        if self.step == last:
            return
        until = last if max_steps is None else min(max_steps, last)
        stopping = peak_known = False
        shown = self.logger.opened(self.step, last, background_end)
        with signals_collected(self.ranks.size == 1) as received, shown:
            stop = StopAgreement(self.ranks)
            forget_peak(self.device)
            while self.step < until and not stopping:
                logging_now = (self.step + 1) % log_every == 0 or self.step + 1 == until
                full = not self.in_background_phase
                loss, video, batch = self.train_step(with_video=logging_now)
                self.logger.advance()
                if full and not peak_known:
                    peak_known = True
                    log.info("peak memory after the first full step: %.3f GB", peak_memory(self.device) / 1e9)
                    if self.step < until:
                        self.keep_targets(lambda: stop.agreed(bool(received)))
                if logging_now:
                    self._log(loss, video, batch)
                due = self.epoch % checkpoint_every == 0 or self.step == background_end
                if self.position == 0 and due and self.step < until:
                    self.save()
                stopping = stop.agreed(bool(received))
            stop.close()
            if self.step == last:
                self._finish()
            self.save(finished=self.step == last)
        if received or stopping:
            raise Interrupted(received[0] if received else signal.SIGTERM)

    def keep_targets(self, told: Callable[[], bool] = lambda: False) -> None:
        """After the first full step, when the peak of memory is known; see `FeatureLoss.keep_targets`."""
        for loss in self.features.values():
            loss.keep_targets(self.source, len(self.clips), self.batch_size, self.ranks, told)

    def train_step(self, *, with_video: bool = True) -> tuple[Tensor, Tensor | None, Batch]:
        """Take the next step; returns (loss [], video [B, 3, T, H, W] of its last batch or None, that batch).

        Video and batch stay as they are until the next step.
        """
        if self.position == 0:
            self.begin_epoch(self.epoch)
        rows = self._rows_of_step(self.epoch, self.position)
        batches = self._batches(rows)
        if self.graphed is not None:
            loss, video = self.graphed(next(batches), with_video)
        else:
            loss, video = self.update(batches, with_video)
        self.step += 1
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.check_finite()  # once an epoch: its end would change what is frozen
            self.latents.end_epoch()
            self.epoch, self.position = self.epoch + 1, 0
            if self.epoch == self.options.background_passes:
                self._inflate()
        return loss, video, self._batch

    def update(self, batches: Iterable[Batch], with_video: bool) -> tuple[Tensor, Tensor | None]:
        """One update from these batches, see `glo_step`; nothing of it stays if the loss is not finite."""
        background = self.in_background_phase
        return glo_step(
            self.background_logits if background else self.logits,
            self.latents,
            self.optimizer,
            self.guard,
            self.statistics,
            batches,
            self.background_options if background else self.options,
            self.features,
            self.average,
            with_video=with_video,
        )

    def _inflate(self) -> None:
        """End the background phase: the foreground begins as the background."""
        for generator in self._generators():
            inflate(generator)
        for moment in self.optimizer.moments("stem.weight"):
            copy_stem_rows(self.generator, moment)
        self.statistics.keep()
        if self.graphed is not None:
            self.graphed.forget()

    def _generators(self) -> list[TwoStreamGenerator]:
        """The generator and, with --ema, its average."""
        return [self.generator, *([self.average.generator] if self.average is not None else [])]

    def _rows_of_step(self, epoch: int, position: int) -> list[np.ndarray]:
        """The rows of each batch of a step, numbered as in this process's share."""
        if epoch != self._ordered_epoch:
            order = clip_order(self.seed, epoch, len(self.own), self.ranks.rank)
            self._order, self._ordered_epoch = list(batches_of(order, self.batch_size)), epoch
        first = position * self.options.accumulate
        return self._order[first : first + self.options.accumulate]

    def _batches(self, rows: list[np.ndarray]) -> Iterator[Batch]:
        """The batches of a step; the first of the next one is announced with the last of this one."""
        following = None
        if self.position + 1 < self.steps_per_epoch:
            following = self._rows_of_step(self.epoch, self.position + 1)[0]
        for one, after in zip(rows, [*rows[1:], following], strict=True):
            with stage("data"):
                self._batch = self.source.batch(one, after)
            yield self._batch

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rates of this epoch, and reset Adam if the options say so."""
        forget = self.options.adam_state == "per-epoch"
        factor = learning_rate_factor(self.options, epoch)
        if self.options.latent_mode == "lazy" and epoch:
            lag = self.latents.adam.row_step != self.latents.adam.step
            assert not bool(lag.any()), "rows lag at a change of lr"
        self.optimizer.begin_epoch(self.options, factor, forget=forget)
        self.latents.begin_epoch(self.options.lr_latents * factor, forget=forget)
        self.generator.train()

    @property
    def learned(self) -> LearnedState:
        """The state that the steps change."""
        return LearnedState(self.generator, self.latents, self.optimizer, self.average)

    def save(self, *, finished: bool = False) -> None:
        """Write a checkpoint of this step. Raises as `check_finite`."""
        self.check_finite()
        self.checkpoints.save(self.learned, Place(self.step, self.epoch, self.position), finished=finished)

    def check_finite(self) -> None:
        """Raise `VglannError` once a loss was not finite, naming step and clips.

        Nothing counts since; the state before that step is saved first, unless it is not finite either: an update
        may spoil the parameters and only the next loss shows it. All processes call this together.
        """
        if not bool(self.guard.frozen):
            return
        rows = self.guard.rows.tolist() if bool(self.guard.mine) else []
        clips = ", ".join(self.ranks.gather_words([self.latents.ids[row] for row in rows]))
        self.position -= self.step - int(
            self.guard.step
        )  # an epoch's end comes here, so the epoch is the same
        self.step = int(self.guard.step)
        good = self.ranks.mean(float(self.learned.is_finite())) == 1.0
        if good:
            self.checkpoints.save(self.learned, Place(self.step, self.epoch, self.position))
            left = f"The state before it is saved as step {self.step}"
        else:
            left = "The step before it had made the parameters not finite, so no checkpoint was added"
        raise VglannError(
            f"the loss was not finite at step {self.step + 1}, on clips {clips}; nothing was updated since. {left}; "
            f"use --resume {self.run.path} with a lower --lr-generator, or train without these clips"
        )

    def resume(self, on_mismatch: OnMismatch = "error") -> None:
        """Continue from the newest checkpoint of the run, or from the start if it was stopped before its first.

        on_mismatch: what to do if the clips are others, see `glo/resume.py`. Raises `VglannError` for "error".
        """
        if self.run.checkpoints.exist():
            self.restore(on_mismatch)
        self.ranks.wait()  # every process has read the run before process 0 changes it
        if self.ranks.rank == 0:
            self.run.checkpoints.retain(self.step, self.checkpoints.keep)
        self.logger.go_back(self.step)

    def restore(self, on_mismatch: OnMismatch = "error") -> None:
        """Take over the newest checkpoint; the run is only read. Raises as `resume`."""
        place, cut_short = self.checkpoints.restore(
            self.learned, on_mismatch, self.options.passes, self.steps_per_epoch
        )
        self.step, self.epoch, self.position = place.step, place.epoch, place.position
        if cut_short:
            self.latents.end_epoch()  # the pass that was cut short ends here; it begins again
        if self.position:  # within a pass; --resume may have given new rates
            factor = learning_rate_factor(self.options, self.epoch)
            self.optimizer.begin_epoch(self.options, factor, forget=False)
            self.latents.change_rate(self.options.lr_latents * factor)
        self.statistics.keep()
        self.guard.step.fill_(self.step)
        self.generator.train()

    def _log(self, loss: Tensor, video: Tensor | None, batch: Batch) -> None:
        self.check_finite()
        assert video is not None
        epoch = self.epoch + self.position / self.steps_per_epoch
        self.logger.write(self.step, epoch, loss, video, batch, self.optimizer.lr.item())

    def out_of_memory(self) -> VglannError:
        """Return the error for a device that is full."""
        half = self.precision in ("bf16", "fp16")
        resident = self.source.name == "resident"
        table = memory.memory_table(
            self.generator,
            self.latents.tensors().values(),
            self.options,
            batch_size=self.batch_size,
            frames=self.clips.frames,
            size=self.clips.size,
            clips=len(self.own) if resident else self.batch_size,
            half=half,
            features=sum(loss.nbytes for loss in self.features.values()),
        )
        for what, amount in table:
            log.info("%-24s %9.3f GB", what, amount / 1e9)
        kept = any(loss.keeps_targets for loss in self.features.values())
        return memory.out_of_memory(
            self.options, self.batch_size, resident=resident, half=half, features_kept=kept
        )

    def _finish(self) -> None:
        """Statistics for eval mode, over the latents of all processes as they are now."""
        if self.options.batchnorm == "eval":
            rows = self.ranks.gather_rows(self.latents.rows, len(self.clips)).to(self.device)
            for generator in self._generators():
                recompute_batchnorm(generator, latent_batches(rows, self.batch_size))
