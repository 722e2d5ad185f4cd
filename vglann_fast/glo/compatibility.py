"""Check which options go together, on this device and with so many processes; others are refused in one line."""

import logging
import os

import torch

from vglann_fast.errors import VglannError
from vglann_fast.options.training import PERCEPTUAL, TrainOptions
from vglann_fast.runtime.distributed import Ranks

log = logging.getLogger("vglann_fast")


def batch_size_for(count: int, options: TrainOptions, ranks: Ranks) -> int:
    """Clips per batch: `options.batch_size`, or what there is for each process. Raises `VglannError`."""
    if count < 2:
        raise VglannError(f"training needs at least 2 clips, the folder has {count} in this split")
    batch_size = min(options.batch_size, count // ranks.size // options.accumulate)
    if batch_size < 2:
        raise VglannError(
            f"{count} clips are too few for {ranks.size} processes with --accumulate {options.accumulate}: "
            "each needs 2 clips for every batch of an update"
        )
    return batch_size


def check_compatibility(options: TrainOptions, ranks: Ranks, precision: str, device: torch.device) -> None:
    """Raise `VglannError` for options that nobody has tried together, before anything is loaded."""
    untested = {
        "--compile true with --sync-bn true": options.compile and options.sync_bn,
        "--compile true with --checkpoint-activations true": options.compile
        and options.checkpoint_activations,
        "--precision fp16 with several processes": precision == "fp16" and ranks.size > 1,
        # Newton-Schulz iterations on Gram matrices need more digits than TensorFloat-32 has.
        "--precision tf32 with --optimizer muon": precision == "tf32" and options.optimizer == "muon",
        "--deterministic true with --compile true": options.deterministic and options.compile,
        "--deterministic true with several GPUs": options.deterministic
        and ranks.size > 1
        and device.type == "cuda",
    }
    for names, given in untested.items():
        if given:
            raise VglannError(f"{names}: not tested together, so refused; leave one of them out")
    processes = ranks.size
    _refuse_graph(
        options, why_no_graph(options, device, processes=processes, source="resident", precision=precision)
    )


def why_no_graph(
    options: TrainOptions, device: torch.device, *, processes: int, source: str, precision: str
) -> str | None:
    """Return why the step cannot be captured under these options; None when it can."""
    if device.type != "cuda":
        return f"it needs a GPU, the device is {device}"
    reasons = {
        f"--accumulate {options.accumulate}": options.accumulate > 1,
        f"{processes} processes": processes > 1,
        f"--data {source}": source != "resident",
        "--compile true": options.compile,
        "--checkpoint-activations true": options.checkpoint_activations,
        "--precision fp16": precision == "fp16",
        "--deterministic true": options.deterministic,
        "VGLANN_CHECK=1": os.environ.get("VGLANN_CHECK") == "1",  # looks at values from the host
        f"--loss {options.loss}": bool(options.loss_terms.keys() & PERCEPTUAL),
    }
    against = [reason for reason, holds in reasons.items() if holds]
    return f"it was not tested with {' and '.join(against)}" if against else None


def use_graph(
    options: TrainOptions,
    device: torch.device,
    *,
    processes: int,
    source: str,
    precision: str,
    measured: bool = False,
) -> bool:
    """Return True if the step is to be captured.

    measured: `vglann tune` found the graph right and the fastest on this machine, so "auto" takes it.

    Raises `VglannError` where --cuda-graph on is refused, and warns where it takes a graph that "auto" would not.
    """
    if options.cuda_graph == "off":
        return False
    reason = why_no_graph(options, device, processes=processes, source=source, precision=precision)
    _refuse_graph(options, reason)
    if reason:
        return False
    if options.cuda_graph == "on" and not measured:
        log.warning(
            "--cuda-graph on: on this machine it was not compared with a training without it; `vglann tune` does that"
        )
    return measured or options.cuda_graph == "on"


def _refuse_graph(options: TrainOptions, reason: str | None) -> None:
    if reason and options.cuda_graph == "on":
        raise VglannError(f"--cuda-graph on: {reason}; leave it out")
