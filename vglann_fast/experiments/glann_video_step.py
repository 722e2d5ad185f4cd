"""The training step of the GLANN-VIDEO code, in its order of operations: the baseline of bench_glo_step.

One layer per output, contiguous tensors, float32, the background repeated over time, a loss call per frame that
builds the pyramids of both images, dense Adam over all latents. Names of layers are as in its checkpoints, so
`interop.glann_video` reads its weights into ours and both compute the same loss.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETAS = (0.5, 0.999)


class _Video(nn.Module):
    def __init__(self, latent_dim: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose3d(latent_dim, 8 * width, (2, 4, 4))
        self.batch_norm1 = nn.BatchNorm3d(8 * width)
        for index, channels in ((2, 4), (3, 2), (4, 1)):
            layer = nn.ConvTranspose3d(2 * channels * width, channels * width, 4, 2, 1)
            setattr(self, f"conv{index}", layer)
            setattr(self, f"batch_norm{index}", nn.BatchNorm3d(channels * width))

    def forward(self, x: Tensor) -> Tensor:
        for index in (1, 2, 3, 4):
            x = F.relu(getattr(self, f"batch_norm{index}")(getattr(self, f"conv{index}")(x)))
        return x


class _Background(nn.Module):
    NORMS = ("bn_in_background", "bn_conv3_background", "bn_conv4_background", "bn_conv5_background")

    def __init__(self, latent_dim: int, width: int) -> None:
        super().__init__()
        self.conv1_background = nn.ConvTranspose2d(latent_dim, 8 * width, 4)
        setattr(self, self.NORMS[0], nn.BatchNorm2d(8 * width))
        for index, channels in ((2, 4), (3, 2), (4, 1)):
            layer = nn.ConvTranspose2d(2 * channels * width, channels * width, 4, 2, 1)
            setattr(self, f"conv{index}_background", layer)
            setattr(self, self.NORMS[index - 1], nn.BatchNorm2d(channels * width))
        self.conv5_background = nn.ConvTranspose2d(width, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for index, norm in enumerate(self.NORMS, start=1):
            x = F.relu(getattr(self, norm)(getattr(self, f"conv{index}_background")(x)))
        return torch.tanh(self.conv5_background(x))


class GlannVideoGenerator(nn.Module):
    """Latents [B, d] -> videos [B, 3, 32, 64, 64]."""

    def __init__(self, latent_dim: int, width: int) -> None:
        super().__init__()
        self.video = _Video(latent_dim, width)
        self.background = _Background(latent_dim, width)
        self.foreground = nn.Sequential(nn.ConvTranspose3d(width, 3, 4, 2, 1), nn.Tanh())
        self.mask = nn.Sequential(nn.ConvTranspose3d(width, 1, 4, 2, 1), nn.Sigmoid())
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
                nn.init.xavier_normal_(module.weight, gain=math.sqrt(2.0))

    def forward(self, z: Tensor) -> Tensor:
        z = z / z.norm(dim=1, keepdim=True).detach()
        x = self.video(z[:, :, None, None, None])
        foreground, mask = self.foreground(x), self.mask(x)
        background = self.background(z[:, :, None, None]).unsqueeze(2).repeat(1, 1, foreground.shape[2], 1, 1)
        return mask * foreground + (1 - mask) * background


class FrameLoss(nn.Module):
    """The author's Laplacian loss of one frame: pictures [B, 3, H, W], 3 levels and the residual, a sum kernel."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.exp(-((torch.arange(5.0) - 2) ** 2) / 4.0)
        kernel = g[:, None] + g[None, :]
        self.register_buffer("kernel", (kernel / kernel.sum()).expand(3, 1, 5, 5).contiguous())

    kernel: Tensor

    def pyramid(self, image: Tensor) -> list[Tensor]:
        bands = []
        for _ in range(3):
            blurred = F.conv2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), self.kernel, groups=3)
            bands.append(image - blurred)
            image = F.avg_pool2d(blurred, 2)
        return [*bands, image]

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        pairs = zip(self.pyramid(made), self.pyramid(real), strict=True)
        return sum((F.l1_loss(a, b) for a, b in pairs), torch.zeros((), device=made.device))


class GlannVideoStep:
    """One step of the author's training. `clips` [N, 3, T, H, W] uint8 on the device, mapped to [0, 1] as there."""

    def __init__(self, generator: GlannVideoGenerator, latents: Tensor, clips: Tensor) -> None:
        self.generator = generator.train()
        self.latents = nn.Embedding.from_pretrained(latents.clone(), freeze=False)
        self.clips = clips
        self.loss = FrameLoss().to(latents.device)
        self.adams = [
            torch.optim.Adam(generator.parameters(), 0.001, betas=BETAS),
            torch.optim.Adam(self.latents.parameters(), 0.01, betas=BETAS),
        ]

    def __call__(self, rows: Tensor) -> Tensor:
        """The loss [] of the clips `rows` [B], after which generator and latents are updated."""
        real = self.clips[rows].float() / 255.0
        for adam in self.adams:
            adam.zero_grad()
        made = self.generator(self.latents(rows))
        loss = torch.zeros((), device=made.device)
        for frame in range(made.shape[2] - 1):
            loss = loss + self.loss(made[:, :, frame], real[:, :, frame])
        loss.backward()
        for adam in self.adams:
            adam.step()
        return loss.detach()
