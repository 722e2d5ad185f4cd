"""GLO training: the loop around the step, on one device or in several processes.

Nothing random happens after the first step but the order of the clips, which is a function of seed, epoch and share;
so a resumed training takes the same steps as one that was never stopped.
"""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function as stage

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.glo import memory
from vglann_fast.glo.batchnorm import RunningStatistics, latent_batches, recompute_batchnorm, sync_batch_norms
from vglann_fast.glo.checkpoint import KEEP, Checkpoints, Learned, Place, check_saved_size, new_generator
from vglann_fast.glo.checkpoint import Trained as Trained
from vglann_fast.glo.checkpoint import load_trained as load_trained
from vglann_fast.glo.combinations import batch_size_for, check_combinations, use_graph
from vglann_fast.glo.data import Batch, batches_of, clip_order, open_source
from vglann_fast.glo.graph import GraphedStep
from vglann_fast.glo.guard import Guard
from vglann_fast.glo.journal import Journal
from vglann_fast.glo.latents import LatentTable, initial_latents
from vglann_fast.glo.optimizer import GeneratorAdam, learning_rate_factor
from vglann_fast.glo.perceptual import load_features, weight_records
from vglann_fast.glo.precision import (
    LossScale,
    in_precision,
    resolve_precision,
    self_test,
    training_numerics,
)
from vglann_fast.glo.step import glo_step
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import OnMismatch, TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks, StopAgreement
from vglann_fast.runtime.memory import forget_peak, peak_memory
from vglann_fast.runtime.signals import Interrupted, signals_collected

log = logging.getLogger("vglann_fast")


