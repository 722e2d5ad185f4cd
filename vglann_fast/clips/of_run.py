"""The clips of a run: opening them, and what became of them since the run began."""

from collections.abc import Sequence
from pathlib import Path

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.run.folder import RunDir

_LISTED = 10  # ids named of the missing, and of the new


def has_clips(run: RunDir) -> bool:
    """Return True if the run was trained here, on clips; an imported one was not."""
    return run.options["clips"] is not None


def open_clips(run: RunDir, *, verify: bool = False, share: tuple[int, int] = (0, 1)) -> ClipSet:
    """Return the training clips of a run. Raises `VglannError` when it never had any, or says where they were.

    verify: read all of them, or this process's `share` (see `ClipSet.open`), and compare their checksums.
    """
    if not has_clips(run):
        raise VglannError(f"{run.path} was imported: it has no clips, and no training that could be resumed")
    folder = Path(run.options["clips"])
    if not folder.is_dir():
        raise VglannError(
            f"the clips of {run.path} are not in {folder} any more; put them back, or say where they are: "
            f"vglann train CLIPS --resume {run.path}"
        )
    return ClipSet.open(folder, "train", verify, share)


def clip_changes(trained: Sequence[str], present: Sequence[str]) -> str:
    """Describe what became of the clips; empty if they are the same in the same order."""
    if list(trained) == list(present):
        return ""
    missing, new = sorted(set(trained) - set(present)), sorted(set(present) - set(trained))
    if not missing and not new:
        return "the clips are in another order"
    return f"{_listed(missing, 'missing')}, {_listed(new, 'new')}"


def check_same_clips(trained: Sequence[str], present: Sequence[str], advice: str = "put them back") -> None:
    """Raise `VglannError`, with what is missing and new, unless both are the same clips in the same order."""
    changes = clip_changes(trained, present)
    if changes:
        raise VglannError(f"the clip set changed since the run began: {changes}; {advice}")


def _listed(ids: Sequence[str], what: str) -> str:
    names = ", ".join(ids[:_LISTED]) + (", ..." if len(ids) > _LISTED else "")
    return f"{len(ids)} {what}" + (f" ({names})" if ids else "")
