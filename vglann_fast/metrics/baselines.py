"""Baselines of a reconstruction: what a video has to beat that needs no generator.

    still    each clip's mean frame, shown for all of its frames
    pca      the principal components of the training clips, as many as a latent has numbers
    nearest  for a held-out clip: the training clip nearest to it, pixel by pixel

A still has no motion and PCA has some, so each PSNR stands beside a motion R^2, see `motion_r2`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import psnr
from vglann_fast.samples.nearest import nearest_clips

BLOCK = 64  # clips held at a time
# Of the randomized PCA: passes over the clips, and directions followed beyond those that are kept.
PASSES, OVERSAMPLING = 4, 20


@dataclass(frozen=True)
class PrincipalComponents:
    """A mean clip [D] and orthonormal directions [D, k], float32 on one device, with D = 3 T H W."""

    mean: Tensor
    directions: Tensor

    @property
    def components(self) -> int:
        """Numbers that describe a clip."""
        return self.directions.shape[1]

    def project(self, clips: np.ndarray) -> Tensor:
        """Return what the components keep of clips, uint8 (n, 3, T, H, W), as uint8 of that shape on the CPU."""
        kept = []
        for start in range(0, len(clips), BLOCK):
            rows = _rows(clips[start : start + BLOCK], self.mean.device) - self.mean
            rows = (rows @ self.directions) @ self.directions.T + self.mean
            kept.append(rows.round_().clamp_(0, 255).byte().cpu())
        return torch.cat(kept).view(clips.shape)


def is_exact(count: int, components: int) -> bool:
    """Return True if so few clips lie in the span of their mean and the components by construction.

    PCA reproduces them without an error, which says nothing about a generator.
    """
    return count <= components + 1


@torch.no_grad()
def fit_pca(
    clips: ClipSet, components: int, device: torch.device | str = "cpu", *, seed: int = 0
) -> PrincipalComponents:
    """Fit the first principal components of `clips`, at most one less than there are clips.

    By subspace iteration from a random start (Halko, Martinsson and Tropp 2011, "Finding structure with randomness",
    algorithm 4.4): each pass streams all clips, 64 at a time, through A^T A. Besides a block, memory holds three
    matrices of D x (components + 20) float32, however many clips there are.
    """
    size = 3 * clips.frames * clips.size**2
    followed = min(components + OVERSAMPLING, len(clips) - 1, size)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(size, followed, generator=generator).to(device)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(clips), BLOCK)]
    total = torch.zeros(size, dtype=torch.float64, device=device)
    for block in blocks:
        total += _rows(clips.read(block), device).sum(0, dtype=torch.float64)
    mean = (total / len(clips)).float()
    for _ in range(PASSES):
        image = torch.zeros_like(directions)
        for block in blocks:
            rows = _rows(clips.read(block), device) - mean
            image.addmm_(rows.T, rows @ directions)  # A^T A directions
        basis, triangle = torch.linalg.qr(image)
        turned, _, _ = torch.linalg.svd(triangle.double())
        directions = basis @ turned.float()  # the strongest direction first
    return PrincipalComponents(mean, directions[:, : min(components, followed)].contiguous())


def motion_sums(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Return the sums behind `motion_r2`, float64 [n] each, for uint8 [n, 3, T, H, W] against uint8 of that shape.

    motion_error   sum of ((x - mean frame of x) - (y - mean frame of y))^2, x the clip and y its reconstruction
    motion_energy  sum of (x - mean frame of x)^2; exactly 0 for a clip that does not move
    """
    x, difference = real.double(), real.double() - made.double()
    return {
        "motion_error": _about_mean_frame(difference),
        "motion_energy": _about_mean_frame(x),
    }


def motion_r2(error: Tensor, energy: Tensor) -> dict[str, Any]:
    """The motion R^2 of clips with these `motion_sums`: 0 for a still, 1 for perfect motion, below 0 for worse.

    motion_r2         1 - sum of errors / sum of energies, over all clips
    motion_r2_median  the median of 1 - error / energy of each clip
    still_clips       how many clips do not move; they are left out

    NaN if no clip moves.
    """
    moves = energy > 0
    by_clip = 1 - error[moves] / energy[moves]
    return {
        "motion_r2": (1 - error[moves].sum() / energy.sum()).item(),
        "motion_r2_median": by_clip.quantile(0.5).item() if len(by_clip) else float("nan"),
        "still_clips": int((~moves).sum()),
    }


def still_psnr(real: Tensor) -> Tensor:
    """The PSNR float64 [n] that each clip's own mean frame has, uint8 [n, 3, T, H, W]; infinite without motion."""
    return psnr(real.double().mean(2, keepdim=True), real)


def pca_quality(pca: PrincipalComponents, clips: np.ndarray) -> dict[str, Tensor]:
    """PSNR and motion error of what the components keep of clips, uint8 (n, 3, T, H, W); float64 [n] each."""
    kept, real = pca.project(clips), torch.from_numpy(clips)
    return {"psnr_pca": psnr(kept, real), "motion_error_pca": motion_sums(kept, real)["motion_error"]}


def nearest_psnr(clips: np.ndarray, training: ClipSet, device: torch.device | str = "cpu") -> Tensor:
    """The PSNR float64 [n] between clips, uint8 (n, 3, T, H, W), and the training clip nearest to each."""
    _, squared = nearest_clips(clips, training, device)
    return 10.0 * (255.0**2 / squared).log10()


def _about_mean_frame(x: Tensor) -> Tensor:
    """Sum of (x - mean frame)^2 of each of float64 [n, 3, T, H, W]."""
    return (x - x.mean(2, keepdim=True)).square().flatten(1).sum(1)


def _rows(clips: np.ndarray, device: torch.device | str) -> Tensor:
    """uint8 (n, 3, T, H, W) -> float32 [n, D]."""
    return torch.from_numpy(clips).to(device).flatten(1).float()
