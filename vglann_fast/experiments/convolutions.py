"""The transposed convolutions of the generator, variant `original`, width 64, for benchmarks."""

from vglann_kernels.product_configurations import LAYERS

from vglann_fast.experiments.timing import DEVICE

__all__ = ["LAYERS", "channels_of"]


def channels_of(layer: str) -> tuple[int, int]:
    """Return channels (in, out) of a layer; on a CPU an eighth of them."""
    channels, out, _ = LAYERS[layer]
    return (channels, out) if DEVICE == "cuda" else (channels // 8, max(1, out // 8))
