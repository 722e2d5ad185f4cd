"""The training clip most like a video, pixel by pixel: what tells a new video from a copy."""

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet

_VIDEOS, _CLIPS = 64, 32  # compared at a time; each takes 8 bytes a value


def nearest_clips(
    videos: np.ndarray, training: ClipSet, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """For uint8 videos (n, 3, T, H, W): rows of `training`, int64 [n], and mean squared differences, float64 [n].

    Exact: sums of squares of whole numbers, which float64 holds. Of equally near clips the lowest row. Raises
    ValueError for videos of another shape than the clips.
    """
    shape = (3, training.frames, training.size, training.size)
    if videos.shape[1:] != shape:
        raise ValueError(f"videos of {videos.shape[1:]}: the training clips are {shape}")
    blocks = np.array_split(videos, max(1, -(-len(videos) // _VIDEOS)))
    found = [_nearest_of_block(_flat(block, device), training, device) for block in blocks]
    return torch.cat([rows for rows, _ in found]), torch.cat([squared for _, squared in found])


def _nearest_of_block(videos: Tensor, training: ClipSet, device: torch.device | str) -> tuple[Tensor, Tensor]:
    best = torch.full((len(videos),), torch.inf, dtype=torch.float64, device=device)
    rows = torch.zeros(len(videos), dtype=torch.int64, device=device)
    for start in range(0, len(training), _CLIPS):
        clips = _flat(training.read(slice(start, start + _CLIPS)), device)
        squares = torch.addmm(clips.square().sum(1), videos, clips.T, alpha=-2)  # [n, b], short of |video|^2
        least, at = squares.min(1)
        rows = torch.where(least < best, start + at, rows)
        best = torch.minimum(best, least)
    return rows.cpu(), ((best + videos.square().sum(1)) / videos.shape[1]).cpu()


def _flat(videos: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(videos).to(device).flatten(1).double()
