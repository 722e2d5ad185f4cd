"""The two-stream video generator: a moving foreground over a still background, from one latent.

    G(z) = m(z) * f(z) + (1 - m(z)) * b(z)

f (colors) and m (mask) come from one stream of 3-D transposed convolutions, b from a 2-D one and is repeated
over time. Every layer but the outputs is followed by BatchNorm and ReLU; f and b end in tanh, m in a sigmoid.
Architecture: Vondrick, Pirsiavash and Torralba, "Generating Videos with Scene Dynamics", 2016, as used by
Afrimi, "Non-Adversarial Video Synthesis with Generative Latent Nearest Neighbors".

Three liberties against the published networks, none of which changes the function computed:
the first layer of both streams reads the same 1x1 input, so it is one matrix product (`stem`); the color and
mask outputs are one 4-channel layer (`head`); and a convolution that feeds a BatchNorm has no bias, since the
BatchNorm subtracts it again.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vglann_kernels import mask_composite

from vglann_fast.glo.batchnorm import ImageNorm, VideoNorm
from vglann_fast.glo.upsampling import ImageUpsampling, VideoUpsampling, normalized
from vglann_fast.options.training import LatentNorm, Variant

UPSAMPLING = 16  # four layers of stride 2: sizes and frame counts are multiples of this


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A 1x1 convolution as the matrix product it is; PyTorch's 3-D one leaves channels-last on a CPU."""
    return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)


Layer = Callable[[Tensor], Tensor]


def run(layer: Layer, x: Tensor) -> Tensor:
    """Plain evaluation of a layer; `glo/memory.py` puts another one in its place to save memory."""
    return layer(x)


