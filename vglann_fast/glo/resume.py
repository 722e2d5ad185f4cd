"""Match saved latents to clips when a training resumes with a different clip set.

Latents are stored beside the ids of their clips, in their order. What happens when the clips differ:

    error   nothing; the message lists what is missing and new
    keep    clips that are still there keep their latents and Adam's moments, in whatever order they are now;
            latents of missing clips are dropped, new clips start as in a new training
    init    all latents start as in a new training; the generator stays
"""

from collections.abc import Sequence

from torch import Tensor

from vglann_fast.clips.of_run import check_same_clips, clip_changes
from vglann_fast.glo.latents import LatentTable
from vglann_fast.options.training import OnMismatch


def matched_latents(
    saved: dict[str, Tensor], saved_ids: Sequence[str], latents: LatentTable, on_mismatch: OnMismatch
) -> dict[str, Tensor]:
    """The tensors with which the table `latents`, as it begins, continues from the tensors of `saved_ids`.

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


def check_clips(trained: Sequence[str], present: Sequence[str], on_mismatch: OnMismatch) -> str:
    """Describe what became of clips and latents, empty if nothing. Raises `VglannError` for "error"."""
    if on_mismatch == "error":
        advice = (
            "give the run its old clips, start a new one, or resume with --latents-on-mismatch keep (only new "
            "clips get new latents) or init (all do)"
        )
        check_same_clips(trained, present, advice)
    changes = clip_changes(trained, present)
    if not changes:
        return ""
    kept = len(set(trained) & set(present)) if on_mismatch == "keep" else 0
    return f"the clip set changed: {changes}. {kept} latents were kept, {len(present) - kept} are new"
