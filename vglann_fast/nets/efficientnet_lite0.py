"""EfficientNet-Lite0 (Tan and Le 2019; the Lite variant of Google, 2020), an ImageNet classifier.

Mobile inverted bottlenecks without squeeze-and-excitation, ReLU6 throughout, BatchNorm with eps 1e-3. The keys
are the keys of the public PyTorch checkpoint (`_conv_stem.weight`, `_blocks.0._depthwise_conv.weight`, ...).
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.nets.padding import pad_same

# blocks, kernel, stride of the first, expansion, channels out
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280
BLOCKS = sum(stage[0] for stage in _STAGES)  # 16; block numbers go from 0
SIZE = 224  # rows and columns of the pictures it was trained on


class _Convolution(nn.Conv2d):
    """A convolution without bias, padded to ceil(size / stride) rows and columns."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, groups: int = 1
    ) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.stride == (1, 1) else pad_same(x, self.kernel_size, self.stride))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Expand 1x1, depthwise, project 1x1; the input is added where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expands = expansion > 1
        self.adds_input = stride == 1 and channels_in == channels_out
        if self.expands:
            self._expand_conv = _Convolution(channels_in, inner, 1, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = _Convolution(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = _Convolution(inner, channels_out, 1, 1)
        self._bn2 = _norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds_input else y


class EfficientNetLite0(nn.Module):
    """The network with its classifier. `loaded` gives it numbers, frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _Convolution(3, _STEM, 3, 2)
        self._bn0 = _norm(_STEM)
        self._blocks = nn.ModuleList()
        channels = _STEM
        for count, kernel, stride, expansion, out in _STAGES:
            for number in range(count):
                self._blocks.append(_Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self._conv_head = _Convolution(channels, _HEAD, 1, 1)
        self._bn1 = _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, 1000)

    @classmethod
    def loaded(cls, tensors: Mapping[str, Tensor]) -> "EfficientNetLite0":
        """The network with these tensors (`load_weights("lite0").tensors`), without gradient, in eval mode."""
        with torch.device("meta"):
            network = cls()
        network.load_state_dict(dict(tensors), assign=True)
        return network.requires_grad_(False).eval()

    def forward(self, x: Tensor, taps: Collection[int] | None = None) -> Tensor | list[Tensor]:
        """Features of pictures.

        Args:
            x: floating [B, 3, H, W], RGB in 0..255; any size, though it was trained at 224.
            taps: numbers of blocks, 0 to 15. No block after the last tap is run.

        Returns:
            Without taps [B, 1280], the means of the last feature maps, each at least 0. With taps the outputs
            [B, C, h, w] of those blocks, in ascending order.
        """
        x = F.relu6(self._bn0(self._conv_stem((x - 127) / 128)))
        outputs = []
        for number, block in enumerate(self._blocks if taps is None else self._blocks[: max(taps) + 1]):
            x = block(x)
            if taps is not None and number in taps:
                outputs.append(x)
        if taps is not None:
            return outputs
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """ImageNet logits [B, 1000] of `forward`'s features."""
        return self._fc(features)
