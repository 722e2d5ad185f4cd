"""The background phase of a training, and how the foreground begins where that phase ends.

A step of the 2-D background stream alone costs a twentieth of a full one, and a still picture of each clip is most of
what its PSNR consists of. So with --background-share the first passes train the background stream, its rows of the
stem and the latents towards each clip's mean frame, at constant rates. Then `inflate` copies the background stream
into the foreground stream, which starts from a still and has the motion left to learn. The optimizer's state stays.
How long the phase is: `TrainOptions.background_passes`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.options.training import OF_VIDEOS, TrainOptions


def background_options(options: TrainOptions) -> TrainOptions:
    """The options of a background step: the loss without terms that see videos, and without the mask."""
    terms = {name: weight for name, weight in options.loss_terms.items() if name not in OF_VIDEOS}
    loss = ",".join(f"{name}:{weight}" for name, weight in terms.items()) or "laplacian"
    return replace(options, loss=loss, mask_weight=0.0, frame_reduction="mean")


@torch.no_grad()
def copy_stem_rows(generator: TwoStreamGenerator, stem: Tensor) -> None:
    """In a tensor like the weight of the stem, copy the background's rows to the video's, at each position in time.

    Also for the stem's moments: its rows share one step counter, so with moments of zero the first updates of the
    video's rows would be about ten times too large.
    """
    split = generator.video_positions * generator.channels
    stem[:split] = stem[split:].repeat(generator.grid[0], 1)


@torch.no_grad()
def inflate(generator: TwoStreamGenerator) -> None:
    """Copy the background stream into the foreground stream, which then shows the background in every frame.

    A transposed convolution over time with 4 taps, stride 2 and padding 1 gives each frame one of its two center taps
    and one of its two outer taps. So the center taps get the 2-D weight and the outer ones zero. The rows of the
    stem, the norms with their statistics and the color outputs are copied; the mask stays as it is. Variant
    "original" only: the background stream of "expanded" is wider than the foreground stream.
    """
    video, background = generator.video, generator.background
    copy_stem_rows(generator, generator.stem.weight)
    for layer in (1, 2, 3, 4):
        norm = getattr(video, f"norm{layer}")
        for name, tensor in getattr(background, f"norm{layer}").state_dict().items():
            norm.state_dict()[name].copy_(tensor)
    for layer in (2, 3, 4):
        weight = getattr(video, f"conv{layer}").weight
        weight.zero_()
        weight[:, :, 1:3] = getattr(background, f"conv{layer}").weight[:, :, None]
    head, colors = video.head, background.head
    head.weight[:, :3] = 0.0
    head.weight[:, :3, 1:3] = colors.weight[:, :, None]
    assert head.bias is not None
    assert colors.bias is not None
    head.bias[:3] = colors.bias
