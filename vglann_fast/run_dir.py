"""A run: one folder that holds all there is to know about a training and what came of it.

    options.json       {"format": "vglann-run", "version": 1, "preset", "seed", "clips": folder or null,
                       "frames", "size", "train": {...}}; null for a run that was imported without clips
    environment.json   versions and hardware of the machine that started the run
    metrics.jsonl      one JSON object a line: {"stage": "glo" | "imle", "step", ...}; a step of imle is an epoch
    checkpoints/step-00000300/
        <part>.safetensors   tensors by name
        state.json           {"format": "vglann-checkpoint", "version": 1, "step", "epoch", ...,
                              "sha256": {file: digest}}; written last, so its presence and the digests say
                              that the checkpoint is whole
    mapping/<kind>/    mapping.safetensors, mapping.json
    tensorboard/       the metrics again, where they were asked for
    media/             what `reconstruct`, `sample`, `interpolate` and `invert` write
    profile/           what `profile` writes
    report/index.html

Nothing here is pickled. A checkpoint is written beside its place, flushed and renamed.
"""

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vglann_fast import __version__
from vglann_fast.atomic import actionable_os_errors, atomic_dir, atomic_file
from vglann_fast.errors import VglannError

if TYPE_CHECKING:
    from torch import Tensor

RUN_FORMAT = ("vglann-run", 1)
RUN_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "preset": str,
    "seed": int,
    "clips": (str, type(None)),  # none: the run was imported
    "frames": int,
    "size": int,
    "train": dict,
}
CHECKPOINT_FORMAT = ("vglann-checkpoint", 1)


class RunDir:
    """A run folder. `new` and `begin` make one, `open` opens one that is there."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self.options = options
        self.warnings: list[str] = []
        self._tensorboard: Any = None

    @classmethod
    def new(cls, path: str | Path, options: Mapping[str, Any]) -> "RunDir":
        """A run that is to be, in a folder that is new or empty; nothing is written before `begin`.

        Raises `VglannError` when the folder holds something already.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise VglannError(
                f"{path} is there already; continue that run with --resume {path}, or choose another --out"
            )
        name, version = RUN_FORMAT
        return cls(path, {"format": name, "version": version, **options})

    def begin(self) -> "RunDir":
        """Write options and environment; from here on the folder is a run."""
        write_json(self.path / "environment.json", environment())
        write_json(self.path / "options.json", self.options)  # last: `open` looks for it
        return self

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """Open an existing run. Raises `VglannError` when `path` is not one."""
        path = Path(path)
        if not (path / "options.json").is_file():
            raise VglannError(f"{path} is not a run: it has no options.json; make one with `vglann train`")
        options = read_json(path / "options.json")
        if not isinstance(options, dict) or (options.get("format"), options.get("version")) != RUN_FORMAT:
            raise VglannError(f"{path}/options.json: not a run of this version of vglann-fast")
        wrong = [name for name, kind in RUN_OPTIONS.items() if not isinstance(options.get(name, ...), kind)]
        if wrong:
            raise VglannError(
                f"{path}/options.json: {', '.join(wrong)} missing or damaged; the file was changed"
            )
        return cls(path, options)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one object, with "stage" and "step", to metrics.jsonl (and to TensorBoard if it was started)."""
        with actionable_os_errors(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._tensorboard is not None:
            for name, value in row.items():
                if name not in ("stage", "step"):
                    self._tensorboard.add_scalar(f"{row['stage']}/{name}", value, row["step"])

    def start_tensorboard(self) -> None:
        """Write what is logged from now on to tensorboard/ too. Raises `VglannError` if it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise VglannError("--tensorboard: pip install 'vglann-fast[tensorboard]'") from error
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The logged rows of one stage, oldest first. A line torn by a crash is left out."""
        return [row for row in self._all_metrics() if row.get("stage") == stage]

    def drop_metrics(self, stage: str, after_step: int) -> None:
        """Remove the rows of `stage` beyond `after_step`: a resumed run logs those steps again."""
        rows = [r for r in self._all_metrics() if r.get("stage") != stage or r.get("step", 0) <= after_step]
        with atomic_file(self.path / "metrics.jsonl") as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _all_metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        rows = []
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def save_checkpoint(
        self, step: int, parts: Mapping[str, Mapping[str, "Tensor"]], state: Mapping[str, Any], keep: int = 2
    ) -> Path:
        """Write checkpoints/step-NNNNNNNN and remove all but the newest `keep`.

        Args:
            parts: file name without suffix -> tensors by name, on any device and in any memory format.
            state: JSON-able counters stored beside the tensors.
        """
        name, version = CHECKPOINT_FORMAT
        destination = self.path / "checkpoints" / f"step-{step:08d}"
        with atomic_dir(destination) as folder:
            digests = {}
            for part, tensors in parts.items():
                file = folder / f"{part}.safetensors"
                save_tensors(tensors, file)
                digests[file.name] = sha256(file)
            record = {"format": name, "version": version, "step": step, **state, "sha256": digests}
            (folder / "state.json").write_text(json.dumps(record, indent=1))
        for old in self._checkpoint_dirs()[:-keep]:
            shutil.rmtree(old)
        return destination

    def load_checkpoint(self) -> tuple[dict[str, Any], dict[str, dict[str, "Tensor"]]]:
        """The newest whole checkpoint: (state, part -> tensors on the CPU).

        A torn one is passed over for the one before it, with a line in `warnings`. Raises `VglannError` when
        no checkpoint is whole.
        """
        from safetensors import SafetensorError

        for folder in reversed(self._checkpoint_dirs()):
            try:
                return _read_checkpoint(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                self.warnings.append(f"{folder} is damaged ({error}); using the checkpoint before it")
        hint = (
            "; ".join(self.warnings) or f"none was completed; go on with `vglann train --resume {self.path}`"
        )
        raise VglannError(f"{self.path} has no checkpoint that can be read: {hint}")

    def has_checkpoint(self) -> bool:
        """Whether any checkpoint was completed."""
        return bool(self._checkpoint_dirs())

    def _checkpoint_dirs(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-????????"))


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, "Tensor"]]]:
    from safetensors.torch import load_file

    state = json.loads((folder / "state.json").read_text())
    if (state["format"], state["version"]) != CHECKPOINT_FORMAT:
        raise ValueError("not a checkpoint of this version")
    if not isinstance(state["step"], int) or not all(isinstance(clip, str) for clip in state["ids"]):
        raise ValueError("step or ids are damaged in state.json")
    parts = {}
    for name, digest in state["sha256"].items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"bad file name {name!r} in state.json")
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
        parts[name.removesuffix(".safetensors")] = load_file(folder / name)
    return state, parts


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path) -> None:
    """Write tensors, on any device and in any memory format, as safetensors.

    The library's own writer reports a full disk as an error of its own kind; a plain write gives an `OSError`.
    """
    from safetensors.torch import save

    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """Read JSON. Raises `VglannError` that names the file when it is not valid or not there."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise VglannError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VglannError(f"{path} is not valid JSON: {error}") from error


def environment() -> dict[str, Any]:
    """Versions and hardware, for environment.json."""
    import torch

    found: dict[str, Any] = {"vglann-fast": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "triton", "faiss-cpu", "faiss-gpu-cu13-cuvs", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["platform"] = platform.platform()
    found["cpu_threads"] = torch.get_num_threads()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["cuda"] = torch.version.cuda
    found["command"] = " ".join(sys.argv)
    found["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    return found
