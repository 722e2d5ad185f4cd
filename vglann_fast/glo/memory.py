"""Memory of a training: the peak, what takes it when it does not suffice, and activation checkpointing."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vglann_fast.errors import VglannError
from vglann_fast.glo.batchnorm import frozen_statistics
from vglann_fast.glo.generator import Layer, TwoStreamGenerator
from vglann_fast.glo.muon import matrix_parameters
from vglann_fast.options.training import PERCEPTUAL, TrainOptions

# Values that a training step keeps for its backward pass, per value of a layer's output: the convolution's output,
# and the output of BatchNorm with ReLU. With --checkpoint-activations only what goes into each layer.
KEPT, KEPT_CHECKPOINTED = 2, 1


def checkpoint_activations(generator: TwoStreamGenerator) -> None:
    """From now on each layer of the video stream keeps its input alone and runs again in the backward pass.

    The background stream takes a thirtieth of the memory and stays as it is.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen_statistics(generator)  # running statistics move once, not twice

    def run_again(layer: Layer, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return layer(x)
        # On a GPU a thread of autograd computes again, and the choice of kernels belongs to this thread.
        here = copy_context()
        return checkpoint(
            here.run, layer, x, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
        )

    generator.video.run = run_again


def compute_contiguously(generator: TwoStreamGenerator) -> None:
    """From now on both streams take contiguous inputs, whose format the convolutions keep, not channels-last ones.

    The same function; which of the two formats is faster depends on the device and its library.
    """
    for stream in (generator.video, generator.background):
        stream.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))


def memory_table(
    generator: TwoStreamGenerator,
    latents: Iterable[Tensor],
    options: TrainOptions,
    *,
    batch_size: int,
    frames: int,
    size: int,
    clips: int,
    half: bool,
    features: int = 0,
) -> list[tuple[str, int]]:
    """(what, bytes) of the parts of a training; activations are counted from the layers, the rest is exact.

    Args:
        latents: the tensors of the latent table and its Adam.
        clips: how many are on the device.
        half: activations have 16 bits, not 32.
        features: bytes of the networks in the loss and of the features kept for them.
    """
    weights = sum(p.numel() * p.element_size() for p in generator.parameters())
    # Muon keeps one number for each of its weights, Adam two.
    muon = matrix_parameters(generator).values() if options.optimizer == "muon" else ()
    saved = sum(p.numel() * p.element_size() for p in muon)
    kept = KEPT_CHECKPOINTED if options.checkpoint_activations else KEPT
    pixels = frames * size * size
    # Layer l = 1..4 has width * 2^(4-l) channels on a grid 2^(5-l) times coarser in each direction.
    values = kept * sum(
        options.width * 2 ** (4 - layer) * pixels // 8 ** (5 - layer) for layer in range(1, 5)
    )
    values += 4 * pixels  # the head
    return [
        ("weights and gradients", 2 * weights),
        ("optimizer of generator", 2 * weights - saved),
        ("average of the generator", weights if options.ema else 0),
        ("latents and their Adam", sum(t.numel() * t.element_size() for t in latents)),
        ("activations (estimate)", batch_size * values * (2 if half else 4)),
        ("clips", clips * 3 * pixels),
        ("networks, kept features", features),
    ]


def too_large(options: TrainOptions) -> VglannError:
    """Return the error for a device that is full before the first step, without a table to show yet."""
    networks = [name for name in options.loss_terms if name in PERCEPTUAL]
    helps = ["--data pinned"] if options.data in ("auto", "resident") else []
    helps.append(f"--width {max(1, options.width // 2)}")
    helps += [f"a --loss without {' and '.join(networks)}"] if networks else []
    parts = ["the generator", "the latents", "the clips", *networks]
    return VglannError(
        f"out of memory before the first step: {', '.join(parts[:-1])} and {parts[-1]} do not fit; try "
        f"{', '.join(helps)} or another device"
    )


def out_of_memory(
    options: TrainOptions, batch_size: int, *, resident: bool, half: bool, features_kept: bool = False
) -> VglannError:
    """The error for a user whose device is full, with the three options that would help most."""
    helps = []
    if features_kept:
        helps.append("--cache-features off")
    if batch_size > 3:
        helps.append(f"--batch-size {batch_size // 2} --accumulate {2 * options.accumulate}")
    if not options.checkpoint_activations:
        helps.append("--checkpoint-activations true")
    if resident:
        helps.append("--data pinned")
    if not half:
        helps.append("--precision bf16")
    helps += [f"--width {max(1, options.width // 2)}", "a smaller --latent-dim", "a device with more memory"]
    return VglannError(
        f"out of memory; try {', or '.join(helps[:3])}. What takes it is listed above; checkpoints are whole"
    )
