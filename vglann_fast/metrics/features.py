"""Clips -> features, by named protocols: what a Fréchet distance, precision and recall are computed on.

    i3d          logits of I3D (Kinetics-400) at 224 x 224, as in FVD. Frames are resized as in the PyTorch
                 implementations in use (StyleGAN-V, cd-fvd): bilinear, half-pixel centers. TensorFlow 1, with which
                 FVD was first computed, puts the centers elsewhere; values differ from that.
    transnetv2   TransNetV2's last stage, averaged over frame and clip: order, standstill and flicker, and blur
    lite0        EfficientNet-Lite0, averaged over the frames: what single frames look like
    lite0-step   EfficientNet-Lite0, mean |step| from frame to frame: how fast that changes

Only distances on i3d are an FVD; the others stand in without a Kinetics network. Clips are taken one at a
time, in float32 without TensorFloat-32, so that features do not depend on the batching of the caller. A network that
several protocols look through runs once over each clip.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.nets import i3d, transnetv2
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.weights import load_weights
from vglann_fast.runtime.numerics import numerics

LITE0_SIZE = 128


@dataclass(frozen=True)
class Extractor:
    """One protocol, ready for `extract`.

    protocol: JSON record: {"name", "network", "sha256" of its weight file, "layer", "resize", "size": [rows,
        columns], "range", "color", "frames", "dimensions", "precision"}.
    dimensions: d, of the features. min_frames: of a clip.
    network: what sees a clip, uint8 [3, T, H, W] on the device; protocols may share it.
    reduce: what it gives -> [d].
    """

    protocol: dict[str, Any]
    dimensions: int
    min_frames: int
    device: torch.device
    network: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:
        """Of the protocol."""
        return self.protocol["name"]

    def check(self, clips: Tensor) -> None:
        """Raise `VglannError` unless these are clips it takes."""
        if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[1] != 3:
            raise VglannError(
                f"{self.name}: takes uint8 clips (n, 3, T, H, W), not {clips.dtype} {tuple(clips.shape)}"
            )
        if clips.shape[2] < self.min_frames:
            raise VglannError(
                f"{self.name}: takes clips of at least {self.min_frames} frames, these have {clips.shape[2]}"
            )


def extract(extractors: Mapping[str, Extractor], clips: np.ndarray | Tensor) -> dict[str, Tensor]:
    """Features, float64 [n, d] on the CPU, of uint8 clips [n, 3, T, H, W], RGB, by each of the extractors.

    Raises `VglannError` when there are other than such clips, they have too few frames, or a feature is not finite.
    """
    clips = torch.as_tensor(clips)
    for one in extractors.values():
        one.check(clips)
    found = {
        key: torch.empty(len(clips), one.dimensions, device=one.device) for key, one in extractors.items()
    }
    with torch.inference_mode(), numerics(deterministic=True, tf32=False):
        for row, clip in enumerate(clips):
            seen: dict[Callable[[Tensor], Tensor], Tensor] = {}
            for key, one in extractors.items():
                if one.network not in seen:
                    seen[one.network] = one.network(clip.to(one.device))
                found[key][row] = one.reduce(seen[one.network])
    features = {key: rows.double().cpu() for key, rows in found.items()}
    for key, rows in features.items():
        if not torch.isfinite(rows).all():
            raise VglannError(f"{extractors[key].name}: features are not finite; are its weights damaged?")
    return features


def load_extractors(names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Extractor]:
    """The protocols of these names on a device; protocols of one network share it.

    Raises `VglannError` when a protocol does not exist, or the weights of its network have not been imported.
    """
    networks: dict[str, _Loaded] = {}
    found = {}
    for name in names:
        if name not in _VIEWS:
            raise VglannError(f"no features {name!r}; there are {', '.join(_VIEWS)}")
        view = _VIEWS[name]
        if view.network not in networks:
            networks[view.network] = _load(view.network, device)
        network, record = networks[view.network]
        protocol = {
            "name": name,
            **record,
            "layer": view.layer,
            "color": "RGB",
            "frames": "all of a clip",
            "dimensions": view.dimensions,
            "precision": "float32",
        }
        found[name] = Extractor(
            protocol, view.dimensions, view.min_frames, torch.device(device), network, view.reduce
        )
    return found


@dataclass(frozen=True)
class _View:
    """Features that a protocol makes of the output of its network; see `Extractor`."""

    network: str
    layer: str
    dimensions: int
    min_frames: int
    reduce: Callable[[Tensor], Tensor]


_VIEWS = {
    "i3d": _View("i3d", "logits, averaged over time", i3d.CLASSES, i3d.MIN_FRAMES, lambda logits: logits),
    "transnetv2": _View(
        "transnetv2",
        "third stage, mean of its pixels and the frames",
        transnetv2.CHANNELS[-1],
        2,
        lambda stage: stage.mean((0, 2, 3, 4)),
    ),
    "lite0": _View("lite0", "last feature maps, mean of the frames", 1280, 1, lambda frames: frames.mean(0)),
    "lite0-step": _View(
        "lite0",
        "last feature maps, mean |step| from frame to frame",
        1280,
        2,
        lambda frames: frames.diff(dim=0).abs().mean(0),
    ),
}

_Loaded = tuple[Callable[[Tensor], Tensor], dict[str, Any]]  # a network, and what the record says of it


def _load(name: str, device: torch.device | str) -> _Loaded:
    weights = load_weights(name)
    tensors = {key: tensor.to(device) for key, tensor in weights.tensors.items()}
    network, seen = {"i3d": _i3d, "transnetv2": _transnetv2, "lite0": _lite0}[name](tensors)
    return network, {"network": weights.name, "sha256": weights.sha256, **seen}


def _i3d(tensors: dict[str, Tensor]) -> _Loaded:
    """A clip's logits [400]."""
    network = i3d.I3D.loaded(tensors)
    return lambda clip: network(i3d_input(clip))[0], {
        "resize": "bilinear, half-pixel centers, no antialiasing",
        "size": [i3d.SIZE, i3d.SIZE],
        "range": "-1..1",
    }