class Training:
    """Everything a GLO training consists of, and the loop over it.

    What it says goes through its `journal`, what it leaves through its `checkpoints`.

    Args:
        clips: what to train on, the same set in every process.
        options: see `TrainOptions`.
        run: where metrics and checkpoints go; only process 0 writes.
        seed: of the first parameters, the first latents and the order of the clips.
        device, dtype: float32 but for conformance tests.
        ranks: this process among those that train together.

    Raises:
        VglannError: too few clips, clips the generator cannot make, options that do not go together here, or a run
            with checkpoints of another size.
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
        ranks: Ranks | None = None,
    ) -> None:
        self.clips, self.options, self.run, self.seed = clips, options, run, seed
        self.device = torch.device(device)
        self.ranks = ranks or Ranks()
        check_saved_size(run, options)
        self.batch_size = batch_size_for(len(clips), options, self.ranks)
        self.steps_per_epoch = len(clips) // self.ranks.size // (self.batch_size * options.accumulate)
        self.precision = resolve_precision(options.precision, self.device)
        check_combinations(options, self.ranks, self.precision, self.device)
        self.features = load_features(options, self.device, precision=self.precision, dtype=dtype)
        with torch.random.fork_rng(devices=[]):  # CPU only: the same parameters on every device
            torch.manual_seed(seed)
            generator = new_generator(options, clips.frames, clips.size)
            rows = initial_latents(len(clips), options, torch.default_generator, clips.read)
        self.generator = generator.to(self.device, dtype).channels_last()
        self.ranks.broadcast(self.generator.parameters())
        self.own = self.ranks.owns(len(clips))
        ids = [clips.ids[row] for row in self.own.tolist()]
        self.latents = LatentTable(rows[self.own].to(self.device, dtype), ids, options)
        self.guard = Guard.new(self.batch_size * options.accumulate, self.device)
        scale = LossScale(self.device) if self.precision == "fp16" else None
        self.optimizer = GeneratorAdam(self.generator, options, self.ranks, scale)
        self.statistics = RunningStatistics(self.generator)
        self.source = open_source(options.data, clips, self.own.numpy(), self.device, self.batch_size)
        self._wrap_generator()
        self.journal = Journal(run, self.ranks, clips, self.own.numpy(), options.target_limits)
        self.checkpoints = Checkpoints(run, self.ranks, list(clips.ids), weight_records(self.features))
        self.step = self.epoch = self.position = 0
        self._order: list[np.ndarray] = []
        self._ordered_epoch = -1

    def _wrap_generator(self) -> None:
        """Memory, processes, compilation, precision and graph around the step, which knows nothing of them."""
        if self.options.checkpoint_activations:
            memory.checkpoint_activations(self.generator)
        if self.options.sync_bn:
            sync_batch_norms(self.generator, self.ranks)
        logits = torch.compile(self.generator.logits) if self.options.compile else self.generator.logits
        self.logits = in_precision(logits, self.precision, self.device)
        self._graphed: GraphedStep | None = None
        graph = use_graph(
            self.options,
            self.device,
            processes=self.ranks.size,
            source=self.source.name,
            precision=self.precision,
        )
        if graph:
            table = self.source.batch(np.zeros(0, np.int64)).clips
            self._graphed = GraphedStep(
                lambda batch, video: self.update([batch], video), table, self.batch_size
            )

    @property
    def last_step(self) -> int:
        """The step after which `options.epochs` passes are over."""
        return self.step + (self.options.epochs - self.epoch) * self.steps_per_epoch - self.position

    def loop(self, *, log_every: int = 10, checkpoint_every: int = 10, max_steps: int | None = None) -> None:
        """Train to the end of `options.epochs`, or until `max_steps` steps were taken in all, and save.

        Args:
            log_every: steps between lines in metrics.jsonl.
            checkpoint_every: epochs between checkpoints.

        Raises:
            Interrupted: SIGTERM or SIGINT in any process, after saving.
            VglannError: as `check_finite`; or another process ended, and the checkpoint before stays.
        """
        last, first = self.last_step, self.step
        if self.step == last:
            return
        until = last if max_steps is None else min(max_steps, last)
        stopping = False
        with signals_collected(self.ranks.size == 1) as received, self.journal.opened(self.step, last):
            stop = StopAgreement(self.ranks)
            forget_peak(self.device)
            while self.step < until and not stopping:
                logging_now = (self.step + 1) % log_every == 0 or self.step + 1 == until
                loss, video, rows = self.train_step(with_video=logging_now)
                self.journal.advance()
                if self.step == first + 1:
                    log.info("peak memory after step 1: %.3f GB", peak_memory(self.device) / 1e9)
                    if self.step < until:
                        self.keep_targets(lambda: stop.agreed(bool(received)))
                if logging_now:
                    self._log(loss, video, rows)
                if self.position == 0 and self.epoch % checkpoint_every == 0 and self.step < until:
                    self.save()
                stopping = stop.agreed(bool(received))
            stop.close()
            if self.step == last:
                self._finish()
            self.save(finished=self.step == last)
        if received or stopping:
            raise Interrupted(received[0] if received else signal.SIGTERM)

    def keep_targets(self, told: Callable[[], bool] = lambda: False) -> None:
        """After the first step, when the peak of memory is known; see `FeatureLoss.keep_targets`."""
        for loss in self.features.values():
            loss.keep_targets(self.source, len(self.clips), self.batch_size, self.ranks, told)

    def train_step(self, *, with_video: bool = True) -> tuple[Tensor, Tensor | None, np.ndarray]:
        """The next step: (loss [], video [B, 3, T, H, W] of its last batch, rows of those clips [B])."""
        if self.position == 0:
            self.begin_epoch(self.epoch)
        rows = self._rows_of_step(self.epoch, self.position)
        if self._graphed is not None:
            loss, video = self._graphed(self.source.batch(rows[0]), with_video)
        else:
            loss, video = self.update(self._batches(rows), with_video)
        self.step += 1
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.check_finite()  # once an epoch: its end would change what is frozen
            self.latents.end_epoch()
            self.epoch, self.position = self.epoch + 1, 0
        return loss, video, rows[-1]

    def update(self, batches: Iterable[Batch], with_video: bool) -> tuple[Tensor, Tensor | None]:
        """One update from these batches, see `glo_step`; nothing of it stays if the loss is not finite."""
        loss, video = glo_step(
            self.logits,
            self.latents,
            self.optimizer,
            self.guard,
            batches,
            self.options,
            self.features,
            with_video=with_video,
        )
        self.statistics.settle(self.guard.frozen)
        return loss, video

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
                batch = self.source.batch(one, after)
            yield batch

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rates of this epoch, and start Adam anew if the options say so."""
        forget = self.options.adam_state == "per-epoch"
        factor = learning_rate_factor(self.options, epoch)
        if self.options.latent_mode == "catchup" and epoch:
            lag = self.latents.adam.row_step != self.latents.adam.step
            assert not bool(lag.any()), "rows lag at a change of lr"
        self.optimizer.begin_epoch(self.options.lr_generator * factor, forget=forget)
        self.latents.begin_epoch(self.options.lr_latents * factor, forget=forget)
        self.generator.train()

    @property
    def learned(self) -> Learned:
        """What the steps change."""
        return Learned(self.generator, self.latents, self.optimizer)

    def save(self, *, finished: bool = False) -> None:
        """Write a checkpoint of this step. Raises as `check_finite`."""
        self.check_finite()
        self.checkpoints.save(self.learned, Place(self.step, self.epoch, self.position), finished=finished)

    def check_finite(self) -> None:
        """Raise `VglannError` once a loss was not finite, naming step and clips.

        Nothing counts since; the state before that step is saved first, unless it is no better itself: an update
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
            left = "The step before it had spoiled the parameters, so the checkpoints are as they were"
        raise VglannError(
            f"the loss was not finite at step {self.step + 1}, on clips {clips}; nothing was updated since. {left}; "
            f"go on with --resume {self.run.path} and a lower --lr-generator, or without these clips"
        )

    def resume(self, on_mismatch: OnMismatch = "error") -> None:
        """Continue from the newest checkpoint of the run, or from the start if it was stopped before its first.

        on_mismatch: what to do if the clips are others, see `identity.py`. Raises `VglannError` for "error".
        """
        if self.run.checkpoints.exist():
            self.restore(on_mismatch)
        self.ranks.wait()  # every process has read the run before process 0 goes on to change it
        if self.ranks.rank == 0:
            self.run.checkpoints.retain(self.step, self.checkpoints.keep)
        self.journal.go_back(self.step)

    def restore(self, on_mismatch: OnMismatch = "error") -> None:
        """Take over the newest checkpoint; the run is only read. Raises as `resume`."""
        place, cut_short = self.checkpoints.restore(
            self.learned, on_mismatch, self.options.epochs, self.steps_per_epoch
        )
        self.step, self.epoch, self.position = place.step, place.epoch, place.position
        if cut_short:
            self.latents.end_epoch()  # the pass that was cut short ends here; it begins again
        if self.position:  # within a pass; the rates may have been given anew with --resume
            factor = learning_rate_factor(self.options, self.epoch)
            self.optimizer.begin_epoch(self.options.lr_generator * factor, forget=False)
            self.latents.change_rate(self.options.lr_latents * factor)
        self.statistics.keep()
        self.guard.step.fill_(self.step)
        self.generator.train()

    def _log(self, loss: Tensor, video: Tensor | None, rows: np.ndarray) -> None:
        self.check_finite()
        assert video is not None
        epoch = self.epoch + self.position / self.steps_per_epoch
        self.journal.write(self.step, epoch, loss, video, rows, self.optimizer.lr.item())

    def out_of_memory(self) -> VglannError:
        """What to tell a user whose device is full."""
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
            recompute_batchnorm(self.generator, latent_batches(rows, self.batch_size))


def train(
    clips: ClipSet,
    run: RunDir,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log_every: int = 10,
    checkpoint_every: int = 10,
    keep_checkpoints: int = KEEP,
    resume: bool = False,
    on_mismatch: OnMismatch = "error",
    tensorboard: bool = False,
    ranks: Ranks | None = None,
) -> Training:
    """Train the run's options on `clips`, from the start or, with `resume`, from its newest checkpoint.

    A new run is begun only when nothing speaks against training. No other process may write to the run meanwhile.
    With `resume`, options or a clip folder that differ from those on disk are recorded in options.json.

    Raises as `Training` and `Training.loop`; with `resume` also when the clips are not those the run began with;
    when another process writes to the run; and when the device's memory is full.
    """
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    with training_numerics(options, torch.device(device)):
        try:
            training = Training(clips, options, run, seed=seed, device=device, ranks=ranks)
        except torch.OutOfMemoryError as error:
            raise memory.too_large(options) from error
        training.checkpoints.keep = keep_checkpoints
        first = training.ranks.rank == 0
        try:
            self_test(training.generator, training.precision, training.device)
            with run.locked() if first else nullcontext():
                if resume:
                    training.resume(on_mismatch)
                if first:
                    run.resumed(training.step, on_mismatch) if resume else run.begin()
                if tensorboard and first:
                    run.logs.start_tensorboard()
                training.loop(log_every=log_every, checkpoint_every=checkpoint_every)
        except torch.OutOfMemoryError as error:
            raise training.out_of_memory() from error
        finally:
            training.source.close()
        return training
