"""`vf.train` and `vf.resume`: what `vglann train` does."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.of_run import open_clips
from vglann_fast.errors import VglannError
from vglann_fast.glo.train import train as train_run
from vglann_fast.interface.arguments import check_names, checked_seed, typed, whole
from vglann_fast.interface.machine import computing, torch_device
from vglann_fast.interface.run import Run, warn
from vglann_fast.options.fields import flag_of, options_from_json, options_to_json
from vglann_fast.options.presets import preset as preset_named
from vglann_fast.options.training import OnMismatch, PresetName, TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import joined

# Parameters of `train` and `resume` beside the options, for the search of the nearest name.
_OTHERS = (
    "preset",
    "seed",
    "device",
    "kernels",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
)

MAX_PACE = 10**9  # steps, epochs or checkpoints; as many as a training can have epochs

_training = threading.Lock()


def train(
    clips: str | Path | ClipSet,
    out: str | Path,
    *,
    preset: PresetName = "modern",
    seed: int = 0,
    device: str | torch.device | None = None,
    kernels: str | None = None,
    log_every: int = 10,
    checkpoint_every: int = 10,
    keep_checkpoints: int = 2,
    tensorboard: bool = False,
    **options: Any,
) -> Run:
    """Train a generator and one latent for each clip (GLO), as `vglann train CLIPS --out OUT` does.

    A process trains one run at a time; other calls may run in other threads meanwhile. Under torchrun every process
    makes the same call. Progress goes to the logger "vglann_fast" or, on a terminal, to a tqdm bar.

    Args:
        clips: a clip folder, or the `ClipSet` of one. The train clips of the folder are used.
        out: run folder to make. It must not exist or be empty.
        preset: "modern", "modern-2026a", "paper" or "demo": the values of all `options` that are not given.
        seed: seed of the first parameters, the first latents and the order of the clips, 0 to below 2^63.
        device: "cpu", "cuda" or "cuda:N". Default: "cuda" if there is a GPU, else "cpu".
        kernels: "auto", "triton" or "reference", with exceptions such as "reference,nearest=faiss".
        log_every: steps between lines of metrics.jsonl, at least 1.
        checkpoint_every: epochs between checkpoints, at least 1.
        keep_checkpoints: number of recent checkpoints to keep, at least 1.
        tensorboard: whether to write the metrics for TensorBoard too.
        options: options of `vglann train` with underscores, e.g. epochs=50, batch_size=15, width=32, lr_latents=0.03.

    Returns:
        The trained run.

    Raises:
        VglannError: an unknown option, with the nearest name; a bad value; clips or an `out` that do not fit; another
            training in this process; a loss that is not finite; a full disk or GPU.
        Interrupted: SIGINT or SIGTERM in the main thread. The training is saved; `resume` continues it.
    """
    record = new_record(clips, preset, seed, options)
    _check_pace(log_every, checkpoint_every, keep_checkpoints)
    place = torch_device(device)
    with _only_training(), computing(place, kernels), joined(place) as ranks:
        opened = ClipSet.open(record["clips"], "train", share=(ranks.rank, ranks.size))
        # All clips are verified before anything is begun; a collective of NCCL would not wait for that.
        ranks.wait()
        run = RunDir.new(out, {**record, "frames": opened.frames, "size": opened.size})
        train_run(
            opened,
            run,
            seed=record["seed"],
            device=place,
            given=options.keys(),
            tensorboard=tensorboard,
            ranks=ranks,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
        )
    return _trained(run, place, kernels)


def resume(
    path: str | Path,
    clips: str | Path | ClipSet | None = None,
    *,
    device: str | torch.device | None = None,
    kernels: str | None = None,
    log_every: int = 10,
    checkpoint_every: int = 10,
    keep_checkpoints: int = 2,
    tensorboard: bool = False,
    latents_on_mismatch: OnMismatch = "error",
    **options: Any,
) -> Run:
    """Continue the training of a run from its newest checkpoint, as `vglann train --resume PATH` does.

    On a CPU the result is bit-identical to a training that was never stopped.

    Args:
        path: run folder.
        clips: the clip folder, if it has moved since the run began.
        device: as in `train`.
        kernels: as in `train`.
        log_every: as in `train`.
        checkpoint_every: as in `train`.
        keep_checkpoints: as in `train`.
        tensorboard: as in `train`.
        latents_on_mismatch: for clips that have changed: "error" raises, "keep" keeps the latents of clips that are
            still there, "init" initializes all latents again.
        options: learning rates and options of the machine, e.g. lr_generator=0.0005, precision="fp32". Others,
            preset and seed must have the values that the run began with.

    Returns:
        The trained run. A `Run` that was loaded before keeps the state it was loaded with.

    Raises as `train`, and `VglannError` for a folder that is not a run, and for options fixed at the start of a run.
    """
    run = resumed_run(path, clips, options)
    _check_pace(log_every, checkpoint_every, keep_checkpoints)
    place = torch_device(device)
    with _only_training(), computing(place, kernels), joined(place) as ranks:
        opened = open_clips(run, verify=True, share=(ranks.rank, ranks.size))
        ranks.wait()
        train_run(
            opened,
            run,
            seed=run.options["seed"],
            device=place,
            resume=True,
            on_mismatch=latents_on_mismatch,
            given=options.keys(),
            tensorboard=tensorboard,
            ranks=ranks,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
        )
    return _trained(run, place, kernels)


def new_record(
    clips: str | Path | ClipSet, preset: str, seed: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what options.json of a new run says of its training: {"preset", "seed", "clips", "train"}.

    Raises `VglannError` as `train` for options, preset and seed; nothing is read or written.
    """
    names = [field.name for field in fields(TrainOptions)]
    check_names(options, [*names, *_OTHERS], "train")
    defaults = preset_named(preset).train
    return {
        "preset": preset,
        "seed": checked_seed(seed),
        "clips": str(_folder(clips).absolute()),
        "train": options_to_json(replace(defaults, **typed(options, defaults))),
    }