def i3d_input(clip: Tensor) -> Tensor:
    """uint8 [3, T, H, W] -> I3D's input [1, 3, T, 224, 224], -1..1."""
    return (_bilinear(clip, i3d.SIZE) / 127.5 - 1).transpose(0, 1)[None]


def _transnetv2(tensors: dict[str, Tensor]) -> _Loaded:
    """A clip's last stage [1, 256, T, 3, 6]."""
    network = transnetv2.TransNetV2.loaded(tensors)
    return lambda clip: network.stages(transnetv2_input(clip))[-1], {
        "resize": "means of areas, rounded to whole levels",
        "size": [transnetv2.HEIGHT, transnetv2.WIDTH],
        "range": "0..1",
    }


def transnetv2_input(clip: Tensor) -> Tensor:
    """uint8 [3, T, H, W] -> TransNetV2's input, uint8 [1, 3, T, 27, 48]."""
    size = (transnetv2.HEIGHT, transnetv2.WIDTH)
    small = F.interpolate(clip.transpose(0, 1).float(), size, mode="area")
    return small.round().to(torch.uint8).transpose(0, 1)[None]


def _lite0(tensors: dict[str, Tensor]) -> _Loaded:
    """The features [T, 1280] of a clip's frames."""
    network = EfficientNetLite0.loaded(tensors)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def frames(clip: Tensor) -> Tensor:
        return network(_bilinear(clip, LITE0_SIZE).contiguous(memory_format=torch.channels_last))

    return frames, {
        "resize": "bilinear, half-pixel centers, no antialiasing",
        "size": [LITE0_SIZE, LITE0_SIZE],
        "range": "0..255, (x - 127) / 128",
    }


def _bilinear(clip: Tensor, size: int) -> Tensor:
    """uint8 [3, T, H, W] -> float32 [T, 3, size, size], 0..255."""
    return F.interpolate(clip.transpose(0, 1).float(), (size, size), mode="bilinear", align_corners=False)
