"""Choices that `vglann tune` measured, as a training takes them: looked up once, kept by the run, and in force.

The run keeps them in options.json as "measured": {"machine", "when", "choices"}, so a resume or a replay computes as
the run began, whatever was measured since. Options that the user states win over them, and so does --deterministic.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vglann_kernels.impl import OPS, preferring, requested

from vglann_fast.options.choices import THREADS, Choices, kernels, left_open
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir
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
    log.info("measured here on %s: %s; `vglann tune --show` lists all", entry.when[:10], entry.only(chosen))
    run.options["measured"] = {"machine": dict(entry.machine), "when": entry.when, "choices": chosen}
    return chosen


def choices_of_run(
    run: RunDir, options: TrainOptions, device: torch.device, given: Collection[str] = ()
) -> Choices:
    """Return the choices that a run began with, as far as they hold on this machine.

    On another device none do. With other versions the execution is the one of the options: a CUDA graph or a compiled
    step was compared with the versions it was measured with.
    """
    measured = run.options.get("measured")
    if measured is None:
        return {}
    chosen, here = _open(measured["choices"], options, device, given), machine(device)
    if measured["machine"].get("device") != here["device"]:
        log.info("the choices of this run were measured on another machine and are not used on this one")
        return {}
    if measured["machine"] != here:
        chosen.pop("execution", None)
    return chosen


def choices_of_mapping(device: torch.device, latents: int, latent_dim: int) -> Choices:
    """Return the fastest search for nearest rows that was measured here for a run's latents, and say so."""
    if torch.are_deterministic_algorithms_enabled():
        return {}
    entry, _ = lookup(device, mapping_shapes(latents, latent_dim))
    if entry is None:
        return {}
    chosen = _open(entry.choices, None, device, ())
    log.info("measured here on %s: %s", entry.when[:10], entry.only(chosen))
    return chosen


@contextmanager
def as_chosen(choices: Choices) -> Iterator[None]:
    """Compute inside the block with the threads and implementations of `choices`."""
    threads = int(choices[THREADS]) if THREADS in choices else None
    with numerics(threads=threads), preferring(kernels(choices)):
        yield


def _open(
    choices: Choices, options: TrainOptions | None, device: torch.device, given: Collection[str]
) -> dict[str, str]:
    """Return the choices that the user has left open. Without options, implementations and threads alone."""
    names = set() if options is None else left_open(options, given)
    if options is None or not options.deterministic:
        names |= {op for op in OPS if requested(op)[0] == "auto"}
        # A file may say any number, and more threads than processors may end the process.
        if device.type == "cpu" and not threads_given() and int(choices.get(THREADS, 1)) <= allowed():
            names.add(THREADS)
    return {name: choice for name, choice in choices.items() if name in names}


def _suggest(reason: str, run: RunDir, device: torch.device) -> None:
    """Say that nothing was measured here, if a file says so or if there is much to choose from."""
    if reason:
        log.info("%s, so the defaults are used; `vglann tune %s` measures this training", reason, run.path)
    elif device.type == "cuda" or bfloat16_units():
        log.info("nothing was measured here, so the defaults are used; `vglann tune %s` measures", run.path)
