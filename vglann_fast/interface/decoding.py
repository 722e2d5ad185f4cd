"""The latents of a loaded run by clip id, and the videos they decode to."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import Trained
from vglann_fast.samples.sample import great_circle, render_training_clips, training_batches


def with_own_statistics(trained: Trained) -> Trained:
    """Return `trained` with a generator whose BatchNorm statistics may be changed; parameters are shared."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in trained.generator.parameters()}
    generator = copy.deepcopy(trained.generator, shared)
    return replace(trained, generator=generator.train(trained.options.batchnorm == "train"))


def rows_of(trained: Trained, ids: Sequence[str]) -> list[int]:
    """Return the rows of the latents of these clips. Raises `VglannError` for an unknown id, or without any."""
    row_of = {clip: row for row, clip in enumerate(trained.ids)}
    unknown = [clip for clip in ids if clip not in row_of]
    if unknown or not ids:
        problem = f"{unknown[0]!r} is not a training clip of this run" if unknown else "there are none"
        raise VglannError(f"ids: {problem}; take them from Run.ids")
    return [row_of[clip] for clip in ids]


def reconstructed(trained: Trained, rows: Sequence[int]) -> np.ndarray:
    """Return the videos of training latents, uint8 [n, 3, T, H, W], in the order of `rows`.

    Whole batches are generated, so that a video does not depend on the other rows.
    """
    videos: dict[int, np.ndarray] = {}
    for batch in training_batches(trained):
        wanted = np.isin(batch, rows)
        if wanted.any():
            made = render_training_clips(trained, batch).video
            videos.update(zip(batch[wanted].tolist(), made[wanted], strict=True))
    return np.stack([videos[row] for row in rows])


def latents_between(trained: Trained, a: str | Tensor, b: str | Tensor, steps: int) -> Tensor:
    """Return unit latents [steps, d] along the great circle from `a` to `b`, each a clip's id or a latent [d].

    Raises `VglannError` for an unknown id, a latent of another shape, of length 0 or not finite, and, with more than
    two steps, for latents that point in opposite directions.
    """
    start, end = _latent(trained, "a", a), _latent(trained, "b", b)
    if steps > 2 and F.cosine_similarity(start, end, dim=0).item() < -1 + 1e-6:
        raise VglannError("a, b: opposite latents have no shortest way between them; choose others")
    return great_circle(start, end, steps)


def _latent(trained: Trained, name: str, end: str | Tensor) -> Tensor:
    if isinstance(end, str):
        return trained.latents[rows_of(trained, [end])[0]]
    latent = torch.as_tensor(end, dtype=torch.float32, device=trained.latents.device).detach()
    length = latent.norm()
    if latent.shape != trained.latents.shape[1:] or not (torch.isfinite(length) and length > 0):
        raise VglannError(
            f"{name}: expected a clip's id or a latent of {trained.latents.shape[1]} finite numbers, not all 0; "
            "take one from Run.ids or Run.latents"
        )
    return latent
