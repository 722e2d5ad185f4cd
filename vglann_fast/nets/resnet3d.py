"""3-D ResNet-50 and ResNeXt-101 of Hara, Kataoka and Satoh (2018), classifiers of Kinetics videos.

A 7x7x7 convolution of stride 1 in time and 2 in space, a maximum of stride 2, four stages of bottleneck blocks of
which all but the first halve time, rows and columns. The keys follow the authors' checkpoints
(`conv1.weight`, `layer1.0.conv1.weight`, `layer1.0.downsample.0.weight`, ..., `fc.weight`).

Shortcuts where the shape changes: "B" is a 1x1x1 convolution with BatchNorm, "A" every second value with zeros for
the further channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.errors import VglannError

Name = Literal["resnet50-3d", "resnext101-3d"]
Shortcut = Literal["A", "B"]
Tap = Literal["pool", "layer1", "layer2", "layer3", "layer4"]
TAPS: tuple[Tap, ...] = ("pool", "layer1", "layer2", "layer3", "layer4")

STEM = 64
MEAN = (114.7748, 107.7354, 99.475)  # of R, G, B in 0..255 over Kinetics; the weights expect x - MEAN


@dataclass(frozen=True)
class _Form:
    """blocks of each stage; channels of the 3x3x3 convolutions of the first, twice as many in each further one;
    their groups; channels out over channels inside."""

    blocks: tuple[int, int, int, int]
    inner: int
    groups: int
    expansion: int


_FORMS: dict[Name, _Form] = {
    "resnet50-3d": _Form((3, 4, 6, 3), 64, 1, 4),
    "resnext101-3d": _Form((3, 4, 23, 3), 128, 32, 2),
}


class _Pointwise(nn.Conv3d):
    """A 1x1x1 convolution as the matrix product it is; PyTorch's own leaves channels-last on a CPU."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        step = self.stride[0]
        x = x[:, :, ::step, ::step, ::step]
        return F.linear(x.movedim(1, -1), self.weight.flatten(1)).movedim(-1, 1)


class _Bottleneck(nn.Module):
    """1x1x1, 3x3x3 with the stride, 1x1x1, each with BatchNorm; the input, or its shortcut, is added."""

    def __init__(
        self, channels: int, inner: int, out: int, groups: int, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = _Pointwise(channels, inner)
        self.bn1 = nn.BatchNorm3d(inner)
        self.conv2 = nn.Conv3d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm3d(inner)
        self.conv3 = _Pointwise(inner, out)
        self.bn3 = nn.BatchNorm3d(out)
        self.stride, self.padding = stride, out - channels
        changes = stride > 1 or self.padding > 0
        self.downsample: nn.Sequential | None = None
        if changes and shortcut == "B":
            self.downsample = nn.Sequential(_Pointwise(channels, out, stride), nn.BatchNorm3d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self._shortcut(x), inplace=True)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.padding)) if self.padding else x


class ResNet3d(nn.Module):
    """The network up to the tap `until`, and with "fc" its classifier, too. `loaded` gives it numbers."""

    def __init__(
        self, name: Name, shortcut: Shortcut = "B", *, until: Tap | Literal["fc"] = "fc", classes: int = 400
    ) -> None:
        super().__init__()
        form = _FORMS[name]
        self.conv1 = nn.Conv3d(3, STEM, 7, (1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(STEM)
        self.stages: tuple[Tap, ...] = TAPS[1 : None if until == "fc" else TAPS.index(until) + 1]
        channels = STEM
        for number, stage in enumerate(self.stages):
            inner = form.inner << number
            blocks = []
            for block in range(form.blocks[number]):
                stride = 2 if block == 0 and number > 0 else 1
                out = inner * form.expansion
                blocks.append(_Bottleneck(channels, inner, out, form.groups, stride, shortcut))
                channels = out
            self.add_module(stage, nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes) if until == "fc" else None

    @classmethod
    def loaded(
        cls,
        name: Name,
        tensors: Mapping[str, Tensor],
        *,
        until: Tap | Literal["fc"] = "fc",
        swap_colors: bool = False,
    ) -> "ResNet3d":
        """The network with these tensors, as deep as `until`, without gradient and in eval mode.

        swap_colors: for videos whose network read B, G, R; this one still reads R, G, B.

        Raises `VglannError` naming a tensor that is missing or of another shape.
        """
        classes = len(tensors["fc.bias"]) if "fc.bias" in tensors else 400
        with torch.device("meta"):
            network = cls(name, shortcut_of(tensors), until=until, classes=classes)
        wanted = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
        wrong = [k for k, like in wanted.items() if k not in tensors or tensors[k].shape != like.shape]
        if wrong:
            raise VglannError(f"not the weights of {name}: {len(wrong)} tensors differ, the first {wrong[0]}")
        chosen = {k: tensors[k] for k in wanted}
        if swap_colors:
            chosen["conv1.weight"] = chosen["conv1.weight"].flip(1)
        for key in network.state_dict().keys() - wanted.keys():
            chosen[key] = torch.zeros((), dtype=torch.int64)  # counters of BatchNorm, which nothing reads
        # Copied, since BatchNorm in train mode writes to them.
        network.load_state_dict({k: v.clone() for k, v in chosen.items()}, assign=True)
        return network.requires_grad_(False).eval()

    def forward(self, x: Tensor, taps: Sequence[Tap]) -> list[Tensor]:
        """The outputs named in `taps`, in the order of `TAPS`, for videos x [B, 3, T, H, W]; no stage after the
        last tap is run. For 3 x 32 x 64 x 64: "pool" [64, 16, 16, 16], "layer1" [256, 16, 16, 16], "layer2" [512,
        8, 8, 8], "layer3" [1024, 4, 4, 4], "layer4" [2048, 2, 2, 2]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool3d(x, 3, 2, padding=1)
        outputs = [x] if "pool" in taps else []
        last = max(TAPS.index(tap) for tap in taps)
        for stage in self.stages[:last]:
            x = self.get_submodule(stage)(x)
            if stage in taps:
                outputs.append(x)
        return outputs

    def classify(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the last stage's features [B, 2048, t, h, w]."""
        assert self.fc is not None
        return self.fc(x.mean((2, 3, 4)))


def shortcut_of(tensors: Mapping[str, Tensor]) -> Shortcut:
    """Return the kind of shortcuts of a checkpoint: "B" brings tensors along."""
    return "B" if any(".downsample." in name for name in tensors) else "A"
