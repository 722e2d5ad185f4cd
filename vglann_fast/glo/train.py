"""GLO training: the loop around the step, on one device or in several processes.

Nothing random happens after the first step but the order of the clips, which is a function of seed, epoch and share;
so a resumed training takes the same steps as one that was never stopped.
"""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function as stage

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.config import OnMismatch, TrainOptions, options_from_json
from vglann_fast.errors import VglannError
from vglann_fast.glo import memory
from vglann_fast.glo.checkpoint import Trained as Trained
from vglann_fast.glo.checkpoint import (
    gathered_latents,
    latent_batches,
    new_generator,
    place_in_run,
)
from vglann_fast.glo.checkpoint import load_trained as load_trained
from vglann_fast.glo.combinations import batch_size_for, check_combinations, use_graph
from vglann_fast.glo.data import Batch, batches_of, clip_order, open_source
from vglann_fast.glo.distributed import Ranks, StopAgreement, sync_batch_norms
from vglann_fast.glo.generator import recompute_batchnorm
from vglann_fast.glo.graph import GraphedStep
from vglann_fast.glo.identity import check_clips, matched_latents
from vglann_fast.glo.interruption import Interrupted, signals_collected
from vglann_fast.glo.latents import LatentTable, initial_latents
from vglann_fast.glo.losses import psnr, to_uint8
from vglann_fast.glo.optimizer import GeneratorAdam, learning_rate_factor
from vglann_fast.glo.precision import (
    LossScale,
    in_precision,
    resolve_precision,
    self_test,
    set_float32_products,
)
from vglann_fast.glo.step import Guard, glo_step
from vglann_fast.progress import Progress
from vglann_fast.run_dir import RunDir

log = logging.getLogger("vglann_fast")


