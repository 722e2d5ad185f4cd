"""Makes a training of its parts: checks what goes together, then builds generator, latents, optimizer and data."""

from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.glo.average import GeneratorAverage
from vglann_fast.glo.batchnorm import sync_batch_norms
from vglann_fast.glo.checkpoint import check_saved_size, new_generator
from vglann_fast.glo.compatibility import batch_size_for, check_compatibility, use_graph
from vglann_fast.glo.cuda_graph import GraphedStep
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.guard import Guard
from vglann_fast.glo.latents import LatentTable, initial_latents
from vglann_fast.glo.loader import open_source
from vglann_fast.glo.memory import checkpoint_activations, compute_contiguously
from vglann_fast.glo.optimizer import GeneratorOptimizer
from vglann_fast.glo.perceptual import load_features
from vglann_fast.glo.precision import (
    Logits,
    LossScale,
    in_precision,
    resolve_precision,
)
from vglann_fast.glo.step import StepLogits
from vglann_fast.glo.training import Training
from vglann_fast.options.choices import Choices
from vglann_fast.options.training import Precision, TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.numerics import seeded


def new_training(
    clips: ClipSet,
    options: TrainOptions,
    run: RunDir,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
    training_class: type[Training] = Training,
    choices: Choices | None = None,
) -> Training:
    """Return a training of `options` on `clips` that has taken no step.

    Args:
        seed: of the first parameters, the first latents and the order of the clips.
        dtype: float32; float64 in conformance tests.
        ranks: this process among those that train together. Default: alone.
        choices: memory format, source of clips and CUDA graph where `options` leave them open; see `glo/measured.py`,
            which has put the other choices into the options. Default: the rules of the program.

    Raises:
        VglannError: too few clips, clips the generator cannot make, options that do not go together here, or a run
            with checkpoints of another size.
    """
    device, ranks, choices = torch.device(device), ranks or Ranks(), choices or {}
    check_saved_size(run, options)
    batch_size = batch_size_for(len(clips), options, ranks)
    precision = resolve_precision(options.precision, device)
    check_compatibility(options, ranks, precision, device)
    features = load_features(options, device, precision=precision, dtype=dtype)
    with seeded(seed) as random:
        generator = new_generator(options, clips.frames, clips.size)
        rows = initial_latents(len(clips), options, random, clips.read)
    generator = generator.to(device, dtype)
    if choices.get("memory_format") == "contiguous":
        compute_contiguously(generator)
    else:
        generator.channels_last()
    ranks.broadcast(generator.parameters())
    own = ranks.owns(len(clips))
    ids = [clips.ids[row] for row in own.tolist()]
    scale = LossScale(device) if precision == "fp16" else None
    # Copied before anything is wrapped around the generator's layers.
    average = GeneratorAverage(generator, options.ema) if options.ema else None
    training = training_class(
        clips=clips,
        options=options,
        run=run,
        seed=seed,
        device=device,
        ranks=ranks,
        batch_size=batch_size,
        precision=precision,
        features=features,
        generator=generator,
        logits=_wrapped_logits(generator, options, precision, device, ranks),
        background_logits=_background_logits(generator, options, precision, device),
        own=own,
        latents=LatentTable(rows[own].to(device, dtype), ids, options),
        guard=Guard.new(batch_size * options.accumulate, device),
        optimizer=GeneratorOptimizer(generator, options, ranks, scale),
        average=average,
        source=open_source(options.data, clips, own.numpy(), device, batch_size, choices.get("data", "")),
    )
    training.graphed = _graphed_step(training, measured=choices.get("execution") == "graph")
    return training


def _wrapped_logits(
    generator: TwoStreamGenerator,
    options: TrainOptions,
    precision: Precision,
    device: torch.device,
    ranks: Ranks,
) -> Logits:
    """Wrap the generator in what the step knows nothing of: memory, processes, compilation and precision."""
    if options.checkpoint_activations:
        checkpoint_activations(generator)
    if options.sync_bn:
        sync_batch_norms(generator, ranks)
    logits = compiled_alone(generator.logits) if options.compile else generator.logits
    return in_precision(logits, precision, device)


def _background_logits(
    generator: TwoStreamGenerator, options: TrainOptions, precision: Precision, device: torch.device
) -> StepLogits:
    """The same for the background alone, which takes too little memory to be checkpointed."""
    logits = generator.background_logits
    background = in_precision(compiled_alone(logits) if options.compile else logits, precision, device)
    return lambda z: (None, background(z))


def compiled_alone(method: Any) -> Any:
    """Compile a method so that this object shares no graph with others of its class.

    torch.compile keeps graphs by the code of a function, which all objects of a class share. Without a copy of the
    code, a generator would take the graph of another one in this process, with the kernels that were chosen for that
    one, and after eight of them none would be compiled. PyTorch also remembers, by file and line, which sizes vary:
    a second training with another batch size is compiled for any size.
    """
    shared = method.__func__
    own = FunctionType(
        shared.__code__.replace(),
        shared.__globals__,
        shared.__name__,
        shared.__defaults__,
        shared.__closure__,
    )
    own.__kwdefaults__ = shared.__kwdefaults__
    return torch.compile(MethodType(own, method.__self__))


def _graphed_step(training: Training, *, measured: bool) -> GraphedStep | None:
    use = use_graph(
        training.options,
        training.device,
        processes=training.ranks.size,
        source=training.source.name,
        precision=training.precision,
        measured=measured,
    )
    if not use:
        return None
    table = training.source.batch(np.zeros(0, np.int64)).clips
    return GraphedStep(
        lambda batch, with_video: training.update([batch], with_video), table, training.batch_size
    )
