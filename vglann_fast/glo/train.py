"""`train`: a run trained from the start, or from its newest checkpoint."""

import torch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo import memory
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.checkpoint import KEEP
from vglann_fast.glo.precision import (
    self_test,
    training_numerics,
    warn_of_slow_precision,
)
from vglann_fast.glo.training import Training
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
) -> Training:
    """Train the run's options on `clips`, from the start or, with `resume`, from its newest checkpoint.

    The run folder is created only after all checks pass. No other process may write to the run meanwhile.
    With `resume`, options or a clip folder that differ from those on disk are recorded in options.json.

    Raises as `Training` and `Training.loop`; with `resume` also when the clips are not those the run began with;
    when another process writes to the run; and when the device's memory is full.
    """
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    with training_numerics(options, torch.device(device)):
        try:
            training = new_training(clips, options, run, seed=seed, device=device, ranks=ranks)
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
