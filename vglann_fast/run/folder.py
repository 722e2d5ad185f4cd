"""A run: one folder that holds all there is to know about a training and what came of it.

    options.json       {"format": "vglann-run", "version": 1, "preset", "seed", "clips": folder or null,
                       "frames", "size", "train": {...}}; null for a run that was imported without clips. As they
                       are now; a resume that changed some of them is in "resumed": [{"step": it went on from,
                       "changed": {name: [before, after]}, "environment": {name: [before, after]},
                       "latents_on_mismatch": "keep" or "init" where given, "choices": [before, after] where they
                       differ}]. A run that took measured choices, see `glo/measured.py`, has "measured": {"machine",
                       "when", "choices"}. Names that earlier versions wrote are read, see `options/aliases.py`
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vglann_fast.errors import VglannError
from vglann_fast.options.aliases import read_run_options
from vglann_fast.options.choices import read_choices
from vglann_fast.run.checkpoints import CheckpointFolders, is_count
from vglann_fast.run.destinations import atomic_dir, content_of
from vglann_fast.run.environment import environment
from vglann_fast.run.files import read_json, write_json
from vglann_fast.run.logs import RunLogs
from vglann_fast.run.os_errors import actionable_os_errors, described
from vglann_fast.run.temporary import make_folder, remove_strays

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
# What `RunDir.begin` leaves when it is killed before its last file.
_OF_NO_RUN_YET = {LOCK, "environment.json"}
# What may lie in a run beside options.json.
_OF_A_RUN = (*_OF_NO_RUN_YET, "*.jsonl", "tensorboard", "checkpoints", "mapping", "evaluation", "media")
# What flock answers on a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
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
        if not _OF_NO_RUN_YET.issuperset(content_of(path)):
            raise _taken(path)
        check_links(path)
        name, version = RUN_FORMAT
        return cls(path, {"format": name, "version": version, **options})

    def begin(self) -> "RunDir":
        """Write options and environment; from here on the folder is a run.

        Raises `VglannError` when another process has trained in this folder since `new`.
        """
        there = self.path / "options.json"
        if self.checkpoints.exist() or (there.exists() and _read_options(self.path) != self.options):
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
        check_links(path)
        options = _read_options(path)
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
        wrong += ["measured"] * ("measured" in options and not _is_measured(options["measured"]))
        if wrong:
            raise VglannError(
                f"{path}/options.json: {', '.join(wrong)} missing or damaged; the file was changed"
            )
        return cls(path, options)

    @contextmanager
    def locked(self, rank: int = 0) -> Iterator[None]:
        """Keep every other process from writing to the run. The lock goes with the process, however that ends.

        rank: this process's number in its job; 0 alone writes and locks. Raises `VglannError` that names the
        process which holds the lock. A file system without locks has none.
        """
        import fcntl

        if rank > 0:
            yield
            return

        lock = self.path / LOCK
        with actionable_os_errors(lock, lock):
            make_folder(self.path)
            # a link could lead to a file of the user's, which would be emptied
            file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+", 0)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                who = os.fsdecode(file.read(200).strip()) or "another process"
                raise VglannError(
                    f"{self.path} is being written by {who}; wait for its end or stop it"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise VglannError(described(error, lock)) from error
                self.warnings.append(f"{self.path}: no locks on this file system; start nothing else on it")
            else:
                for folder in LOCKED_FOLDERS:
                    remove_strays(self.path / folder)
            with suppress(OSError):  # who holds it is only said to be of help
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
            yield

    def resumed(self, step: int, on_mismatch: str = "error") -> None:
        """Record, in options.json, what differs from there now that the run continues from `step`."""
        saved = _read_options(self.path)
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
        asked: dict[str, Any] = {} if on_mismatch == "error" else {"latents_on_mismatch": on_mismatch}
        choices = [options.get("measured", {}).get("choices") for options in (saved, self.options)]
        if choices[0] != choices[1]:
            asked["choices"] = choices
        if changed or moved or asked:
            entry = {"step": step, "changed": changed, "environment": moved, **asked}
            self.options["resumed"] = [*saved.get("resumed", []), entry]
            write_json(self.path / "options.json", self.options)

    def recorded_environment(self) -> dict[str, Any]:
        """Return the content of environment.json, {} without one. Raises `VglannError` for one that is damaged."""
        file = self.path / "environment.json"
        recorded = read_json(file) if file.exists() else {}
        if not isinstance(recorded, dict):
            raise VglannError(f"{file}: not a JSON object; the file was changed, remove it")
        return recorded


@contextmanager
def whole_run(path: str | Path) -> Iterator[Path]:
    """Yield a folder to make a run in; on a clean exit it is the run at `path`, otherwise nothing is left of it.

    For runs that nobody can resume. Raises `VglannError` when the folder `path` holds something already.
    """
    if content_of(path, "options.json", _OF_A_RUN):
        RunDir.new(path, {})
    with atomic_dir(path, "options.json", _OF_A_RUN) as folder:
        yield folder


def _read_options(path: Path) -> Any:
    """Return what options.json holds, under present names, not checked."""
    return read_run_options(read_json(path / "options.json"))


def _taken(path: Path) -> VglannError:
    return VglannError(
        f"{path} is there already; continue that run with --resume {path}, or choose another --out"
    )


def check_links(path: Path) -> None:
    """Raise `VglannError` for a link that leads out of the folder: what is written into a run stays in it."""
    top = Path(os.path.realpath(path))
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(folder, name)
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(top):
                raise VglannError(
                    f"{entry} is a link out of the run folder; put what it leads to in its place"
                )


def _is_measured(value: Any) -> bool:
    """Return True if these are measured choices of a machine."""
    try:
        read_choices(value["choices"])
        return isinstance(value["machine"], dict)
    except (TypeError, KeyError, ValueError):
        return False


def _are_choices(pair: Any) -> bool:
    """Return True if these are measured choices before and after a resume."""
    try:
        before, after = pair
        read_choices(before)
        read_choices(after)
    except (TypeError, ValueError):
        return False
    return True


def _are_resumes(entries: Any) -> bool:
    """Return True if this is what `RunDir.resumed` writes."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and is_count(entry.get("step"))
        and all(
            isinstance(entry.get(part), dict)
            and all(isinstance(pair, list) and len(pair) == 2 for pair in entry[part].values())
            for part in ("changed", "environment")
        )
        and ("choices" not in entry or _are_choices(entry["choices"]))
        for entry in entries
    )
