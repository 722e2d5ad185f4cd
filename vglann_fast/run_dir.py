"""A run: one folder that holds all there is to know about a training and what came of it.

    options.json       {"format": "vglann-run", "version": 1, "preset", "seed", "clips": folder or null,
                       "frames", "size", "train": {...}}; null for a run that was imported without clips. As they
                       are now; a resume that changed some of them is in "resumed": [{"step": it went on from,
                       "changed": {name: [before, after]}, "environment": {name: [before, after]},
                       "latents_on_mismatch": "keep" or "init" where given}]
    environment.json   versions and hardware of the machine that started the run
    history.jsonl      one line for each command that made something of the run later, for `replay`:
                       {"verb", "options": {name: value}, "environment": {...}}
    metrics.jsonl      one JSON object a line: {"stage": "glo" | kind of mapping, "step", ...}; a step of a mapping is
                       an epoch
    checkpoints/step-00000300/
        <part>.safetensors   tensors by name
        state.json           {"format": "vglann-checkpoint", "version": 1, "step", "epoch", ...,
                              "sha256": {file: digest}}; written last, so its presence and the digests say
                              that the checkpoint is whole
    mapping/<kind>/    mapping.safetensors, mapping.json
    tensorboard/       the metrics again, where they were asked for
    .lock              held by the process that writes to the run, and of no effect afterwards
    media/             what `reconstruct`, `sample`, `interpolate` and `invert` write
    profile/           what `profile` writes
    report/index.html

Nothing here is pickled. A checkpoint is written beside its place, flushed and renamed.
"""

import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vglann_fast.atomic import (
    actionable_os_errors,
    atomic_dir,
    atomic_file,
    is_stray,
    make_folder,
    remove_dir,
    remove_strays,
)
from vglann_fast.environment import environment
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
_TORN = (OSError, ValueError, KeyError, TypeError, AttributeError, VglannError)  # what reading raises
LOCK = ".lock"
LOCKED_FOLDERS = (".", "checkpoints", "mapping", "evaluation")  # where only the holder of the lock writes


