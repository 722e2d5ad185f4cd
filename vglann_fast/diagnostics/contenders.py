"""Ways to compute a training step, each checked against a twin before it is timed.

The reference twin is a short training in float32 by plain PyTorch. A contender is the same training from the same
seed, computed in its own way: its losses, its last gradient and the way of its latents may differ by rounding only.
A kernel is compared with float64 at the shapes of the training first, with the limits of `vglann verify`. For a CUDA
graph the twin is long enough to be replayed. A layer alone is compared with float64 only, so all layers' choices
together have a twin.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vglann_kernels.impl import OPS, implementations, requested, resolve, using_impl
from vglann_kernels.verify import OPS as VERIFIED
from vglann_kernels.verify import Shapes, verify

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.diagnostics.contest import Clock, Lap, Refused
from vglann_fast.diagnostics.layers import CONVOLUTION, MOST_COMPARED, layers_of, prepare_layer
from vglann_fast.errors import VglannError
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.compatibility import why_no_graph
from vglann_fast.glo.cuda_graph import WARM_UP
from vglann_fast.glo.measured import as_chosen
from vglann_fast.glo.precision import AUTOCAST, resolve_precision, self_test, training_numerics
from vglann_fast.glo.training import Training
from vglann_fast.options.choices import THREADS, VALUES, Choices, left_open, settled
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.numerics import threads_given
from vglann_fast.runtime.processors import available

TWIN_STEPS = {"cpu": 3, "cuda": WARM_UP + 3}
# Largest relative differences from the reference twin: of a loss, of the last gradient, of the way of the latents.
# Adam moves a value whose gradient is near 0 by a whole step, so rounding shows most in the latents. A gradient that
# is left out, or has the wrong sign, differs by 1 or 2.
_HALF = (0.05, 0.5, 0.9)
TOLERANCES = {"fp32": (0.01, 0.1, 0.3), "tf32": (0.02, 0.3, 0.9), "bf16": _HALF, "fp16": _HALF}
QUANTITIES = ("loss", "gradient", "latents")
# A first step on a CPU that takes longer than these seconds, and than so many steps of the reference, is the last.
PATIENCE, TOO_SLOW = 2.0, 3.0
_NOISE = 64


class SomeClips:
    """The first `count` of some clips, or noise where there are none: enough to measure with."""

    def __init__(self, clips: ClipSet | None, count: int, frames: int = 32, size: int = 64) -> None:
        self._clips = clips
        # Read from memory: making noise takes longer than reading a file.
        shape = (min(count, _NOISE), 3, frames, size, size)
        self._noise = np.random.default_rng(0).integers(0, 256, shape if clips is None else 0, np.uint8)
        self.frames = frames if clips is None else clips.frames
        self.size = size if clips is None else clips.size
        self.ids = tuple(map(str, range(count if clips is None else min(count, len(clips)))))

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Any = None) -> np.ndarray:
        """Return clips uint8 [n, 3, T, H, W]."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        return self._noise[rows % _NOISE] if self._clips is None else self._clips.read(rows)


@dataclass(frozen=True)
class _Observed:
    """Quantities of a twin: losses [steps], the last gradient and the way of the latents as vectors."""

    loss: Tensor
    gradient: Tensor
    latents: Tensor


