"""I3D: Inception v1 inflated to 3-D (Carreira and Zisserman 2017), RGB, Kinetics-400. The network of FVD.

"Same" padding as TensorFlow's, ReLU after every unit but the last, BatchNorm with eps 1e-5 as in cd-fvd, whose
figures these are to agree with. The keys follow the public PyTorch checkpoints
(`Conv3d_1a_7x7.conv3d.weight`, `Mixed_3b.b1a.bn.weight`, ...).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.nets.padding import pad_same

CLASSES = 400
SIZE = 224  # rows and columns of its input
MIN_FRAMES = 9  # three strides of 2 leave the 2 steps that the last pooling needs
_Size = tuple[int, int, int]

# module -> channels of the four branches: 1x1; 1x1 then 3x3; 1x1 then 3x3; pooling then 1x1
_MIXED: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "Mixed_3b": (64, (96, 128), (16, 32), 32),
    "Mixed_3c": (128, (128, 192), (32, 96), 64),
    "Mixed_4b": (192, (96, 208), (16, 48), 64),
    "Mixed_4c": (160, (112, 224), (24, 64), 64),
    "Mixed_4d": (128, (128, 256), (24, 64), 64),
    "Mixed_4e": (112, (144, 288), (32, 64), 64),
    "Mixed_4f": (256, (160, 320), (32, 128), 128),
    "Mixed_5b": (256, (160, 320), (32, 128), 128),
    "Mixed_5c": (384, (192, 384), (48, 128), 128),
}


class _Unit(nn.Module):
    """Convolution, BatchNorm, ReLU; or, as the last layer, a convolution with a bias and nothing more."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: _Size = (1, 1, 1),
        stride: _Size = (1, 1, 1),
        last: bool = False,
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels_in, channels_out, kernel, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(channels_out, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class _Pool(nn.Module):
    """Max pooling; the zeros it is padded with never win, as everything before it is a ReLU."""

    def __init__(self, kernel: _Size, stride: _Size) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class _Mixed(nn.Module):
    """Four branches side by side, laid end to end in the channels."""

    def __init__(
        self, channels_in: int, one: int, two: tuple[int, int], three: tuple[int, int], four: int
    ) -> None:
        super().__init__()
        self.b0 = _Unit(channels_in, one)
        self.b1a, self.b1b = _Unit(channels_in, two[0]), _Unit(*two, (3, 3, 3))
        self.b2a, self.b2b = _Unit(channels_in, three[0]), _Unit(*three, (3, 3, 3))
        self.b3a, self.b3b = _Pool((3, 3, 3), (1, 1, 1)), _Unit(channels_in, four)
        self.channels = one + two[1] + three[1] + four

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1
        )


class I3D(nn.Module):
    """The network with its classifier. `loaded` gives it numbers, frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, (7, 7, 7), (2, 2, 2))
        self.MaxPool3d_2a_3x3 = _Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, (3, 3, 3))
        self.MaxPool3d_3a_3x3 = _Pool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, branches in _MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = _Pool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = _Pool((2, 2, 2), (2, 2, 2))
            mixed = _Mixed(channels, *branches)
            setattr(self, name, mixed)
            channels = mixed.channels
        self.avg_pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = _Unit(channels, CLASSES, last=True)

    @classmethod
    def loaded(cls, tensors: Mapping[str, Tensor]) -> "I3D":
        """The network with these tensors (`load_weights("i3d").tensors`), without gradient, in eval mode."""
        with torch.device("meta"):
            network = cls()
        network.load_state_dict(dict(tensors), assign=True)
        return network.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the Kinetics classes.

        x: floating [B, 3, T, 224, 224], RGB in -1..1, T at least 9. Returns [B, 400], averaged over time.
        """
        for layer in self.children():  # in the order they were made
            x = layer(x)
        return x.mean((2, 3, 4))
