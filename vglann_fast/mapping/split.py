"""Choose the latents a mapping is fitted to and the latents held out: whole shots.

Clips of one shot, windows one after the other or tiles beside each other, are all but the same; were one of them
fitted and the other held out, overfitting would look like learning.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vglann_fast.clips.of_run import open_clips
from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.run.folder import RunDir

log_line = logging.getLogger(__name__).warning


def shot_numbers(clips: Iterable[dict[str, Any]]) -> Tensor:
    """Index entries of N clips -> int64 [N]: the shots they are of, numbered from 0 as they come.

    Raises `VglannError` for an entry without a shot.
    """
    shots = [(clip["source"], clip.get("shot")) for clip in clips]
    if not all(type(shot) is int for _, shot in shots):
        raise VglannError("the index of the clips does not say of which shot each is")
    numbers = {shot: number for number, shot in enumerate(dict.fromkeys(shots))}
    return torch.tensor([numbers[shot] for shot in shots])


def run_shots(run: RunDir, ids: Sequence[str]) -> Tensor:
    """The shots of a run's clips `ids`, int64 [N]; where they cannot be known, one for each clip, with a warning."""
    try:
        clips = {clip["id"]: clip for clip in open_clips(run).clips}
        if not clips.keys() >= set(ids):
            raise VglannError(f"{run.options['clips']} has not all the clips that {run.path} was trained on")
        return shot_numbers(clips[one] for one in ids)
    except UnreadableError:
        raise
    except VglannError as error:
        _warn_of_single_clips(str(error))
        return torch.arange(len(ids))


def set_aside(latents: Tensor, shots: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Latents [N, d] -> fitted [N-n, d] and held-out latents [n, d]: whole shots, drawn with `seed`.

    As many shots as it takes for `share` of the latents, at least one, and not the last one left; both parts keep
    the order of the latents. Of latents that are all of one shot single ones are taken, with a warning.

    Args:
        latents: [N, d].
        shots: int64 [N] on the CPU, numbered from 0 without a gap; see `run_shots`.
        share: 0 to below 1; 0: none.
        seed: of the order in which shots are taken.

    Raises:
        VglannError: when fewer than two latents would be left to fit.
    """
    if share == 0:
        return latents, None
    sizes = shots.bincount()
    if len(sizes) == 1:
        _warn_of_single_clips("they are all of one shot")
        sizes = torch.ones_like(shots)
        shots = torch.arange(len(latents))
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    before = sizes[order].cumsum(0) - sizes[order]  # latents of the shots that were taken earlier
    taken = order[before < max(1, round(share * len(latents)))][: len(sizes) - 1]
    aside = torch.isin(shots, taken)
    left = int((~aside).sum())
    if left < 2:
        raise VglannError(
            f"--holdout-fraction {share:g} leaves fewer than 2 of {len(latents)} latents to fit; "
            "use --holdout-fraction 0"
        )
    aside = aside.to(latents.device)
    return latents[~aside], latents[aside]


def _warn_of_single_clips(why: str) -> None:
    log_line(
        f"--holdout-fraction: single clips are held out, not whole shots, so some may be nearly the same as clips "
        f"that are fitted ({why})"
    )
