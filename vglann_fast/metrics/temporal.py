"""Measure how much videos move, and whether their last frame jumps."""

from typing import Any

import torch
from torch import Tensor

_QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95}


def frame_steps(clips: Tensor) -> Tensor:
    """Mean absolute difference, in 1/255, from each frame to the next: uint8 [n, 3, T, H, W] -> float64 [n, T-1].

    Raises ValueError for fewer than 3 frames: a jump at the end needs a step before it.
    """
    if clips.shape[2] < 3:
        raise ValueError(f"clips of {clips.shape[2]} frames: expected at least 3")
    # 16 bits hold every difference; clip by clip the intermediate stays small.
    return torch.stack([clip.short().diff(dim=1).abs().double().mean((0, 2, 3)) for clip in clips])


def motion_statistics(steps: Tensor) -> dict[str, Any]:
    """Return statistics of the frame steps [n, T-1] of a set of clips, JSON-able.

    energy           mean, standard deviation and quantiles over clips of each clip's mean step, in 1/255
    last_frame_jump  the mean last step over the mean of all steps before it; 1 is a steady motion
    steps            mean of each step over the clips, T-1 numbers
    """
    energy = steps.mean(1)
    before = steps[:, :-1].mean().item()
    return {
        "energy": {
            "mean": energy.mean().item(),
            "sd": energy.std(unbiased=False).item(),
            **quantiles(energy),
        },
        "last_frame_jump": steps[:, -1].mean().item() / before if before else None,
        "steps": steps.mean(0).tolist(),
    }


def quantiles(values: Tensor) -> dict[str, float]:
    """5 %, 50 % and 95 % quantiles of float64 [n]."""
    return {name: values.quantile(q).item() for name, q in _QUANTILES.items()}
