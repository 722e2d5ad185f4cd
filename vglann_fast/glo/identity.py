"""Whose latent is whose, when a training goes on with other clips than it began with.

Latents are stored beside the ids of their clips, in their order. What happens when the clips differ:

    error   nothing; the message lists what is missing and new
    keep    clips that are still there keep their latents and Adam's moments, in whatever order they are now;
            latents of missing clips are dropped, new clips start as in a new training
    init    all latents start as in a new training; the generator stays
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.glo.latents import LatentTable
from vglann_fast.options.training import OnMismatch
from vglann_fast.run.folder import RunDir

_LISTED = 10  # ids named of the missing, and of the new


def has_clips(run: RunDir) -> bool:
    """Whether the run was trained here, on clips; an imported one was not."""
    return run.options["clips"] is not None


def open_clips(run: RunDir, *, verify: bool = False) -> ClipSet:
    """The training clips of a run. Raises `VglannError` when it never had any, or says where they were.

    verify: read all of them and compare their checksums.
    """
    if not has_clips(run):
        raise VglannError(f"{run.path} was imported: it has no clips, and no training that could go on")
    folder = Path(run.options["clips"])
    if not folder.is_dir():
        raise VglannError(
            f"the clips of {run.path} are not in {folder} any more; put them back, or say where they are: "
            f"vglann train CLIPS --resume {run.path}"
        )
    return ClipSet.open(folder, "train", verify=verify)


def clip_changes(trained: Sequence[str], present: Sequence[str]) -> str:
    """What became of the clips, in words; empty if they are the same in the same order."""
    if list(trained) == list(present):
        return ""
    missing, new = sorted(set(trained) - set(present)), sorted(set(present) - set(trained))
    if not missing and not new:
        return "the clips are in another order"
    return f"{_listed(missing, 'missing')}, {_listed(new, 'new')}"


def matched_latents(
    saved: dict[str, Tensor], saved_ids: Sequence[str], latents: LatentTable, on_mismatch: OnMismatch
) -> dict[str, Tensor]:
    """The tensors with which the table `latents`, as it begins, goes on from those saved for `saved_ids`.

    The table may be one process's share of the clips. Whether clips may differ is for `check_clips` to say.
    """
    fresh = latents.tensors()
    if on_mismatch == "init":
        return fresh
    row_of = {clip: row for row, clip in enumerate(saved_ids)}
    known = [row for row, clip in enumerate(latents.ids) if clip in row_of]
    there = [row_of[latents.ids[row]] for row in known]
    matched = {}
    for name, tensor in fresh.items():
        old = saved[name].to(tensor.device)
        if tensor.ndim:
            rows = tensor.clone()
            if name == "adam.row_step":
                rows += saved["adam.step"].to(rows)  # new rows lag behind no step of the table
            rows[known] = old[there]
            old = rows
        matched[name] = old
    return matched


def check_same_clips(trained: Sequence[str], present: Sequence[str], advice: str = "put them back") -> None:
    """Raise `VglannError`, with what is missing and new, unless both are the same clips in the same order."""
    changes = clip_changes(trained, present)
    if changes:
        raise VglannError(f"the clip set changed since the run began: {changes}; {advice}")


def check_clips(trained: Sequence[str], present: Sequence[str], on_mismatch: OnMismatch) -> str:
    """What became of the clips and their latents, in words, empty if nothing. Raises `VglannError` for "error"."""
    if on_mismatch == "error":
        advice = (
            "give the run its old clips, start a new one, or resume with --latents-on-mismatch keep (only new "
            "clips start anew) or init (all do)"
        )
        check_same_clips(trained, present, advice)
    changes = clip_changes(trained, present)
    if not changes:
        return ""
    kept = len(set(trained) & set(present)) if on_mismatch == "keep" else 0
    return f"the clip set changed: {changes}. {kept} latents were kept, {len(present) - kept} start anew"


def _listed(ids: Sequence[str], what: str) -> str:
    names = ", ".join(ids[:_LISTED]) + (", ..." if len(ids) > _LISTED else "")
    return f"{len(ids)} {what}" + (f" ({names})" if ids else "")
