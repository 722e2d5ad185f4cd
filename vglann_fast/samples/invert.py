"""Inversion: the latents with which a trained generator best makes given clips. Only latents move.

    trained = load_trained(RunDir.open("run"))
    latents = invert(trained, clips).latents      # an encoder: clips in, latents out

Each clip starts from several latents: latents of training clips whose reconstructions it resembles most, and the
mean of those; the loss
is the run's own, Adam's rate falls to zero along a cosine, and each step ends on the unit sphere. The start
that ends at the highest PSNR wins. BatchNorm is in eval mode, so a clip's latent does not depend on the others.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import mask_composite

from vglann_fast.clips.dataset import INDEX_FILE, ClipSet, read_index
from vglann_fast.clips.pack import pack
from vglann_fast.clips.pixels import psnr, to_uint8
from vglann_fast.errors import VglannError
from vglann_fast.glo.batchnorm import latent_batches, recompute_batchnorm
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.glo.generator import UPSAMPLING
from vglann_fast.glo.latents import BETAS
from vglann_fast.glo.losses import reconstruction_loss
from vglann_fast.glo.perceptual import FeatureLoss, check_weights, load_features, weight_records
from vglann_fast.progress import Progress
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.numerics import numerics
from vglann_fast.samples.nearest import nearest_clips
from vglann_fast.samples.sample import has_clips, open_clips, render
from vglann_fast.samples.write import write_videos

LEARNING_RATE = 0.05  # at the start; latents have length 1
CANDIDATES = 512  # training latents, evenly spaced, among which latents of similar clips are looked for


@dataclass(frozen=True)
class Inversion:
    """latents [n, d] unit rows on the generator's device; psnr float64 [n] of the videos they make, in dB."""

    latents: Tensor
    psnr: Tensor


def invert(
    trained: Trained, clips: np.ndarray, *, starts: int = 4, steps: int = 200, shown: bool = True
) -> Inversion:
    """The latents of `clips`, uint8 (n, 3, T, H, W) of the size the generator makes.

    starts: latents tried for each clip, all at once. steps: gradient steps. shown: whether progress is. The same in
    gives the same out.
    Raises `VglannError` for clips of another size, or starts or steps below 1, and as `load_features`
    and `check_weights`.
    """
    trained = _in_eval_mode(trained)
    # Every frame of a new clip counts.
    trained = replace(trained, options=replace(trained.options, frame_reduction="mean"))
    generator, device = trained.generator, trained.latents.device
    if min(starts, steps) < 1:
        raise VglannError(f"--starts and --steps: expected at least 1, got {starts} and {steps}")
    shape = (3, *(UPSAMPLING * side for side in generator.grid))
    if clips.shape[1:] != shape:
        raise VglannError(f"clips of {clips.shape[2:]} (frames, rows, columns): the run makes {shape[1:]}")
    if not len(clips):
        return Inversion(trained.latents[:0], torch.zeros(0, dtype=torch.float64, device=device))
    features = load_features(trained.options, device)
    check_weights(trained.weights, weight_records(features))
    candidates = _candidates(trained)
    pictures = _small(render(trained, candidates).video).to(device)
    found, quality = [], []
    with Progress("invert", len(clips), "clip", shown=shown) as progress:
        for clip, small in zip(torch.from_numpy(clips).to(device), _small(clips).to(device), strict=True):
            near = (pictures - small).square().sum(1).argsort()[:starts]
            latents = F.normalize(candidates[near], dim=1)
            if starts > 1:
                latents = torch.cat([latents[: starts - 1], latents.mean(0, keepdim=True)])
            latents, scores = _descend(trained, features, clip, latents, steps)
            best = scores.argmax()
            found.append(latents[best])
            quality.append(scores[best])
            progress.advance()
            progress.show(psnr=scores[best].item())
    return Inversion(torch.stack(found), torch.stack(quality))


