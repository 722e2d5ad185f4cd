"""Log of a training while it runs: lines in metrics.jsonl now and then, and its progress on the terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from vglann_fast.clips.pixels import psnr, to_uint8
from vglann_fast.glo.loader import Batch
from vglann_fast.progress import Progress
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks


class Logger:
    """The figures of a training as it goes. Only process 0 writes and shows them, but they are of all processes.

    Args:
        run: to whose metrics.jsonl lines are added.
        limits: values of a video that are black and white.
    """

    def __init__(self, run: RunDir, ranks: Ranks, limits: tuple[float, float]) -> None:
        self.run, self.ranks, self.limits = run, ranks, limits
        self.seconds = 0.0  # of training up to the last line, over all resumes
        self._progress: Progress | None = None
        self._step = self._last = self._background_end = self._phase_end = 0
        self._started = time.monotonic()

    @contextmanager
    def opened(self, done: int, last: int, background_end: int = 0) -> Iterator[None]:
        """While steps are taken: `done` are, `last` is the final one. The clock runs.

        Up to step `background_end` they belong to the background phase, which has a progress of its own.
        """
        self._step, self._last, self._background_end = done, last, background_end
        self._started = time.monotonic() - self.seconds
        self._show_phase()
        try:
            yield
        finally:
            self._close_progress()

    def advance(self) -> None:
        """One more step is taken."""
        if self._step == self._phase_end:
            self._show_phase()
        self._step += 1
        if self._progress is not None:
            self._progress.advance()

    def _show_phase(self) -> None:
        """Begin the progress of the phase that the next step is in."""
        self._close_progress()
        if self.ranks.rank > 0:
            return
        end = self._background_end
        self._phase_end = end if self._step < end else self._last
        if self._step < end:
            self._progress = Progress("glo, background alone", end, "step", self._step)
        else:
            self._progress = Progress("glo", self._last - end, "step", self._step - end)

    def _close_progress(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def write(self, step: int, epoch: float, loss: Tensor, video: Tensor, batch: Batch, lr: float) -> None:
        """Add a line about `step`; waits for the device.

        Args:
            epoch: passes over the clips, the one that is not whole as a fraction.
            loss: [].
            video: [B, 3, T, H, W] made for the clips of `batch`, the last one of the step; T is 1 for a still.
            lr: of the generator.
        """
        real = batch.clips[batch.at]
        quality = self.ranks.mean(psnr(to_uint8(video, self.limits), real).mean().item())
        figures = {"loss": loss.item(), "psnr": quality}
        self.seconds = time.monotonic() - self._started
        if self.ranks.rank > 0:
            return
        row = {"stage": "glo", "step": step, "epoch": epoch, **figures, "lr_generator": lr}
        self.run.logs.add({**row, "seconds": round(self.seconds, 3)})
        if self._progress is not None:
            self._progress.show(**figures)

    def go_back(self, step: int) -> None:
        """Forget lines beyond `step`, which will be taken again; the clock continues from the line before."""
        if self.ranks.rank > 0:
            return
        self.run.logs.drop_metrics("glo", after_step=step)
        seconds = [row.get("seconds") for row in self.run.logs.metrics("glo")[-1:]]
        self.seconds = float(seconds[0]) if seconds and isinstance(seconds[0], int | float) else 0.0