def resumed_run(path: str | Path, clips: str | Path | ClipSet | None, options: Mapping[str, Any]) -> RunDir:
    """Return the run at `path` with the options it is to be continued with. Nothing is written.

    Raises `VglannError` as `resume` for the path and the options.
    """
    run = RunDir.open(path)
    if run.options["clips"] is None:
        raise VglannError(f"{path} was imported: it has no training to continue; train a new run")
    names = [field.name for field in fields(TrainOptions)]
    check_names(options, [*names, *_OTHERS, "latents_on_mismatch", "clips"], "train")
    # Options that an earlier version did not write have their defaults.
    own = options_to_json(options_from_json(TrainOptions, run.options["train"]))
    before = {**own, "preset": run.options["preset"], "seed": run.options["seed"]}
    resumable = {field.name for field in fields(TrainOptions) if field.metadata["resumable"]}
    fixed = before.keys() - resumable
    changed = [name for name in options if name in fixed and options[name] != before[name]]
    if changed:
        given = ", ".join(f"{flag_of(name)} {options[name]}" for name in changed)
        raise VglannError(
            f"--resume: {path} was begun with other values than {given}; remove these (only CLIPS, learning rates "
            "and options of the machine may change after the start), or train a new run"
        )
    free = {name: value for name, value in options.items() if name not in fixed}
    run.options["train"].update(typed(free, TrainOptions()))
    if clips is not None:
        run.options["clips"] = str(_folder(clips).absolute())
    return run


def _check_pace(log_every: int, checkpoint_every: int, keep_checkpoints: int) -> None:
    """Raise `VglannError` for numbers below 1."""
    whole("log_every", log_every, 1, MAX_PACE)
    whole("checkpoint_every", checkpoint_every, 1, MAX_PACE)
    whole("keep_checkpoints", keep_checkpoints, 1, MAX_PACE)


@contextmanager
def _only_training() -> Iterator[None]:
    """Refuse a second training in this process: both would take its signals, memory and threads."""
    if not _training.acquire(blocking=False):
        raise VglannError("this process is training already; wait for its end, or train in another process")
    try:
        yield
    finally:
        _training.release()


def _folder(clips: str | Path | ClipSet) -> Path:
    return clips.folder if isinstance(clips, ClipSet) else Path(clips)


def _trained(run: RunDir, device: torch.device, kernels: str | None) -> Run:
    warn(run.warnings)
    return Run(run.path, device=device, kernels=kernels)