class VideoStream(nn.Module):
    """3-D stream: [B, 8w, T/16, H/16, W/16] -> mask and color logits [B, 4, T, H, W]."""

    run: Callable[[Layer, Tensor], Tensor] = staticmethod(run)

    def __init__(self, width: int, *, expanded: bool, reuse_norms: bool) -> None:
        super().__init__()
        self.norm1 = VideoNorm(8 * width)
        # A BatchNorm that is used twice sees two inputs, so the bias of the first cannot be folded into it.
        self.conv2 = VideoUpsampling(8 * width, 4 * width, bias=expanded and reuse_norms)
        self.norm2 = VideoNorm(4 * width)
        self.expand2 = nn.Conv3d(4 * width, 4 * width, 1) if expanded else None
        self.norm2_expanded = VideoNorm(4 * width) if expanded and not reuse_norms else None
        self.conv3 = VideoUpsampling(4 * width, 2 * width)
        self.norm3 = VideoNorm(2 * width)
        self.conv4 = VideoUpsampling(2 * width, width)
        self.norm4 = VideoNorm(width)
        self.head = VideoUpsampling(width, 4, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self._layer1, x)
        x = self.run(self._layer2, x)
        x = self.run(self._layer3, x)
        x = self.run(self._layer4, x)
        return self.head(x)

    def _layer1(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def _layer2(self, x: Tensor) -> Tensor:
        x = normalized(self.conv2, self.norm2, x)
        if self.expand2 is not None:
            x = (self.norm2_expanded or self.norm2)(F.relu(pointwise(self.expand2, x)), relu=False)
        return x

    def _layer3(self, x: Tensor) -> Tensor:
        return normalized(self.conv3, self.norm3, x)

    def _layer4(self, x: Tensor) -> Tensor:
        return normalized(self.conv4, self.norm4, x)


class BackgroundStream(nn.Module):
    """2-D stream: [B, 8w, H/16, W/16] -> background logits [B, 3, H, W]. `expanded` doubles its width."""

    def __init__(self, width: int, *, expanded: bool, reuse_norms: bool) -> None:
        super().__init__()
        wide = 2 if expanded else 1
        self.norm1 = ImageNorm(8 * width)
        self.conv2 = ImageUpsampling(8 * width, 4 * wide * width)
        self.norm2 = ImageNorm(4 * wide * width)
        self.expand2 = nn.Conv2d(4 * wide * width, 4 * wide * width, 1) if expanded else None
        self.conv3 = ImageUpsampling(4 * wide * width, 2 * wide * width)
        self.norm3 = ImageNorm(2 * wide * width)
        self.conv4 = ImageUpsampling(2 * wide * width, wide * width, bias=expanded and reuse_norms)
        self.norm4 = ImageNorm(wide * width)
        self.expand4 = nn.Conv2d(wide * width, wide * width, 1) if expanded else None
        self.norm4_expanded = ImageNorm(wide * width) if expanded and not reuse_norms else None
        self.head = ImageUpsampling(wide * width, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x = normalized(self.conv2, self.norm2, x)
        if self.expand2 is not None:
            x = F.relu(pointwise(self.expand2, x))
        x = normalized(self.conv3, self.norm3, x)
        x = normalized(self.conv4, self.norm4, x)
        if self.expand4 is not None:
            x = (self.norm4_expanded or self.norm4)(F.relu(pointwise(self.expand4, x)), relu=False)
        return self.head(x)


class TwoStreamGenerator(nn.Module):
    """Latents [B, latent_dim] -> videos [B, 3, frames, size, size] in (-1, 1).

    Args:
        variant: "original" (the published network) or "expanded" (wider background and extra 1x1 layers).
        latent_dim: length of a latent.
        width: channels of the last hidden layer; the published networks have 64.
        frames: frames of a video, a multiple of 16.
        size: rows and columns of a video, a multiple of 16.
        latent_norm: latents are divided by their Euclidean norm; "projected" differentiates through that, so
            the latent's gradient is tangent to the sphere; "detached" treats the norm as a constant, as the
            paper's author does. A zero latent gives NaN.
        reuse_norms: `expanded` only: apply two of its BatchNorms twice, as the author's checkpoints do.

    Raises:
        ValueError: unknown variant or latent_norm, or a size that is not a multiple of 16.
    """

    def __init__(
        self,
        variant: Variant = "original",
        latent_dim: int = 100,
        width: int = 64,
        *,
        frames: int = 32,
        size: int = 64,
        latent_norm: LatentNorm = "projected",
        reuse_norms: bool = False,
    ) -> None:
        super().__init__()
        if variant not in ("original", "expanded"):
            raise ValueError(f"variant: expected 'original' or 'expanded', got {variant!r}")
        if latent_norm not in ("projected", "detached"):
            raise ValueError(f"latent_norm: expected 'projected' or 'detached', got {latent_norm!r}")
        for name, value in (("frames", frames), ("size", size)):
            if value <= 0 or value % UPSAMPLING:
                raise ValueError(f"{name}: expected a positive multiple of {UPSAMPLING}, got {value}")
        self.latent_dim = latent_dim
        self.latent_norm = latent_norm
        self.grid = (frames // UPSAMPLING, size // UPSAMPLING, size // UPSAMPLING)
        self.channels = 8 * width
        expanded = variant == "expanded"
        # Output order (position, channel): what follows reads it as channels-last without a copy.
        self.stem = nn.Linear(
            latent_dim, (self.video_positions + self.background_positions) * self.channels, False
        )
        self.video = VideoStream(width, expanded=expanded, reuse_norms=reuse_norms)
        self.background = BackgroundStream(width, expanded=expanded, reuse_norms=reuse_norms)
        self.reset_parameters()

    @property
    def video_positions(self) -> int:
        """Grid points of the video stream's first layer."""
        return math.prod(self.grid)

    @property
    def background_positions(self) -> int:
        """Grid points of the background stream's first layer."""
        return math.prod(self.grid[1:])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-normal weights with gain sqrt(2), as if every output of the published network were its own layer."""
        split = self.video_positions * self.channels
        for rows, positions in (
            (self.stem.weight[:split], self.video_positions),
            (self.stem.weight[split:], self.background_positions),
        ):
            rows.normal_(0.0, _xavier_std(self.latent_dim, self.channels, positions))
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Conv2d | nn.Conv3d):
                nn.init.xavier_normal_(module.weight, gain=math.sqrt(2.0))
        head = self.video.head
        assert head.bias is not None
        taps = head.weight[0, 0].numel()
        for outputs in (slice(0, 3), slice(3, 4)):  # colors and mask are separate layers in the paper
            count = outputs.stop - outputs.start
            head.weight[:, outputs].normal_(0.0, _xavier_std(head.in_channels, count, taps))
            bound = 1.0 / math.sqrt(count * taps)
            head.bias[outputs].uniform_(-bound, bound)

    def channels_last(self) -> "TwoStreamGenerator":
        """Store every convolution weight channels-last, in place; `Module.to` cannot do it for mixed 2-D and 3-D."""
        self.video.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.background.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def logits(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, d] -> (head [B, 4, T, H, W], background [B, 3, H, W]), before the activations.

        Channels 0-2 of the head are colors, channel 3 is the mask. What `mask_composite` reads.
        """
        positions = self.stem(self._unit(z)).unflatten(1, (-1, self.channels))  # [B, P, 8w]
        video, background = positions.split([self.video_positions, self.background_positions], dim=1)
        video = video.unflatten(1, self.grid).movedim(-1, 1)  # [B, 8w, t, h, w], channels last
        background = background.unflatten(1, self.grid[1:]).movedim(-1, 1)  # [B, 8w, h, w], channels last
        return self.video(video), self.background(background)

    def background_logits(self, z: Tensor) -> Tensor:
        """Latents [B, d] -> background [B, 3, H, W] before the activation, without computing the video stream."""
        rows = self.stem.weight[self.video_positions * self.channels :]
        positions = F.linear(self._unit(z), rows).unflatten(1, (-1, self.channels))
        return self.background(positions.unflatten(1, self.grid[1:]).movedim(-1, 1))

    def streams(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, d] -> (foreground [B, 3, T, H, W] in (-1, 1), mask [B, 1, T, H, W] in (0, 1),
        background [B, 3, H, W] in (-1, 1))."""
        head, background = self.logits(z)
        return torch.tanh(head[:, :3]), torch.sigmoid(head[:, 3:]), torch.tanh(background)

    def _unit(self, z: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return z / (norm.detach() if self.latent_norm == "detached" else norm)

    def forward(self, z: Tensor) -> Tensor:
        """Latents [B, d] -> videos [B, 3, T, H, W] in (-1, 1)."""
        video, _ = mask_composite(*self.logits(z))
        return video


def _xavier_std(fan_a: int, fan_b: int, taps: int) -> float:
    return math.sqrt(2.0) * math.sqrt(2.0 / ((fan_a + fan_b) * taps))
