"""The transposed convolutions of the generator, variant `original`, width 64, for benchmarks."""

from vglann_fast.experiments.timing import DEVICE

# Channels in and out, and the grid that is read, for a video of 32 x 64 x 64.
LAYERS = {
    "conv2": (512, 256, (2, 4, 4)),
    "conv3": (256, 128, (4, 8, 8)),
    "conv4": (128, 64, (8, 16, 16)),
    "head": (64, 4, (16, 32, 32)),
    "background conv2": (512, 256, (4, 4)),
    "background conv3": (256, 128, (8, 8)),
    "background conv4": (128, 64, (16, 16)),
    "background head": (64, 3, (32, 32)),
}


def channels_of(layer: str) -> tuple[int, int]:
    """Return channels (in, out) of a layer; on a CPU an eighth of them."""
    channels, out, _ = LAYERS[layer]
    return (channels, out) if DEVICE == "cuda" else (channels // 8, max(1, out // 8))