@numerics(tf32=False)
def invert_videos(
    run_path: str | Path,
    videos: Sequence[str | Path],
    *,
    starts: int = 4,
    steps: int = 200,
    device: torch.device | str = "cpu",
) -> tuple[Path, dict[str, Any]]:
    """Invert videos, cut into clips as the run's are, or the test clips of a clip folder -> media/inversion.

    Returns the folder and what inversion.json holds: {"id", "psnr", "nearest": {"id", "psnr"}}, lists in the order of
    the clips; nearest is the training clip most like it, pixel by pixel, if the run has clips. Raises as `invert`
    and `pack`.
    """
    run = RunDir.open(run_path)
    trained = _in_eval_mode(load_trained(run, device))
    ids, clips = _read_videos(run, [Path(video) for video in videos])
    result = invert(trained, clips, starts=starts, steps=steps)
    made = render(trained, result.latents)
    record: dict[str, Any] = {
        "step": trained.step,
        "starts": starts,
        "steps": steps,
        "id": ids,
        "psnr": result.psnr.tolist(),
    }
    if has_clips(run):
        training = open_clips(run)
        rows, squared = nearest_clips(clips, training, device)
        record["nearest"] = {
            "id": [training.ids[row] for row in rows.tolist()],
            "psnr": (10.0 * (255.0**2 / squared).log10()).tolist(),
        }
    folder = write_videos(
        run.path / "media" / "inversion",
        made.video,
        original=clips,
        foreground=made.foreground,
        mask=made.mask,
        background=made.background,
        latents=result.latents.float().cpu().numpy(),
        records={"inversion": record},
    )
    return folder, record


def _in_eval_mode(trained: Trained) -> Trained:
    """The same with running BatchNorm statistics in use: the statistics of its latents, if it samples by batches."""
    if not trained.generator.training:
        return trained
    recompute_batchnorm(trained.generator, latent_batches(trained.latents, trained.options.batch_size))
    trained.generator.eval()
    return trained


def _descend(
    trained: Trained, features: Mapping[str, FeatureLoss], clip: Tensor, latents: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Minimize the run's loss over each of `latents` [s, d] for one clip: (unit latents [s, d], PSNR [s])."""
    options = trained.options
    target = clip.expand(len(latents), *clip.shape).contiguous()
    against = {name: loss.against(target) for name, loss in features.items()}
    z = F.normalize(latents, dim=1).clone().requires_grad_()
    adam = torch.optim.Adam([z], LEARNING_RATE, betas=BETAS)
    for step in range(steps):
        adam.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        video, _ = mask_composite(*trained.generator.logits(z))
        # Adam does not mind that the mean over the starts scales each one's gradient.
        (z.grad,) = torch.autograd.grad(reconstruction_loss(video, target, options, against), z)
        adam.step()
        with torch.no_grad():
            z.copy_(F.normalize(z, dim=1))
    with torch.no_grad():
        video = trained.generator(z)
    return z.detach(), psnr(to_uint8(video, options.target_limits), target)


def _candidates(trained: Trained) -> Tensor:
    rows = trained.latents
    return rows[:: -(-len(rows) // CANDIDATES)]


def _small(videos: np.ndarray) -> Tensor:
    """uint8 (n, 3, T, H, W) -> float32 [n, 768]: averaged down to 4 frames of 8 x 8."""
    chunks = [torch.from_numpy(chunk).float() for chunk in np.array_split(videos, -(-len(videos) // 64))]
    return torch.cat([F.adaptive_avg_pool3d(chunk, (4, 8, 8)).flatten(1) for chunk in chunks])


def _read_videos(run: RunDir, paths: list[Path]) -> tuple[list[str], np.ndarray]:
    """Ids and clips, uint8 (n, 3, T, H, W), of videos cut as the run's own, or the test clips of a clip folder."""
    if len(paths) == 1 and (paths[0] / INDEX_FILE).is_file():
        clips = ClipSet.open(paths[0], "test")
        return clips.ids, clips.read()
    options = {
        "min_motion": 0.0,
        "test_fraction": 0.0,
        "frames": run.options["frames"],
        "size": run.options["size"],
    }
    if has_clips(run) and Path(run.options["clips"]).is_dir():
        packed = read_index(Path(run.options["clips"]))["options"]
        options |= {name: packed[name] for name in ("stride", "tiles", "stabilize") if name in packed}
    # The clips are still mapped when it ends, which keeps files on network file systems.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pack(paths, Path(folder) / "clips", **options)
        clips = ClipSet.open(Path(folder) / "clips", verify=False)
        return clips.ids, clips.read()
