"""Clips -> features, by named protocols: what a Fréchet distance, precision and recall are computed on.

    i3d          logits of I3D (Kinetics-400) at 224 x 224: those of FVD. Frames are resized as in the PyTorch
                 implementations in use (StyleGAN-V, cd-fvd): bilinear, half-pixel centres. TensorFlow 1, with which
                 FVD was first computed, puts the centres elsewhere; values differ from that.
    transnetv2   TransNetV2's last stage, averaged over frame and clip: order, standstill and flicker, and blur
    lite0        EfficientNet-Lite0, averaged over the frames: what single frames look like
    lite0-step   EfficientNet-Lite0, mean |step| from frame to frame: how fast that changes

Only distances on i3d are an FVD; the others stand in where there is no Kinetics network. Clips are taken one at a
time, in float32 without TensorFloat-32, so that features do not depend on the batching of the caller.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.nets import i3d, transnetv2
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.weights import load_weights

Protocol = Literal["i3d", "transnetv2", "lite0", "lite0-step"]

LITE0_SIZE = 128


@dataclass(frozen=True)
class Extractor:
    """One protocol, ready to run.

    protocol: JSON record: {"name", "network", "sha256" of its weight file, "layer", "resize", "size": [rows,
        columns], "range", "colour", "frames", "dimensions", "precision"}.
    dimensions: d, of the features. min_frames: of a clip.
    """

    protocol: dict[str, Any]
    dimensions: int
    min_frames: int
    device: torch.device
    features: Callable[[Tensor], Tensor]  # uint8 [3, T, H, W] on the device -> [d]

    def __call__(self, clips: np.ndarray | Tensor) -> Tensor:
        """Features, float64 [n, d] on the CPU, of uint8 clips [n, 3, T, H, W], RGB.

        Raises `VglannError` when there are other than such clips, they have too few frames, or a feature is not
        finite.
        """
        clips = torch.as_tensor(clips)
        name = self.protocol["name"]
        if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[1] != 3:
            raise VglannError(
                f"{name}: takes uint8 clips (n, 3, T, H, W), not {clips.dtype} {tuple(clips.shape)}"
            )
        if clips.shape[2] < self.min_frames:
            raise VglannError(
                f"{name}: takes clips of at least {self.min_frames} frames, these have {clips.shape[2]}"
            )
        found = torch.empty(len(clips), self.dimensions, device=self.device)
        with torch.inference_mode(), _exact_float32():
            for row, clip in zip(found, clips, strict=True):
                row.copy_(self.features(clip.to(self.device)))
        features = found.double().cpu()
        if not torch.isfinite(features).all():
            raise VglannError(f"{name}: features are not finite; are its weights damaged?")
        return features


def extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The protocol `name`, one of `Protocol`, on a device.

    Raises `VglannError` when there is no such protocol, or the weights of its network have not been imported.
    """
    if name not in get_args(Protocol):
        raise VglannError(f"no features {name!r}; there are {', '.join(get_args(Protocol))}")
    weights = load_weights("lite0" if name == "lite0-step" else name)
    tensors = {key: tensor.to(device) for key, tensor in weights.tensors.items()}
    make = {"i3d": _i3d, "transnetv2": _transnetv2, "lite0": _lite0, "lite0-step": _lite0_step}[name]
    features, dimensions, min_frames, what = make(tensors)
    protocol = {
        "name": name,
        "network": weights.name,
        "sha256": weights.sha256,
        **what,
        "colour": "RGB",
        "frames": "all of a clip",
        "dimensions": dimensions,
        "precision": "float32",
    }
    return Extractor(protocol, dimensions, min_frames, torch.device(device), features)


_Made = tuple[Callable[[Tensor], Tensor], int, int, dict[str, Any]]


def _i3d(tensors: dict[str, Tensor]) -> _Made:
    network = i3d.I3D.loaded(tensors)
    what = {
        "layer": "logits, averaged over time",
        "resize": "bilinear, half-pixel centres, no antialiasing",
        "size": [i3d.SIZE, i3d.SIZE],
        "range": "-1..1",
    }
    return lambda clip: network(i3d_input(clip))[0], i3d.CLASSES, i3d.MIN_FRAMES, what


def i3d_input(clip: Tensor) -> Tensor:
    """uint8 [3, T, H, W] -> I3D's input [1, 3, T, 224, 224], -1..1."""
    return (_bilinear(clip, i3d.SIZE) / 127.5 - 1).transpose(0, 1)[None]


def _transnetv2(tensors: dict[str, Tensor]) -> _Made:
    network = transnetv2.TransNetV2.loaded(tensors)

    def features(clip: Tensor) -> Tensor:
        return network.stages(transnetv2_input(clip))[-1].mean((0, 2, 3, 4))

    what = {
        "layer": "third stage, mean of its pixels and the frames",
        "resize": "means of areas, rounded to whole levels",
        "size": [transnetv2.HEIGHT, transnetv2.WIDTH],
        "range": "0..1",
    }
    return features, transnetv2.CHANNELS[-1], 2, what


def transnetv2_input(clip: Tensor) -> Tensor:
    """uint8 [3, T, H, W] -> TransNetV2's input, uint8 [1, 3, T, 27, 48]."""
    size = (transnetv2.HEIGHT, transnetv2.WIDTH)
    small = F.interpolate(clip.transpose(0, 1).float(), size, mode="area")
    return small.round().to(torch.uint8).transpose(0, 1)[None]


def _lite0(tensors: dict[str, Tensor]) -> _Made:
    frames, what = _lite0_frames(tensors)
    return (
        lambda clip: frames(clip).mean(0),
        1280,
        1,
        {**what, "layer": "last feature maps, mean of the frames"},
    )


def _lite0_step(tensors: dict[str, Tensor]) -> _Made:
    frames, what = _lite0_frames(tensors)

    def features(clip: Tensor) -> Tensor:
        return frames(clip).diff(dim=0).abs().mean(0)

    return features, 1280, 2, {**what, "layer": "last feature maps, mean |step| from frame to frame"}


def _lite0_frames(tensors: dict[str, Tensor]) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """A clip's features [T, 1280], and what the record says of them."""
    network = EfficientNetLite0.loaded(tensors)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def frames(clip: Tensor) -> Tensor:
        return network(_bilinear(clip, LITE0_SIZE).contiguous(memory_format=torch.channels_last))

    what = {
        "resize": "bilinear, half-pixel centres, no antialiasing",
        "size": [LITE0_SIZE, LITE0_SIZE],
        "range": "0..255, (x - 127) / 128",
    }
    return frames, what


def _bilinear(clip: Tensor, size: int) -> Tensor:
    """uint8 [3, T, H, W] -> float32 [T, 3, size, size], 0..255."""
    return F.interpolate(clip.transpose(0, 1).float(), (size, size), mode="bilinear", align_corners=False)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """float32 products as such, and the same algorithm each time."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