class RunDir:
    """A run folder. `new` and `begin` make one, `open` opens one that is there."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self.options = options
        self.warnings: list[str] = []
        self._tensorboard: Any = None
        self._damaged: set[Path] = set()  # checkpoints

    @classmethod
    def new(cls, path: str | Path, options: Mapping[str, Any]) -> "RunDir":
        """A run that is to be, in a folder that is new, empty, or of a run that was killed before it had begun;
        nothing is written before `begin`.

        Raises `VglannError` when the folder holds something already.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or not all(map(_is_of_no_run_yet, path.iterdir()))):
            raise _taken(path)
        _check_links(path)
        name, version = RUN_FORMAT
        return cls(path, {"format": name, "version": version, **options})

    def begin(self) -> "RunDir":
        """Write options and environment; from here on the folder is a run.

        Raises `VglannError` when another process has trained in this folder since `new`.
        """
        there = self.path / "options.json"
        if self.has_checkpoint() or (there.exists() and read_json(there) != self.options):
            raise _taken(self.path)
        write_json(self.path / "environment.json", environment())
        write_json(self.path / "options.json", self.options)  # last: `open` looks for it
        return self

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """Open an existing run. Raises `VglannError` when `path` is not one."""
        path = Path(path)
        if not (path / "options.json").is_file():
            raise VglannError(f"{path} is not a run: it has no options.json; make one with `vglann train`")
        _check_links(path)
        options = read_json(path / "options.json")
        if not isinstance(options, dict) or (options.get("format"), options.get("version")) != RUN_FORMAT:
            raise VglannError(f"{path}/options.json: not a run of this version of vglann-fast")
        wrong = [name for name, kind in RUN_OPTIONS.items() if not isinstance(options.get(name, ...), kind)]
        wrong += [name for name in ("seed", "frames", "size") if not _is_count(options.get(name))]
        wrong += ["resumed"] * (not _are_resumes(options.get("resumed", [])))
        if wrong:
            raise VglannError(
                f"{path}/options.json: {', '.join(wrong)} missing or damaged; the file was changed"
            )
        return cls(path, options)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from writing to the run. The lock goes with the process, however that ends.

        Raises `VglannError` that names the process which holds it. A file system without locks has none.
        """
        import fcntl

        with actionable_os_errors(self.path):
            make_folder(self.path)
            # a link could lead to a file of the user's, which would be emptied
            file = os.fdopen(os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                who = file.read(200).strip() or "another process"
                raise VglannError(
                    f"{self.path} is being written by {who}; wait for its end or stop it"
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                self.warnings.append(f"{self.path}: no locks on this file system; start nothing else on it")
            else:
                for folder in LOCKED_FOLDERS:
                    remove_strays(self.path / folder)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def resumed(self, step: int, on_mismatch: str = "error") -> None:
        """Record, in options.json, what differs from there now that the run goes on from `step`."""
        saved = read_json(self.path / "options.json")
        before, after = ({**options["train"], "clips": options["clips"]} for options in (saved, self.options))
        changed = {
            name: [before.get(name), value] for name, value in after.items() if before.get(name) != value
        }
        then, now = self.recorded_environment(), environment()
        for entry in saved.get("resumed", []):
            then |= {name: values[1] for name, values in entry["environment"].items()}
        moved = {
            name: [then.get(name), now[name]]
            for name in now
            if name not in ("command", "started") and then.get(name) != now[name]
        }
        asked = {} if on_mismatch == "error" else {"latents_on_mismatch": on_mismatch}
        if changed or moved or asked:
            entry = {"step": step, "changed": changed, "environment": moved, **asked}
            self.options["resumed"] = [*saved.get("resumed", []), entry]
            write_json(self.path / "options.json", self.options)

    def recorded_environment(self) -> dict[str, Any]:
        """What environment.json holds; nothing if there is none. Raises `VglannError` for one that is damaged."""
        file = self.path / "environment.json"
        recorded = read_json(file) if file.exists() else {}
        if not isinstance(recorded, dict):
            raise VglannError(f"{file}: not a JSON object; the file was changed, remove it")
        return recorded

    def remember(self, verb: str, options: Mapping[str, Any]) -> None:
        """Append a command that made something of this run to history.jsonl."""
        line = {"verb": verb, "options": options, "environment": environment()}
        _append(self.path / "history.jsonl", line)

    def history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl, oldest first; one that was torn by a crash is left out."""
        lines = _json_lines(self.path / "history.jsonl")
        return [x for x in lines if isinstance(x.get("verb"), str) and isinstance(x.get("options"), dict)]

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one object, with "stage" and "step", to metrics.jsonl (and to TensorBoard if it was started)."""
        _append(self.path / "metrics.jsonl", row)
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
        return [row for row in _json_lines(self.path / "metrics.jsonl") if isinstance(row.get("step"), int)]

    def save_checkpoint(
        self, step: int, parts: Mapping[str, Mapping[str, "Tensor"]], state: Mapping[str, Any], keep: int = 2
    ) -> Path:
        """Write checkpoints/step-NNNNNNNN and `retain` the newest `keep`.

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
        self._damaged.discard(destination)
        self.retain(step, keep)
        return destination

    def retain(self, step: int, keep: int) -> None:
        """Remove all checkpoints up to `step` but the newest `keep` that are not known to be damaged.

        Later ones stay: they could not be read, but perhaps that passes.
        """
        there = [folder for folder in self.checkpoint_folders() if folder.name <= f"step-{step:08d}"]
        kept = [folder for folder in there if folder not in self._damaged][-keep:]
        for folder in set(there) - set(kept):
            remove_dir(folder)

    def load_checkpoint(self) -> tuple[dict[str, Any], dict[str, dict[str, "Tensor"]]]:
        """The newest whole checkpoint: (state, part -> tensors on the CPU).

        A torn one is passed over for the one before it, with a line in `warnings`. Raises `VglannError` when
        no checkpoint is whole.
        """
        from safetensors import SafetensorError

        for folder in reversed(self.checkpoint_folders()):
            try:
                return _read_checkpoint(folder)
            except (*_TORN, SafetensorError) as error:
                self._damaged.add(folder)
                self.warnings.append(f"{folder} is damaged ({error}); using the checkpoint before it")
        hint = (
            "; ".join(self.warnings) or f"none was completed; go on with `vglann train --resume {self.path}`"
        )
        raise VglannError(f"{self.path} has no checkpoint that can be read: {hint}")

    def has_checkpoint(self) -> bool:
        """Whether any checkpoint was completed."""
        return bool(self.checkpoint_folders())

    def checkpoint_folders(self) -> list[Path]:
        """Those of all checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-????????"))


def _append(file: Path, value: Mapping[str, Any]) -> None:
    """Add a line to a file that has one object a line. One that was torn by a crash ends there and takes no other."""
    with actionable_os_errors(file), file.open("ab+") as lines:
        size = lines.seek(0, os.SEEK_END)
        lines.seek(max(0, size - 1))
        torn = lines.read() not in (b"", b"\n")
        lines.write(b"\n" * torn + json.dumps(value).encode() + b"\n")


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file that has one a line; other lines, torn by a crash, are left out."""
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _is_of_no_run_yet(entry: Path) -> bool:
    """Whether `RunDir.begin`, killed before its last file, may have left this."""
    return entry.name in (LOCK, "environment.json") or is_stray(entry)


def _taken(path: Path) -> VglannError:
    return VglannError(
        f"{path} is there already; continue that run with --resume {path}, or choose another --out"
    )


def _check_links(path: Path) -> None:
    """Raise `VglannError` for a link that leads out of the run: what is written into a run stays in it."""
    top = path.resolve()
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(folder, name)
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(top):
                raise VglannError(
                    f"{entry} is a link out of the run folder; put what it leads to in its place"
                )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_resumes(entries: Any) -> bool:
    """Whether this is what `RunDir.resumed` writes."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and _is_count(entry.get("step"))
        and all(
            isinstance(entry.get(part), dict)
            and all(isinstance(pair, list) and len(pair) == 2 for pair in entry[part].values())
            for part in ("changed", "environment")
        )
        for entry in entries
    )


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, "Tensor"]]]:
    from safetensors.torch import load_file

    state = read_json(folder / "state.json")
    if (state["format"], state["version"]) != CHECKPOINT_FORMAT:
        raise ValueError("not a checkpoint of this version")
    counts = [state["step"], *(state.get(name, 0) for name in ("epoch", "position", "processes"))]
    ids = state["ids"]
    if not all(map(_is_count, counts)) or type(ids) is not list or not all(isinstance(i, str) for i in ids):
        raise ValueError("a number or the ids are damaged in state.json")
    if folder.name != f"step-{state['step']:08d}":
        raise ValueError(f"state.json is of step {state['step']}")
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
    """Hexadecimal SHA-256 of a file. Raises OSError for what is none: a pipe or a device would never end."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """Read JSON. Raises `VglannError` that names the file when it is not valid or not there."""
    if not path.is_file():  # to read a pipe or a device would block for ever
        raise VglannError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no text, no JSON, or nested or long beyond all bounds
        raise VglannError(f"{path} is not valid JSON: {error}") from error
