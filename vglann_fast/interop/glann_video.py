"""Checkpoints of the paper author's code (GLANN-VIDEO) -> ours. Key maps and tensor arithmetic only.

Their network has one layer per output where ours has one per input; see `glo/generator.py`. A bias b in front of
a BatchNorm with running mean r becomes a running mean r - b, which is the same function in eval mode, and in
train mode too, where the batch mean takes the bias with it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.options.training import Variant

# ours -> (the author's convolution, BatchNorm). A BatchNorm's name has the index of the layer before it.
_VIDEO_NORMS = {
    "norm1": "batch_norm1",
    "norm2": "batch_norm2",
    "norm3": "batch_norm3",
    "norm4": "batch_norm4",
}
_BACKGROUND_NORMS = {
    "norm1": "bn_in_background",
    "norm2": "bn_conv3_background",
    "norm3": "bn_conv4_background",
    "norm4": "bn_conv5_background",
}
_STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def load_generator(state: Mapping[str, Tensor], variant: Variant = "original") -> TwoStreamGenerator:
    """The author's generator state -> a `TwoStreamGenerator` that computes the same function, in its dtype.

    Args:
        state: the author's state dict, with or without the `module.` prefix of a parallel wrapper.
        variant: which of the author's two networks it is.

    Raises:
        VglannError: keys are missing or left over, or a shape does not fit the variant.
    """
    theirs = {key.removeprefix("module."): value for key, value in state.items()}
    missing = sorted(set(_author_keys(variant)) - theirs.keys())
    extra = sorted(theirs.keys() - set(_author_keys(variant)))
    if missing or extra:
        raise VglannError(
            f"not a GLANN-VIDEO {variant} generator: {len(missing)} keys missing (first: {missing[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]}); is the variant right?"
        )
    ours = _stem_and_heads(theirs)
    for stream, suffix, norms in (
        ("video", "", _VIDEO_NORMS),
        ("background", "_background", _BACKGROUND_NORMS),
    ):
        for index in (2, 3, 4):
            conv = f"{stream}.conv{index}{suffix}"
            ours[f"{stream}.conv{index}.weight"] = theirs[f"{conv}.weight"]
        for index, (norm, their_norm) in enumerate(norms.items(), start=1):
            for name in _STATISTICS:
                ours[f"{stream}.{norm}.{name}"] = theirs[f"{stream}.{their_norm}.{name}"]
            bias = theirs[f"{stream}.conv{index}{suffix}.bias"]
            if f"{stream}.{norm}" in _reused(variant):
                ours[f"{stream}.conv{index}.bias"] = bias
            else:
                ours[f"{stream}.{norm}.running_mean"] = ours[f"{stream}.{norm}.running_mean"] - bias
    for layer, expand in _expansions(variant).items():
        ours[f"{layer}.weight"] = theirs[f"{expand}.weight"].transpose(0, 1)
        ours[f"{layer}.bias"] = theirs[f"{expand}.bias"]

    latent_dim, channels = theirs["video.conv1.weight"].shape[:2]
    generator = TwoStreamGenerator(
        variant, latent_dim, channels // 8, latent_norm="detached", reuse_norms=variant == "expanded"
    ).to(theirs["video.conv1.weight"].dtype)
    try:
        generator.load_state_dict({key: value.contiguous() for key, value in ours.items()})
    except RuntimeError as error:
        raise VglannError(
            f"not a GLANN-VIDEO {variant} generator: {str(error).splitlines()[-1].strip()}"
        ) from error
    return generator


def _stem_and_heads(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows = [
        theirs[key].flatten(2).permute(2, 1, 0).flatten(0, 1)  # [d, C, grid...] -> [grid * C, d]
        for key in ("video.conv1.weight", "background.conv1_background.weight")
    ]
    return {
        "stem.weight": torch.cat(rows),
        "video.head.weight": torch.cat([theirs["foreground.0.weight"], theirs["mask.0.weight"]], dim=1),
        "video.head.bias": torch.cat([theirs["foreground.0.bias"], theirs["mask.0.bias"]]),
        "background.head.weight": theirs["background.conv5_background.weight"],
        "background.head.bias": theirs["background.conv5_background.bias"],
    }


def _reused(variant: Variant) -> set[str]:
    return {"video.norm2", "background.norm4"} if variant == "expanded" else set()


def _expansions(variant: Variant) -> dict[str, str]:
    if variant == "original":
        return {}
    return {
        "video.expand2": "video.expand_conv2",
        "background.expand2": "background.expand_conv2",
        "background.expand4": "background.expand_conv4",
    }


def _author_keys(variant: Variant) -> list[str]:
    layers = ["foreground.0", "mask.0", *_expansions(variant).values()]
    layers += [f"video.conv{i}" for i in range(1, 5)]
    layers += [f"background.conv{i}_background" for i in range(1, 6)]
    keys = [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]
    norms = [f"video.{norm}" for norm in _VIDEO_NORMS.values()]
    norms += [f"background.{norm}" for norm in _BACKGROUND_NORMS.values()]
    return keys + [f"{norm}.{name}" for norm in norms for name in _STATISTICS]
