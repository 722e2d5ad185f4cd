"""Kernels for non-adversarial video generation, each with a PyTorch reference.

Importing this package loads neither torch nor triton: every public name is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batchnorm_relu.op import batch_norm_relu as batch_norm_relu
    from .composite.op import mask_composite as mask_composite
    from .composite_laplacian.op import composite_laplacian_loss as composite_laplacian_loss
    from .impl import Choice as Choice
    from .impl import ImplUnavailable as ImplUnavailable
    from .impl import choices as choices
    from .impl import resolve as resolve
    from .impl import use_impl as use_impl
    from .impl import using_impl as using_impl
    from .laplacian.op import laplacian_pyramid_loss as laplacian_pyramid_loss
    from .latent_adam.op import latent_adam_step as latent_adam_step
    from .latent_adam.op import latent_flush as latent_flush
    from .latent_adam.op import latent_gather as latent_gather
    from .latent_adam.state import LatentAdamState as LatentAdamState
    from .latent_adam.state import latent_adam_state as latent_adam_state
    from .nearest.op import nearest_rows as nearest_rows
    from .step_guard.op import guard_step as guard_step
    from .upsample_conv.op import upsample_convolution as upsample_convolution
    from .upsample_conv.op import upsample_convolution_statistics as upsample_convolution_statistics

_MODULE_OF = {
    "Choice": "impl",
    "ImplUnavailable": "impl",
    "choices": "impl",
    "resolve": "impl",
    "use_impl": "impl",
    "using_impl": "impl",
    "batch_norm_relu": "batchnorm_relu.op",
    "mask_composite": "composite.op",
    "composite_laplacian_loss": "composite_laplacian.op",
    "laplacian_pyramid_loss": "laplacian.op",
    "nearest_rows": "nearest.op",
    "guard_step": "step_guard.op",
    "upsample_convolution": "upsample_conv.op",
    "upsample_convolution_statistics": "upsample_conv.op",
    "LatentAdamState": "latent_adam.state",
    "latent_adam_state": "latent_adam.state",
    "latent_gather": "latent_adam.op",
    "latent_adam_step": "latent_adam.op",
    "latent_flush": "latent_adam.op",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
