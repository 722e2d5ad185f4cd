"""Arithmetic precision around the training step: what the generator computes in, and whether that can be trusted.

Weights, latents, losses, BatchNorm statistics and Adam are float32 in every precision.

    fp32   float32 throughout; TensorFloat-32 off
    tf32   float32 storage, products in TensorFloat-32
    bf16   activations and products in bfloat16, by autocast
    fp16   the same in float16, with dynamic loss scaling
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.glo.batchnorm import frozen_statistics
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.options.training import Precision, TrainOptions
from vglann_fast.runtime.numerics import numerics
from vglann_fast.runtime.processors import bfloat16_units

log = logging.getLogger("vglann_fast")

T = TypeVar("T")
Logits = Callable[[Tensor], tuple[Tensor, Tensor]]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative L2 distance from float32 that the self-test accepts: of the logits, of the first layer's
# gradient. bfloat16 rounds to 2^-9; through ten layers with BatchNorm a healthy one stays below a fifth of this.
TOLERANCE = (0.1, 0.25)
TEST_BATCH = 4


def resolve_precision(asked: Precision, device: torch.device) -> Precision:
    """The precision that `asked` means on `device`. Raises `VglannError` for one it does not have."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if asked == "auto":
        return "bf16" if capability >= (8, 0) else "fp32"
    if asked in ("tf32", "fp16") and device.type != "cuda":
        raise VglannError(f"--precision {asked}: needs a GPU, the device is {device}; use fp32 or bf16")
    if asked in ("tf32", "bf16") and device.type == "cuda" and capability < (8, 0):
        found = ".".join(map(str, capability))
        raise VglannError(
            f"--precision {asked}: needs compute capability 8.0, {device} has {found}; use fp16 or fp32"
        )
    return asked


def warn_of_slow_precision(precision: Precision, device: torch.device) -> None:
    """Log one line where bfloat16 is emulated: a CPU without units for it took 8 to 34 times float32's time."""
    if precision == "bf16" and device.type == "cpu" and bfloat16_units() is False:
        log.warning(
            "--precision bf16: this CPU has no bfloat16 units and is many times slower in it; use fp32"
        )


def training_numerics(options: TrainOptions, device: torch.device) -> AbstractContextManager[None]:
    """Return the `numerics` in which a training with these options runs on `device`."""
    tf32 = resolve_precision(options.precision, device) == "tf32"
    return numerics(deterministic=options.deterministic, tf32=tf32)


def in_precision(
    logits: Callable[[Tensor], T], precision: Precision, device: torch.device
) -> Callable[[Tensor], T]:
    """`logits` run in `precision`: latents in float32 go in, logits in the precision's dtype come out."""
    dtype = AUTOCAST.get(precision)
    if dtype is None:
        return logits

    def cast(z: Tensor) -> T:
        # The cache of cast weights would outlive the graph it was filled in; a step casts each weight once anyway.
        with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
            return logits(z)

    return cast


class LossScale:
    """Dynamic loss scaling for float16, on the device: no step waits for the host to look.

    Gradients are of `scale` times the loss. A step whose gradients overflow is left out and halves the scale;
    2,000 clean steps in a row double it. (Micikevicius et al., "Mixed Precision Training", 2018, section 3.2.)
    """

    def __init__(self, device: torch.device, scale: float = 2.0**16, patience: int = 2000) -> None:
        self.scale = torch.tensor(scale, device=device)
        self.clean = torch.zeros((), dtype=torch.int64, device=device)
        self.patience = patience

    @torch.no_grad()
    def unscale(self, gradients: Iterable[Tensor]) -> Tensor:
        """Divide `gradients` by the scale, in place; adapt the scale. Returns a bool []: leave this step out."""
        gradients = list(gradients)
        torch._foreach_mul_(gradients, self.scale.reciprocal())
        norms = torch._foreach_norm(gradients, float("inf"))
        overflow = ~torch.isfinite(torch.stack([norm.float() for norm in norms])).all()
        self.clean.copy_(torch.where(overflow, 0, self.clean + 1))
        grow = self.clean >= self.patience
        self.clean.mul_(~grow)
        self.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0)))
        return overflow

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {"scale": self.scale, "clean": self.clean}


def self_test(generator: TwoStreamGenerator, precision: Precision, device: torch.device) -> None:
    """Compare one small forward and backward of the configured generator in `precision` with float32.

    Some versions of PyTorch and cuDNN compute wrong 3-D convolutions in bfloat16 (pytorch#163539, #166122); a
    training would quietly go nowhere. Leaves parameters, gradients and statistics as they are.

    Raises `VglannError` that names the versions.
    """
    if precision == "fp32":
        return
    seed = torch.Generator().manual_seed(0)
    z = torch.randn(TEST_BATCH, generator.latent_dim, generator=seed).to(device)
    with frozen_statistics(generator), numerics(tf32=False):
        exact = _probe(generator.logits, generator, z)
    with frozen_statistics(generator):
        fast = _probe(in_precision(generator.logits, precision, device), generator, z)
    for what, limit, right, found in zip(("output", "gradient"), TOLERANCE, exact, fast, strict=True):
        error = ((found - right).norm() / right.norm()).item()
        if not error <= limit:  # also when it is NaN
            cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
            raise VglannError(
                f"--precision {precision}: the generator's {what} is {error:.2g} off float32 (at most {limit} is "
                f"rounding) with torch {torch.__version__}, cuDNN {cudnn}; use --precision fp32 or change versions"
            )


def _probe(logits: Logits, generator: TwoStreamGenerator, z: Tensor) -> tuple[Tensor, Tensor]:
    """(head logits, gradient of the first layer's weight) in float32."""
    head, background = logits(z)
    score = head.float().tanh().square().mean() + background.float().tanh().square().mean()
    (gradient,) = torch.autograd.grad(score, [generator.stem.weight])
    return head.detach().float(), gradient.float()