class Training:
    """Everything a GLO training consists of, and the loop over it.

    Args:
        clips: what to train on, the same set in every process.
        options: see `TrainOptions`.
        run: where metrics and checkpoints go; only process 0 writes.
        seed: of the first parameters, the first latents and the order of the clips.
        device, dtype: float32 but for conformance tests.
        ranks: this process among those that train together.

    Raises:
        VglannError: too few clips, clips the generator cannot make, or options that do not go together here.
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
        self.batch_size = batch_size_for(len(clips), options, self.ranks)
        self.steps_per_epoch = len(clips) // self.ranks.size // (self.batch_size * options.accumulate)
        self.precision = resolve_precision(options.precision, self.device)
        check_combinations(options, self.ranks, self.precision)
        set_float32_products(self.precision, self.device)
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
        self.source = open_source(options.data, clips, self.own.numpy(), self.device, self.batch_size)
        self._wrap_generator()
        self.step = self.epoch = self.position = 0
        self.seconds = 0.0
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
                lambda batch, video: self._eager([batch], video), table, self.batch_size
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
            VglannError: a loss that is not finite, or another process that ended; the checkpoint before stays.
        """
        last = self.last_step
        if self.step == last:
            return
        until = last if max_steps is None else min(max_steps, last)
        started, first = time.monotonic() - self.seconds, self.step
        shown = Progress("glo", last, "step", self.step) if self.ranks.rank == 0 else nullcontext()
        stopping = False
        with signals_collected(self.ranks.size == 1) as received, shown as progress:
            stop = StopAgreement(self.ranks)
            while self.step < until and not stopping:
                logging_now = (self.step + 1) % log_every == 0 or self.step + 1 == until
                loss, video, rows = self.train_step(with_video=logging_now)
                self.seconds = time.monotonic() - started
                if self.step == first + 1:
                    log.info("peak memory after step 1: %.3f GB", memory.peak_memory(self.device) / 1e9)
                if progress is not None:
                    progress.advance()
                if logging_now:
                    row = self._log(loss, video, rows)
                    if progress is not None:
                        progress.show(loss=row["loss"], psnr=row["psnr"])
                if self.position == 0 and self.epoch % checkpoint_every == 0 and self.step < until:
                    self.save()
                stopping = stop.agreed(bool(received))
            stop.close()
            if self.step == last:
                self._finish()
            self.save(finished=self.step == last)
        if received or stopping:
            raise Interrupted(received[0] if received else signal.SIGTERM)

    def train_step(self, *, with_video: bool = True) -> tuple[Tensor, Tensor | None, np.ndarray]:
        """The next step: (loss [], video [B, 3, T, H, W] of its last batch, rows of those clips [B])."""
        if self.position == 0:
            self.begin_epoch(self.epoch)
        rows = self._rows_of_step(self.epoch, self.position)
        if self._graphed is not None:
            loss, video = self._graphed(self.source.batch(rows[0]), with_video)
        else:
            loss, video = self._eager(self._batches(rows), with_video)
        self.step += 1
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.latents.end_epoch()
            self.epoch, self.position = self.epoch + 1, 0
        return loss, video, rows[-1]

    def step_on(self, clips: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One update from these clips [B, 3, T, H, W], uint8 or in the target's range, of the latents `rows`."""
        at = torch.arange(len(clips), device=clips.device)
        loss, video = self._eager([Batch(clips, at, rows)], True)
        assert video is not None
        return loss, video

    def _eager(self, batches: Any, with_video: bool) -> tuple[Tensor, Tensor | None]:
        return glo_step(
            self.logits,
            self.latents,
            self.optimizer,
            self.guard,
            batches,
            self.options,
            with_video=with_video,
        )

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

    def save(self, *, finished: bool = False) -> None:
        """Write a checkpoint of this step, unless a non-finite loss has frozen the training."""
        if bool(self.guard.frozen):
            raise self._diverged()
        parts = {
            "generator": self.generator.state_dict(),
            "latents": gathered_latents(self.latents, self.ranks, len(self.clips)),
            "optimizer": self.optimizer.tensors(),
        }
        state = {
            "epoch": self.epoch,
            "position": self.position,
            "processes": self.ranks.size,
            "seconds": round(self.seconds, 3),
            "finished": finished,
            "ids": list(self.clips.ids),
        }
        if self.ranks.rank == 0:
            self.run.save_checkpoint(self.step, parts, state)
        self.ranks.wait()  # no process leaves, and no launcher ends the job, before the checkpoint is whole

    def resume(self, on_mismatch: OnMismatch = "error") -> None:
        """Continue from the newest checkpoint of the run, or from the start if it was stopped before its first.

        on_mismatch: what to do if the clips are others, see `identity.py`. Raises `VglannError` for "error".
        """
        if not self.run.has_checkpoint():
            return
        self.restore(on_mismatch)
        self.ranks.wait()  # every process has read the run before process 0 goes on to change it
        if self.ranks.rank == 0:
            self.run.drop_metrics("glo", after_step=self.step)

    def restore(self, on_mismatch: OnMismatch = "error") -> None:
        """Take over the newest checkpoint; the run is only read. Raises as `resume`."""
        state, parts = self.run.load_checkpoint()
        self.generator.load_state_dict(parts["generator"])
        self.latents.lr.copy_(parts["latents"].pop("lr"))
        changes = check_clips(state["ids"], self.clips.ids, on_mismatch)
        if changes and state["finished"]:
            raise VglannError(f"{self.run.path} is finished; there is nothing left to train on other clips")
        if changes:
            self.run.warnings.append(changes)
            state["processes"] = 0  # the pass that is not whole begins again, with the clips of now
        self.latents.load(
            matched_latents(parts["latents"], state["ids"], self.latents, on_mismatch if changes else "keep")
        )
        self.optimizer.load(parts["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.epoch, self.position = place_in_run(state, self.ranks.size)
        if self.position != state["position"]:
            self.latents.end_epoch()  # the pass that was cut short ends here; it begins again
        self.guard.step.fill_(self.step)
        self.generator.train()

    def _log(self, loss: Tensor, video: Tensor | None, rows: np.ndarray) -> dict[str, Any]:
        if bool(self.guard.frozen):
            raise self._diverged()
        assert video is not None
        real = torch.from_numpy(self.clips.read(self.own.numpy()[rows])).to(self.device)
        quality = psnr(to_uint8(video, self.options.target_limits), real).mean().item()
        row = {
            "stage": "glo",
            "step": self.step,
            "epoch": self.epoch + self.position / self.steps_per_epoch,
            "loss": loss.item(),
            "psnr": self.ranks.mean(quality),
            "lr_generator": self.optimizer.lr.item(),
            "seconds": round(self.seconds, 3),
        }
        if self.ranks.rank == 0:
            self.run.log(row)
        return row

    def _diverged(self) -> VglannError:
        rows = self.guard.rows.tolist() if bool(self.guard.mine) else []
        clips = ", ".join(self.ranks.gather_words([self.latents.ids[row] for row in rows]))
        return VglannError(
            f"the loss was not finite at step {self.guard.step.item() + 1}, on clips {clips}; nothing was updated "
            "since. The checkpoint before it is whole; lower --lr-generator or leave these clips out"
        )

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
        )
        for what, amount in table:
            log.info("%-24s %9.3f GB", what, amount / 1e9)
        return memory.out_of_memory(self.options, self.batch_size, resident=resident, half=half)

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
    resume: bool = False,
    on_mismatch: OnMismatch = "error",
    tensorboard: bool = False,
    ranks: Ranks | None = None,
) -> Training:
    """Train the run's options on `clips`, from the start or, with `resume`, from its newest checkpoint.

    A new run is begun only when nothing speaks against training. Raises as `Training` and `Training.loop`; with
    `resume` also when the clips are not those the run began with; and when the device's memory is full.
    """
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    try:
        training = Training(clips, options, run, seed=seed, device=device, ranks=ranks)
    except torch.OutOfMemoryError as error:
        raise VglannError(
            "out of memory before the first step: the generator, the latents and the clips do not fit; try "
            f"--data pinned, --width {max(1, options.width // 2)} or another device"
        ) from error
    try:
        self_test(training.generator, training.precision, training.device)
        if resume:
            training.resume(on_mismatch)
        elif training.ranks.rank == 0:
            run.begin()
        if tensorboard and training.ranks.rank == 0:
            run.start_tensorboard()
        training.loop(log_every=log_every, checkpoint_every=checkpoint_every)
    except torch.OutOfMemoryError as error:
        raise training.out_of_memory() from error
    finally:
        training.source.close()
    return training
