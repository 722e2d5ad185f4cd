"""`train`: a run trained from the start, or from its newest checkpoint."""

from collections.abc import Collection

import torch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo import memory
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.checkpoint import KEEP
from vglann_fast.glo.compatibility import batch_size_for
from vglann_fast.glo.measured import as_chosen, choices_of_new_run, choices_of_resume, training_shapes
from vglann_fast.glo.precision import (
    self_test,
    training_numerics,
    warn_of_slow_precision,
)
from vglann_fast.glo.training import Training
from vglann_fast.options.choices import Choices, settled
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import OnMismatch, TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks, suggest_all_gpus


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
    given: Collection[str] = (),
) -> Training:
    """Train the run's options on `clips`, from the start or, with `resume`, from its newest checkpoint.

    The run folder is created only after all checks pass. No other process may write to the run meanwhile.
    A new run in one process takes the choices that were measured on this machine for what the options leave open,
    and keeps them; see `glo/measured.py`. `given` names the options that the user has stated.
    With `resume`, options, a clip folder or choices that differ from those on disk are recorded in options.json.

    Raises as `Training` and `Training.loop`; with `resume` also when the clips are not those the run began with;
    when another process writes to the run; and when the device's memory is full.
    """
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    device, ranks = torch.device(device), ranks or Ranks()
    choices: Choices = {}
    if resume:
        choices = choices_of_resume(run, options, device, given, ranks)
    elif ranks.size == 1:
        batch_size = batch_size_for(len(clips), options, ranks)
        shapes = training_shapes(options, clips.frames, clips.size, batch_size)
        choices = choices_of_new_run(run, options, shapes, device, given)
    options = settled(options, choices)
    with as_chosen(choices), training_numerics(options, device):
        try:
            training = new_training(
                clips, options, run, seed=seed, device=device, ranks=ranks, choices=choices
            )
        except torch.OutOfMemoryError as error:
            raise memory.too_large(options) from error
        training.checkpoints.keep = keep_checkpoints
        first = training.ranks.rank == 0
        try:
            if first:
                warn_of_slow_precision(training.precision, training.device)
                suggest_all_gpus(training.device, training.ranks)
            self_test(training.generator, training.precision, training.device)
            with run.locked(training.ranks.rank):
                if resume:
                    training.resume(on_mismatch)
                else:
                    # Every process has seen an empty folder before process 0 fills it.
                    training.ranks.wait()
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
