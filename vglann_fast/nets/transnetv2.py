"""TransNetV2 (Souček and Lokoč 2020): shot cuts in video, by dilated (2+1)-D convolutions at 48 x 27 pixels.

Three stages of two blocks; a block runs four dilations in time side by side. Beside the pictures it compares each
frame with the 50 before and after it, by its own features and by color histograms. The keys follow the
public PyTorch checkpoint (`SDDCNN.0.DDCNN.0.Conv3D_1.layers.0.weight`, ...).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT, WIDTH = 27, 48
CHANNELS = (64, 128, 256)  # of the stages
_DILATIONS = (1, 2, 4, 8)
_NEAR = 50  # frames before and after that a frame is compared with
_SIMILARITY, _HIDDEN = 128, 1024
_BITS = 3  # of each color in the histograms


class _TimeConvolution(nn.Module):
    """A convolution in space, then a dilated one in time, without biases."""

    def __init__(self, channels_in: int, channels_out: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(channels_in, 2 * channels_out, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.Conv3d(
                2 * channels_out,
                channels_out,
                (3, 1, 1),
                dilation=(dilation, 1, 1),
                padding=(dilation, 0, 0),
                bias=False,
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        for dilation in _DILATIONS:
            branch = _TimeConvolution(channels_in, channels_out // len(_DILATIONS), dilation)
            setattr(self, f"Conv3D_{dilation}", branch)
        self.bn = nn.BatchNorm3d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([getattr(self, f"Conv3D_{d}")(x) for d in _DILATIONS], dim=1))


class _Stage(nn.Module):
    """Two blocks, the first added to the second, then half the rows and columns."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_Block(channels_in, channels_out), _Block(channels_out, channels_out)])

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.DDCNN[0](x))
        return F.avg_pool3d(F.relu(self.DDCNN[1](first)) + first, (1, 2, 2))


class _FrameSimilarity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(sum(CHANNELS), _SIMILARITY)
        self.fc = nn.Linear(2 * _NEAR + 1, _SIMILARITY)

    def forward(self, means: Tensor) -> Tensor:
        return F.relu(self.fc(_similarities(self.projection(means))))


class _ColorSimilarity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * _NEAR + 1, _SIMILARITY)

    def forward(self, frames: Tensor) -> Tensor:
        return F.relu(self.fc(_similarities(_histograms(frames).to(self.fc.weight.dtype))))


def _similarities(x: Tensor) -> Tensor:
    """Cosines of each frame [B, T, d] with those around it, [B, T, 101]; zero beyond the ends."""
    x = F.normalize(x, dim=2)
    cosines = F.pad(x @ x.transpose(1, 2), (_NEAR, _NEAR))
    frames = x.shape[1]
    around = torch.arange(frames, device=x.device)[:, None] + torch.arange(2 * _NEAR + 1, device=x.device)
    return cosines.gather(2, around.expand(len(x), -1, -1))


def _histograms(frames: Tensor) -> Tensor:
    """Counts [B, T, 512] of the colors, 8 levels each, of uint8 frames [B, 3, T, H, W]."""
    levels = (frames >> (8 - _BITS)).long()
    colors = (levels[:, 0] << 2 * _BITS) + (levels[:, 1] << _BITS) + levels[:, 2]
    colors = colors.flatten(2)  # [B, T, H * W]
    counts = torch.zeros(*colors.shape[:2], 1 << 3 * _BITS, device=frames.device)
    return counts.scatter_add_(2, colors, torch.ones((), device=frames.device).expand(colors.shape))


class TransNetV2(nn.Module):
    """The network. `loaded` gives it numbers, frozen and in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.SDDCNN = nn.ModuleList(
            _Stage(into, out) for into, out in zip((3, *CHANNELS), CHANNELS, strict=False)
        )
        self.frame_sim_layer = _FrameSimilarity()
        self.color_hist_layer = _ColorSimilarity()
        cells = (HEIGHT // 8) * (WIDTH // 8)  # after three halvings
        self.fc1 = nn.Linear(CHANNELS[-1] * cells + 2 * _SIMILARITY, _HIDDEN)
        self.cls_layer1 = nn.Linear(_HIDDEN, 1)
        self.cls_layer2 = nn.Linear(_HIDDEN, 1)

    @classmethod
    def loaded(cls, tensors: Mapping[str, Tensor]) -> "TransNetV2":
        """The network with these tensors (`load_weights("transnetv2").tensors`), without gradient, in eval mode."""
        with torch.device("meta"):
            network = cls()
        network.load_state_dict(dict(tensors), assign=True)
        return network.requires_grad_(False).eval()

    def stages(self, frames: Tensor) -> list[Tensor]:
        """Outputs of the three stages, [B, C, T, h, w] with C 64, 128, 256, of uint8 [B, 3, T, 27, 48] RGB."""
        x = frames.to(self.fc1.weight.dtype) / 255
        outputs = []
        for stage in self.SDDCNN:
            x = stage(x)
            outputs.append(x)
        return outputs

    def hidden(self, frames: Tensor) -> Tensor:
        """The last hidden layer, [B, T, 1024] and at least 0, of uint8 frames [B, 3, T, 27, 48] RGB."""
        stages = self.stages(frames)
        means = torch.cat([stage.mean((3, 4)) for stage in stages], dim=1).transpose(1, 2)  # [B, T, 448]
        # The public weights count the cells of a frame row by row, channels last.
        cells = stages[-1].permute(0, 2, 3, 4, 1).flatten(2)  # [B, T, 4608]
        x = torch.cat([self.color_hist_layer(frames), self.frame_sim_layer(means), cells], dim=2)
        return F.relu(self.fc1(x))

    def forward(self, frames: Tensor) -> Tensor:
        """Logits [B, T] of "the last frame before a cut" for uint8 frames [B, 3, T, 27, 48] RGB."""
        return self.cls_layer1(self.hidden(frames)).squeeze(2)