class Contenders:
    """Makes the contenders of one training, which differ in their choices alone. `clips` are `SomeClips`."""

    def __init__(self, clips: Any, options: TrainOptions, device: torch.device, clock: Clock) -> None:
        # What comes from the data alone takes time and changes nothing of a step.
        self.options = replace(options, latent_init="sphere", background_share=0.0, epochs=10**6)
        self.clips, self.device, self._clock = clips, device, clock
        self._steps = TWIN_STEPS[device.type]
        self._step_seconds = 0.0
        with ExitStack() as closed, using_impl("reference"):
            exact = replace(self.options, precision="fp32", compile=False, cuda_graph="off")
            try:
                training, exact = self._training(exact, {}, closed)
                self.layers, self._videos = layers_of(training.generator), training.batch_size
                self._right = self._observed(training, exact, {})
            except torch.OutOfMemoryError as error:
                raise VglannError(
                    "out of memory: contenders are compared with float32 by plain PyTorch, and with --batch-size "
                    f"{options.batch_size} that does not fit; try `vglann tune CLIPS` with a smaller --batch-size"
                ) from error

    def contests(self, chosen: Choices) -> Iterator[tuple[str, list[str]]]:
        """Yield each choice that is open, and its values; the first one is what the rules of the program take.

        chosen: the choices made so far, which grow between two yields.
        """
        gpu, opened = self.device.type == "cuda", left_open(self.options)
        if not gpu and not threads_given():
            counts = {2**n for n in range(available().bit_length())} | {available()}
            yield THREADS, _first(str(torch.get_num_threads()), map(str, sorted(counts)))
        if "precision" in opened:
            yield (
                "precision",
                _first(resolve_precision("auto", self.device), filter(self._has, VALUES["precision"])),
            )
        if "memory_format" in opened:
            yield "memory_format", ["channels-last", "contiguous"]
        if "data" in opened:
            yield "data", ["resident", "pinned", "mmap"] if gpu else ["mmap", "resident"]
        for op in OPS:
            # The search for nearest rows belongs to the mapping.
            if op == "nearest" or requested(op)[0] != "auto":
                continue
            values = _first(resolve(op, device=self.device).impl, runnable(op, self.device))
            if op == CONVOLUTION and chosen.get("memory_format") == "contiguous":
                # The kernels take channels-last tensors only.
                values = [value for value in values if value != "triton"]
            for name in self.layers if op == CONVOLUTION else (op,):
                yield name, values
        if gpu and "execution" in opened:
            yield "execution", ["eager", "compile", "graph"]

    def prepare(self, choices: Choices, name: str, closed: ExitStack) -> Lap:
        """Check a training with these choices against the twin and return steps of it.

        name: the contest, in whose choice a contender differs from the others. In the contest of a layer the steps
        are convolutions of that layer alone. closed: what ends when the contender leaves.
        """
        if name in self.layers:
            layer, impl = self.layers[name], choices[name]
            return prepare_layer(layer, impl, self._videos, self.options, choices, self.device)
        off = self._off_float64(name, choices) if name in VERIFIED and choices[name] != "reference" else ""
        training, options = self._training(self.options, choices, closed)
        # One that is off computes its twin, too: if it is the default, it is timed.
        off_twin = self._off_twin(training, options, choices)

        def lap(steps: int) -> None:
            with as_chosen(choices), training_numerics(options, self.device):
                for _ in range(steps):
                    training.train_step(with_video=False)

        if reason := off or off_twin:
            raise Refused(reason, lap)
        return lap

    def _has(self, precision: Any) -> bool:
        """Return True if the device has this precision."""
        try:
            resolve_precision(precision, self.device)
        except VglannError:
            return False
        return True

    def _training(
        self, options: TrainOptions, choices: Choices, closed: ExitStack
    ) -> tuple[Training, TrainOptions]:
        """Return a training that has taken no step and its options. Raises `Refused` where a choice has no effect."""
        options = settled(options, choices)
        folder = closed.enter_context(tempfile.TemporaryDirectory())
        with as_chosen(choices), training_numerics(options, self.device):
            training = new_training(
                self.clips, options, RunDir(Path(folder), {}), device=self.device, choices=choices
            )
        closed.callback(training.source.close)
        if choices.get("data", training.source.name) != training.source.name:
            raise Refused("the clips do not fit there")
        if choices.get("execution") == "graph" and training.graphed is None:
            source, precision = training.source.name, training.precision
            reason = why_no_graph(options, self.device, processes=1, source=source, precision=precision)
            raise Refused(f"the step cannot be captured: {reason}")
        return training, options

    def _observed(self, training: Training, options: TrainOptions, choices: Choices) -> _Observed:
        """Take the steps of a twin. Raises `Refused` for one that is far too slow."""
        losses, before = [], training.latents.rows.clone()
        with as_chosen(choices), training_numerics(options, self.device):
            self_test(training.generator, training.precision, self.device)
            for _ in range(self._steps):
                started = self._clock()
                losses.append(training.train_step(with_video=False)[0].detach().float().clone())
                self._check_pace(self._clock() - started)
                if len(losses) == 1:
                    training.keep_targets()
        # Nothing was compared yet: these seconds are of the reference.
        self._step_seconds = self._step_seconds or self._clock() - started
        gradients = [p.grad.flatten().float() for p in training.generator.parameters() if p.grad is not None]
        way = (training.latents.rows - before).flatten()
        return _Observed(torch.stack(losses), torch.cat(gradients), way)

    def _check_pace(self, seconds: float) -> None:
        # The first step on a GPU may compile.
        if self.device.type == "cpu" and 0 < TOO_SLOW * self._step_seconds < seconds > PATIENCE:
            raise Refused(f"a step takes {seconds / self._step_seconds:.0f} times as long as in float32")

    def _off_twin(self, training: Training, options: TrainOptions, choices: Choices) -> str:
        """Compare a training with the reference twin; return the first quantity that is off, or ""."""
        found = self._observed(training, options, choices)
        for quantity, limit in zip(QUANTITIES, TOLERANCES[training.precision], strict=True):
            error = _apart(getattr(found, quantity), getattr(self._right, quantity))
            if not error <= limit:  # also NaN
                off = f"{error:.2g} after {self._steps} steps (at most {limit:g})"
                return f"its {quantity} differs from float32 by {off}"
        return ""

    def _off_float64(self, op: str, choices: Choices) -> str:
        """Compare an implementation with float64; return the first quantity that is off, or ""."""
        precision = resolve_precision(settled(self.options, choices).precision, self.device)
        shapes = Shapes(
            batch=min(MOST_COMPARED, self.options.batch_size, len(self.clips)),
            frames=self.clips.frames,
            size=self.clips.size,
            levels=self.options.levels,
            blur=self.options.blur,
            latent_dim=self.options.latent_dim,
            device=str(self.device),
            impl=choices[op],
            dtype=str(AUTOCAST.get(precision, torch.float32)).removeprefix("torch."),
        )
        for line in verify(shapes, [op]):
            if not line.ok:
                off = f"{line.error:.2g} off float64 (at most {line.limit:.2g})"
                return f"{line.case}, {line.quantity}: {off}"
        return ""


def runnable(op: str, device: torch.device) -> list[str]:
    """Return the implementations of an op that can run on a device."""
    return [name for name, why_not in implementations(op).items() if not why_not(device)]


def _first(default: str, values: Any) -> list[str]:
    """Return the values without repetition, the default first."""
    return list(dict.fromkeys([default, *values]))


def _apart(found: Tensor, right: Tensor) -> float:
    """Return the relative L2 distance."""
    return float((found - right).norm() / right.norm())
