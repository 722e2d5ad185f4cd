"""Choices that `vglann tune` measured, as a training takes them: looked up once, kept by the run, and in force.

The run keeps them in options.json as "measured": {"machine", "when", "choices"}, so a resume or a replay computes as
the run began, whatever was measured since. Options that the user states win over them, and so does --deterministic.
What a resume does not take is gone for the resumes after it, and "resumed" says so.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vglann_kernels.impl import OPS, implementations, preferring, requested

from vglann_fast.errors import VglannError
from vglann_fast.glo.compatibility import check_compatibility
from vglann_fast.glo.precision import resolve_precision
from vglann_fast.options.choices import THREADS, Choices, kernels, left_open, op_of, settled
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.measurements import lookup, machine, switched_off
from vglann_fast.runtime.numerics import numerics, threads_given
from vglann_fast.runtime.processors import allowed, bfloat16_units

log = logging.getLogger("vglann_fast")

# Options that a step's time or memory depends on.
_SHAPING = (
    "variant",
    "width",
    "latent_dim",
    "accumulate",
    "loss",
    "levels",
    "blur",
    "optimizer",
    "latent_mode",
    "sync_bn",
    "reuse_norms",
    "checkpoint_activations",
)


def training_shapes(options: TrainOptions, frames: int, size: int, batch_size: int) -> dict[str, Any]:
    """Return what a measurement of a training step holds for; `batch_size` is the one that the clips allow."""
    shapes = {name: getattr(options, name) for name in _SHAPING}
    return {**shapes, "frames": frames, "size": size, "batch_size": batch_size, "ema": options.ema > 0}


def mapping_shapes(latents: int, latent_dim: int) -> dict[str, Any]:
    """Return what a measurement of the search for nearest rows holds for."""
    return {"latents": latents, "latent_dim": latent_dim}


def choices_of_new_run(
    run: RunDir, options: TrainOptions, shapes: dict[str, Any], device: torch.device, given: Collection[str]
) -> Choices:
    """Return what was measured on this machine for a training that begins, note it in the run, and say so."""
    if options.deterministic or switched_off():
        return {}
    entry, reason = lookup(device, shapes)
    if entry is None:
        _suggest(reason, run, device)
        return {}
    chosen = _open(entry.choices, options, device, given)
    # A program that has called torch.set_num_threads has other threads than the measurement began with.
    if THREADS in chosen and entry.contests[THREADS].default != str(torch.get_num_threads()):
        del chosen[THREADS]
    log.info(
        "measured here on %s: %s; `vglann tune --show` lists all", entry.when[:10], entry.changes(chosen)
    )
    run.options["measured"] = {"machine": dict(entry.machine), "when": entry.when, "choices": chosen}
    return chosen


def choices_of_run(
    run: RunDir,
    options: TrainOptions,
    device: torch.device,
    given: Collection[str] = (),
    *,
    ranks: Ranks | None = None,
    choices: Choices | None = None,
) -> Choices:
    """Return the choices that a run began with, as far as they hold here.

    On another device, or in several processes, only the precision does, which decides the digits of a run. With
    other versions the execution is the one of the options: a CUDA graph or a compiled step was compared with the
    versions it was measured with.

    choices: what a part of the training took. Default: what the newest part took.
    """
    measured = run.options.get("measured")
    if measured is None:
        return {}
    ranks, here = ranks or Ranks(), machine(device)
    choices = measured["choices"] if choices is None else choices
    chosen = _open(choices, options, device, given, ranks)
    elsewhere = measured["machine"].get("device") != here["device"]
    if elsewhere or ranks.size > 1:
        chosen = {name: choice for name, choice in chosen.items() if name == "precision"}
        reason = "were measured on another machine" if elsewhere else "are for one process"
        kept = "".join(f", except for precision {precision}" for precision in chosen.values())
        if ranks.rank == 0 and chosen.keys() != choices.keys():
            log.warning("the choices of this run %s and do not count here%s", reason, kept)
    elif measured["machine"] != here:
        chosen.pop("execution", None)
    return chosen


def choices_of_resume(
    run: RunDir, options: TrainOptions, device: torch.device, given: Collection[str], ranks: Ranks
) -> Choices:
    """Return what `choices_of_run` does and note in the run that from now on it has these choices."""
    choices = choices_of_run(run, options, device, given, ranks=ranks)
    if "measured" in run.options:
        run.options["measured"] = {**run.options["measured"], "choices": choices}
    return choices


def choices_of_mapping(device: torch.device, latents: int, latent_dim: int) -> Choices:
    """Return the fastest search for nearest rows that was measured here for a run's latents, and say so."""
    entry, _ = lookup(device, mapping_shapes(latents, latent_dim))
    if entry is None:
        return {}
    chosen = _open(entry.choices, None, device, ())
    log.info("measured here on %s: %s", entry.when[:10], entry.changes(chosen))
    return chosen


@contextmanager
def as_chosen(choices: Choices) -> Iterator[None]:
    """Compute inside the block with the threads and implementations of `choices`."""
    threads = int(choices[THREADS]) if THREADS in choices else None
    with numerics(threads=threads), preferring(kernels(choices)):
        yield


def _open(
    choices: Choices,
    options: TrainOptions | None,
    device: torch.device,
    given: Collection[str],
    ranks: Ranks | None = None,
) -> dict[str, str]:
    """Return the choices that the user has left open. Without options, implementations and threads alone."""
    names: set[str] = set()
    if options is not None:
        opened = left_open(options, given) & choices.keys()
        names = {name for name in opened if _fits(name, choices[name], options, device, ranks)}
    # A kernel that was asked for by name does not fall back where it needs channels-last tensors.
    if requested("upsample_conv")[0] not in ("auto", "reference"):
        names.discard("memory_format")
    if options is None or not options.deterministic:
        names |= {name for name in kernels(choices) if _has(op_of(name), choices[name])}
        # A file may say any number, and more threads than processors may end the process.
        if device.type == "cpu" and not threads_given() and int(choices.get(THREADS, 1)) <= allowed():
            names.add(THREADS)
    return {name: choice for name, choice in choices.items() if name in names}


def _has(op: str, impl: str) -> bool:
    """Return True if the user has left the implementation of an op open, and the op has this one."""
    return op in OPS and requested(op)[0] == "auto" and impl in implementations(op)


def _fits(name: str, choice: str, options: TrainOptions, device: torch.device, ranks: Ranks | None) -> bool:
    """Return True if a training with these options and this choice is not refused."""
    options = settled(options, {name: choice})
    try:
        precision = resolve_precision(options.precision, device)
        check_compatibility(options, ranks or Ranks(), precision, device)
    except VglannError:
        return False
    return True


def _suggest(reason: str, run: RunDir, device: torch.device) -> None:
    """Say that nothing was measured here, if a file says so or if there is much to choose from."""
    if reason:
        log.info("%s, so the defaults are used; `vglann tune %s` measures this training", reason, run.path)
    elif device.type == "cuda" or bfloat16_units():
        log.info(
            "nothing was measured here, so the defaults are used; for later trainings `vglann tune %s` measures",
            run.path,
        )
