"""Latents -> videos: new ones from a mapping, and walks between the latents of training clips."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import mask_composite, nearest_rows

from vglann_fast.clips.of_run import check_same_clips, has_clips, open_clips
from vglann_fast.clips.pixels import psnr, to_uint8
from vglann_fast.errors import VglannError
from vglann_fast.glo.batchnorm import latent_batches, recompute_batchnorm
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.mapping.base import LatentSampler
from vglann_fast.mapping.fit import load_mapping
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.numerics import numerics
from vglann_fast.samples.write import write_videos

MAX_VIDEOS = 10**7  # at once; more would fail as a lack of memory
STATISTICS_SAMPLES = 256  # latents drawn for BatchNorm statistics, apart from those that are shown


@dataclass(frozen=True)
class RenderedVideos:
    """Generated videos as uint8 arrays; streams as the network made them, before they are mixed."""

    video: np.ndarray  # (n, 3, T, H, W)
    foreground: np.ndarray  # (n, 3, T, H, W)
    mask: np.ndarray  # (n, 1, T, H, W), 255 where only the foreground shows
    background: np.ndarray  # (n, 3, H, W)


@torch.no_grad()
def render(trained: Trained, latents: Tensor) -> RenderedVideos:
    """Generate a video from each of `latents` [n, d], in batches of the run's batch size."""
    limits = trained.options.target_limits
    batches = []
    for z in torch.tensor_split(latents, -(-len(latents) // trained.options.batch_size)):
        head, background = trained.generator.logits(z)
        video, _ = mask_composite(head, background)
        streams = (
            to_uint8(video, limits),
            to_uint8(torch.tanh(head[:, :3]), limits),
            to_uint8(torch.sigmoid(head[:, 3:]), (0.0, 1.0)),
            to_uint8(torch.tanh(background), limits),
        )
        batches.append([stream.cpu().numpy() for stream in streams])
    return RenderedVideos(*(np.concatenate(stream) for stream in zip(*batches, strict=True)))


def training_batches(trained: Trained) -> list[np.ndarray]:
    """Return the rows of the training latents, int64 [b], in batches of the run's size: together every row once.

    A batch has every k-th row: neighbors are clips of one shot, and together they have statistics unlike any batch of
    the training, which costs a run with batchnorm="train" 0.8 dB.
    """
    count = -(-len(trained.latents) // trained.options.batch_size)
    return [np.arange(first, len(trained.latents), count) for first in range(count)]


def render_training_clips(trained: Trained, rows: np.ndarray) -> RenderedVideos:
    """Generate the videos of the training latents `rows`, int64 [b]."""
    return render(trained, trained.latents[torch.from_numpy(rows).to(trained.latents.device)])


@numerics(tf32=False)
def sample(
    run_path: str | Path,
    *,
    n: int = 64,
    seed: int = 0,
    kind: str = "imle",
    device: torch.device | str = "cpu",
) -> Path:
    """New videos from noise -> media/samples, and the training clip nearest to each -> media/nearest.

    Nearest by angle between latents; samples.json also holds the PSNR between the sample and that clip. A run that
    was imported has no clips, so only the nearest latents are named. Returns the folder of the samples. Raises
    `VglannError` when the run has no such mapping or its clips are gone.
    """
    if not 1 <= n <= MAX_VIDEOS:
        raise VglannError(f"-n: expected 1 to {MAX_VIDEOS:,}, got {n}")
    run = RunDir.open(run_path)
    trained = load_trained(run, device)
    clips = open_clips(run) if has_clips(run) else None
    if clips is not None:
        check_same_clips(trained.ids, clips.ids)
    latents = draw_latents(trained, load_mapping(run, kind, device), n, seed)
    made = render(trained, latents)

    rows, squared = nearest_rows(F.normalize(latents, dim=1), F.normalize(trained.latents, dim=1))
    nearest: dict[str, list[Any]] = {
        "id": [trained.ids[row] for row in rows.tolist()],
        "latent_distance": squared.sqrt().tolist(),
    }
    if clips is not None:
        originals = clips.read(rows.cpu().numpy())
        likeness = psnr(torch.from_numpy(made.video), torch.from_numpy(originals))
        nearest["pixel_psnr"] = likeness.tolist()
        write_videos(run.path / "media" / "nearest", originals)
    record = {"seed": seed, "mapping": kind, "n": n, "step": trained.step, "nearest": nearest}
    return write_videos(
        run.path / "media" / "samples",
        made.video,
        foreground=made.foreground,
        mask=made.mask,
        background=made.background,
        latents=latents.float().cpu().numpy(),
        records={"samples": record},
    )


def draw_latents(trained: Trained, mapping: LatentSampler, n: int, seed: int) -> Tensor:
    """n latents [n, d] of a mapping, and the generator made ready for them.

    Where it samples with running BatchNorm statistics, they are taken from other latents of this mapping. Raises
    `VglannError` for a mapping of another run or of numbers beyond all bounds.
    """
    device = trained.latents.device
    latents = mapping.sample(n, torch.Generator(device).manual_seed(seed))
    if latents.shape[1] != trained.options.latent_dim or not torch.isfinite(latents).all():
        raise VglannError(f"{mapping.kind}: its samples are not latents of this run; run `vglann map` again")
    if trained.options.batchnorm == "eval":
        extra = mapping.sample(STATISTICS_SAMPLES, torch.Generator(device).manual_seed(seed + 1))
        recompute_batchnorm(trained.generator, latent_batches(extra, trained.options.batch_size))
    return latents


@numerics(tf32=False)
def interpolate(
    run_path: str | Path, *, steps: int = 8, seed: int = 0, device: torch.device | str = "cpu"
) -> Path:
    """Videos along the great circle between the latents of two training clips -> media/interpolation.

    The clips are drawn with `seed`; `steps` counts both ends. Returns the folder.
    """
    if not 2 <= steps <= MAX_VIDEOS:
        raise VglannError(f"--steps: expected 2 to {MAX_VIDEOS:,}, got {steps}")
    run = RunDir.open(run_path)
    trained = load_trained(run, device)
    if len(trained.latents) < 2:
        raise VglannError(
            f"{run.path} has one latent only, and an interpolation needs two; train on more clips"
        )
    rows = np.random.default_rng(seed).choice(len(trained.latents), 2, replace=False)
    start, end = trained.latents[torch.from_numpy(rows)]
    latents = great_circle(start, end, steps)
    made = render(trained, latents)
    return write_videos(
        run.path / "media" / "interpolation",
        made.video,
        foreground=made.foreground,
        mask=made.mask,
        background=made.background,
        records={"interpolation": {"seed": seed, "between": [trained.ids[row] for row in rows.tolist()]}},
    )


def great_circle(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` unit vectors [steps, d] at equal angles from `start` [d] to `end` [d]; their norms do not matter.

    Shoemake, "Animating Rotation with Quaternion Curves", 1985. Undefined for opposite vectors.
    """
    start, end = F.normalize(start, dim=0), F.normalize(end, dim=0)
    across = end - (end @ start) * start  # of length sin(angle)
    angle = torch.atan2(across.norm(), end @ start)
    t = angle * torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype)[:, None]
    return torch.cos(t) * start + torch.sin(t) * F.normalize(across, dim=0)
