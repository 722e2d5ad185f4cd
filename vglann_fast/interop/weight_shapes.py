"""What must be in a weight file: the keys and shapes of each public network, and the comparison with them."""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.i3d import I3D
from vglann_fast.nets.transnetv2 import TransNetV2
from vglann_fast.nets.weights import Network

Shape = tuple[int, ...]

# network -> beginnings of keys that are left out
_IGNORED: dict[Network, tuple[str, ...]] = {
    "vgg16": ("classifier.",),
    "hed-vgg16": ("classifier.",),
    "resnet50-3d": ("fc.",),
    "resnext101-3d": ("fc.",),
}
_KINETICS = 400  # classes
_SHOWN = 3  # tensors named of each kind of difference


def checked(name: Network, found: Mapping[str, Tensor], called: str) -> dict[str, Tensor]:
    """The tensors of `found` that the network wants, as float32.

    Keys left out: `num_batches_tracked` everywhere; VGG16's classifier; that of the 3-D networks unless it is for
    the 400 classes of Kinetics.

    Raises `VglannError`, calling the file `called`, unless keys and shapes are the network's and all numbers are
    finite.
    """
    expected, theirs = _compared(name, found)
    differences = _differences(expected, theirs)
    if differences:
        others = [other for other in get_args(Network) if not _differences(*_compared(other, found))]
        hint = f"; it is a file of {others[0]}" if others else ""
        raise VglannError(f"{called}: not the weights of {name}: {', '.join(differences)}{hint}")
    tensors = {}
    for key, shape in expected.items():
        tensor = theirs[key]
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise VglannError(f"{called}: {key} is {tensor.dtype} {tensor.layout}, not floating and dense")
        tensors[key] = tensor.detach().float().reshape(shape).contiguous()
        if not torch.isfinite(tensors[key]).all():
            raise VglannError(f"{called}: {key} is not finite; the file is damaged, get it again")
    return tensors


def _compared(name: Network, found: Mapping[str, Tensor]) -> tuple[dict[str, Shape], dict[str, Tensor]]:
    """The shapes wanted, in view of which shortcuts and classifier there are, and the tensors to compare."""
    expected = expected_shapes(name, shortcut="B" if any("downsample" in key for key in found) else "A")
    ignored = _IGNORED.get(name, ())
    if name.endswith("-3d") and len(found.get("fc.bias", ())) == _KINETICS:
        ignored = ()
        expected |= {"fc.weight": (_KINETICS, 2048), "fc.bias": (_KINETICS,)}
    theirs = {
        key: tensor
        for key, tensor in found.items()
        if not key.startswith(ignored) and not key.endswith(".num_batches_tracked")
    }
    return expected, theirs


def _differences(expected: Mapping[str, Shape], found: Mapping[str, Tensor]) -> list[str]:
    """ "13 missing (a, b, c, ...)", "1 unknown (d)", "2 of another shape (e is 3x4, not 3x5; ...)"."""
    shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    kinds = {
        "missing": [key for key in expected if key not in shapes],
        "unknown": [key for key in shapes if key not in expected],
        "of another shape": [
            f"{key} is {_text(shapes[key])}, not {_text(expected[key])}"
            for key in expected
            if key in shapes and shapes[key] != expected[key]
        ],
    }
    return [
        f"{len(named)} {kind} ({'; '.join(named[:_SHOWN])}{'; ...' if len(named) > _SHOWN else ''})"
        for kind, named in kinds.items()
        if named
    ]


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def expected_shapes(name: Network, shortcut: str = "B") -> dict[str, Shape]:
    """Key -> shape of the tensors a network is stored as, in the order of its state dict, less classifiers that
    may be left out. shortcut: of the 3-D networks, "A" (no parameters) or "B" (a convolution).
    """
    if name in ("vgg16", "hed-vgg16"):
        return _vgg16()
    if name == "resnet50-3d":
        return _resnet3d((3, 4, 6, 3), inner=(64, 128, 256, 512), expansion=4, groups=1, shortcut=shortcut)
    if name == "resnext101-3d":
        inner = (128, 256, 512, 1024)
        return _resnet3d((3, 4, 23, 3), inner=inner, expansion=2, groups=32, shortcut=shortcut)
    with torch.device("meta"):
        network = {"i3d": I3D, "lite0": EfficientNetLite0, "transnetv2": TransNetV2}[name]()
    return {
        key: tuple(tensor.shape)
        for key, tensor in network.state_dict().items()
        if not key.endswith(".num_batches_tracked")
    }


def _vgg16() -> dict[str, Shape]:
    """torchvision's names of the 13 convolutions: `features` counts them with their ReLUs and the poolings."""
    shapes: dict[str, Shape] = {}
    index, channels = 0, 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            shapes[f"features.{index}.weight"] = (width, channels, 3, 3)
            shapes[f"features.{index}.bias"] = (width,)
            index, channels = index + 2, width
        index += 1
    return shapes


def _resnet3d(
    blocks: tuple[int, ...], inner: tuple[int, ...], expansion: int, groups: int, shortcut: str
) -> dict[str, Shape]:
    """The names of 3D-ResNets-PyTorch: bottlenecks of `inner` channels, times `expansion` at their end."""
    shapes = {"conv1.weight": (64, 3, 7, 7, 7), **_norm("bn1", 64)}
    channels = 64
    for layer, (count, width) in enumerate(zip(blocks, inner, strict=True), start=1):
        out = width * expansion
        for block in range(count):
            prefix = f"layer{layer}.{block}"
            for index, shape in enumerate(
                ((width, channels, 1, 1, 1), (width, width // groups, 3, 3, 3), (out, width, 1, 1, 1)),
                start=1,
            ):
                shapes[f"{prefix}.conv{index}.weight"] = shape
                shapes |= _norm(f"{prefix}.bn{index}", shape[0])
            if block == 0 and shortcut == "B":
                shapes[f"{prefix}.downsample.0.weight"] = (out, channels, 1, 1, 1)
                shapes |= _norm(f"{prefix}.downsample.1", out)
            channels = out
    return shapes


def _norm(prefix: str, channels: int) -> dict[str, Shape]:
    return {f"{prefix}.{name}": (channels,) for name in ("weight", "bias", "running_mean", "running_var")}
