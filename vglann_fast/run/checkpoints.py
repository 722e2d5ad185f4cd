"""The checkpoints of a run, as files: written whole, read back checked, pruned.

    checkpoints/step-00000300/
        <part>.safetensors   tensors by name
        state.json           {"format": "vglann-checkpoint", "version": 1, "step", "epoch", ...,
                              "sha256": {file: digest}}; written last, so its presence and the digests say
                              that the checkpoint is whole

This is the folder's side. `glo/checkpoint.py` says what the tensors and the counters mean.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.run.destinations import atomic_dir, remove_dir
from vglann_fast.run.files import load_tensors, read_json, save_tensors, sha256
from vglann_fast.run.os_errors import described

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FORMAT = ("vglann-checkpoint", 1)
STATE_FILE = "state.json"
# What reading a damaged checkpoint raises.
_DAMAGE = (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, VglannError)


class CheckpointFolders:
    """The folder checkpoints/ of the run at `path`. What reading says of damage is added to `warnings`."""

    def __init__(self, path: Path, warnings: list[str]) -> None:
        self.path, self.warnings = path, warnings
        self._damaged: set[Path] = set()

    def save(
        self, step: int, parts: Mapping[str, Mapping[str, "Tensor"]], state: Mapping[str, Any], keep: int = 2
    ) -> Path:
        """Write checkpoints/step-NNNNNNNN and `retain` the newest `keep`.

        Args:
            parts: file name without suffix -> tensors by name, on any device and in any memory format.
            state: JSON-able counters stored beside the tensors.
        """
        name, version = CHECKPOINT_FORMAT
        destination = self.path / "checkpoints" / f"step-{step:08d}"
        with atomic_dir(destination, STATE_FILE, ["*.safetensors"]) as folder:
            digests = {}
            for part, tensors in parts.items():
                file = folder / f"{part}.safetensors"
                save_tensors(tensors, file)
                digests[file.name] = sha256(file)
            record = {"format": name, "version": version, "step": step, **state, "sha256": digests}
            (folder / STATE_FILE).write_text(json.dumps(record, indent=1))
        self._damaged.discard(destination)
        self.retain(step, keep)
        return destination

    def retain(self, step: int, keep: int) -> None:
        """Remove all checkpoints up to `step` but the newest `keep` that are not known to be damaged.

        Later ones stay: they could not be read, but perhaps that passes.
        """
        there = [folder for folder in self.folders() if folder.name <= f"step-{step:08d}"]
        kept = [folder for folder in there if folder not in self._damaged][-keep:]
        for folder in set(there) - set(kept):
            try:
                remove_dir(folder, STATE_FILE)
            except OSError as error:  # no reason to stop the training
                self.warnings.append(f"an old checkpoint stays: {described(error, folder)}")

    def load(self) -> tuple[dict[str, Any], dict[str, dict[str, "Tensor"]]]:
        """The newest whole checkpoint: (state, part -> tensors on the CPU).

        A damaged one is passed over for the one before it, with a line in `warnings`. Raises `VglannError` when
        no checkpoint is whole, `UnreadableError` when a file cannot be read now: the checkpoint may be whole.
        """
        folders = self.folders()
        for folder in reversed(folders):
            try:
                return _read_checkpoint(folder)
            except UnreadableError as error:
                older = f"; or move {folder} away, and the checkpoint before it is used"
                raise UnreadableError(f"{error}{older if folder != folders[0] else ''}") from error
            except _DAMAGE as error:
                self._damaged.add(folder)
                self.warnings.append(f"{folder} is damaged ({error}); using the checkpoint before it")
        hint = (
            "; ".join(self.warnings) or f"none was completed; resume with `vglann train --resume {self.path}`"
        )
        raise VglannError(f"{self.path} has no checkpoint that can be read: {hint}")

    def ids(self) -> list[str]:
        """Return the clip ids in the newest checkpoint that can be read, without its tensors; [] if there is none."""
        for folder in reversed(self.folders()):
            try:
                return list(map(str, read_json(folder / STATE_FILE)["ids"]))
            except _DAMAGE:  # the one before may do
                continue
        return []

    def exist(self) -> bool:
        """Return True if any checkpoint was completed."""
        return bool(self.folders())

    def folders(self) -> list[Path]:
        """Return all checkpoint folders, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-????????"))


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, "Tensor"]]]:
    state = read_json(folder / STATE_FILE)
    if (state["format"], state["version"]) != CHECKPOINT_FORMAT:
        raise ValueError("not a checkpoint of this version")
    counts = [state["step"], *(state.get(name, 0) for name in ("epoch", "position", "processes"))]
    ids = state["ids"]
    if not all(map(is_count, counts)) or type(ids) is not list or not all(isinstance(i, str) for i in ids):
        raise ValueError("a number or the ids are damaged in state.json")
    if folder.name != f"step-{state['step']:08d}":
        raise ValueError(f"state.json is of step {state['step']}")
    parts = {}
    for name, digest in state["sha256"].items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"bad file name {name!r} in state.json")
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
        parts[name.removesuffix(".safetensors")] = load_tensors(folder / name)
    return state, parts
