"""A run: one folder that holds all there is to know about a training and what came of it.

    options.json       {"format": "vglann-run", "version": 1, "preset", "seed", "clips": folder or null,
                       "frames", "size", "train": {...}}; null for a run that was imported without clips. As they
                       are now; a resume that changed some of them is in "resumed": [{"step": it went on from,
                       "changed": {name: [before, after]}, "environment": {name: [before, after]},
                       "latents_on_mismatch": "keep" or "init" where given}]
    environment.json   versions and hardware of the machine that started the run
    history.jsonl, metrics.jsonl, tensorboard/    see `logs.py`
    checkpoints/       see `checkpoints.py`
    mapping/<kind>/    mapping.safetensors, mapping.json
    .lock              held by the process that writes to the run, and of no effect afterwards
    media/             what `reconstruct`, `sample`, `interpolate` and `invert` write
    profile/           what `profile` writes
    report/index.html

Nothing here is pickled.
"""

import errno
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vglann_fast.errors import VglannError
from vglann_fast.run.checkpoints import CheckpointFolders, is_count
from vglann_fast.run.environment import environment
from vglann_fast.run.files import (
    actionable_os_errors,
    is_stray,
    make_folder,
    read_json,
    remove_strays,
    write_json,
)
from vglann_fast.run.logs import RunLogs

RUN_FORMAT = ("vglann-run", 1)
RUN_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "preset": str,
    "seed": int,
    "clips": (str, type(None)),  # none: the run was imported
    "frames": int,
    "size": int,
    "train": dict,
}
LOCK = ".lock"
LOCKED_FOLDERS = (".", "checkpoints", "mapping", "evaluation")  # where only the holder of the lock writes


class RunDir:
    """A run folder. `new` and `begin` make one, `open` opens one that is there."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self.options = options
        self.warnings: list[str] = []
        self.logs = RunLogs(path)
        self.checkpoints = CheckpointFolders(path, self.warnings)

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
        if self.checkpoints.exist() or (there.exists() and read_json(there) != self.options):
            raise _taken(self.path)
        write_json(self.path / "environment.json", environment())
        write_json(self.path / "options.json", self.options)  # last: `open` looks for it
        return self

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """Open an existing run. Raises `VglannError` when `path` is not one."""
        path = Path(path)
        if path.is_file():
            raise VglannError(f"{path} is not a run: it is a file; give the run folder that it is in")
        if not (path / "options.json").is_file():
            raise VglannError(f"{path} is not a run: it has no options.json; make one with `vglann train`")
        _check_links(path)
        options = read_json(path / "options.json")
        if not isinstance(options, dict) or options.get("format") != RUN_FORMAT[0]:
            raise VglannError(f"{path}/options.json: not the options of a run; make one with `vglann train`")
        if (version := options.get("version")) != RUN_FORMAT[1]:
            raise VglannError(
                f"{path}/options.json: a run of version {version!r}, this program reads version {RUN_FORMAT[1]}; "
                "update it with `pip install -U vglann-fast`, or train again"
            )
        wrong = [name for name, kind in RUN_OPTIONS.items() if not isinstance(options.get(name, ...), kind)]
        wrong += [name for name in ("seed", "frames", "size") if not is_count(options.get(name))]
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


def _are_resumes(entries: Any) -> bool:
    """Whether this is what `RunDir.resumed` writes."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and is_count(entry.get("step"))
        and all(
            isinstance(entry.get(part), dict)
            and all(isinstance(pair, list) and len(pair) == 2 for pair in entry[part].values())
            for part in ("changed", "environment")
        )
        for entry in entries
    )
