"""The verbs that write, at tiny size, and what they leave."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from faults.forked import Ended, run, run_here
from video_files import write_video

from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.interop.weight_shapes import expected_shapes

# These differ from one undisturbed run to the next: times, and how often a command was begun.
WRITERS = (
    "clips pack",
    "train",
    "map",
    "evaluate",
    "sample",
    "reconstruct",
    "interpolate",
    "report",
    "weights import",
)
VOLATILE = {".lock", "environment.json", "history.jsonl"}
SHAPE = ["--width", "2", "--latent-dim", "4", "--levels", "1", "--batch-size", "2", "--background-share", "0"]
TRAIN = ["--epochs", "4", "--checkpoint-every", "1", "--log-every", "1", "--device", "cpu"]

Words = list[str | Path]


@dataclass(frozen=True)
class Verb:
    """A verb that writes into a folder.

    Args:
        name: what it is called in the table.
        before: a folder with what must be there already; it is copied.
        start: folder -> arguments.
        again: folder -> arguments after it was cut short; the same as `start` for all but train.
    """

    name: str
    before: Path
    start: Callable[[Path], Words]
    again: Callable[[Path], Words]

    @property
    def then(self) -> str:
        """The next command after this one was cut short, in words."""
        return "--resume" if self.name == "train" else "the same command again"

    def place(self, folder: Path) -> Path:
        """A fresh folder with what the verb needs; one that was there is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, folder)
        os.environ["VGLANN_WEIGHTS"] = str(folder / "weights")
        return folder


class Route:
    """Inputs of every verb, made once in `root`, and what each leaves when nothing disturbs it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "said.txt"
        self.clips = write_clip_folder(root / "clips", moving_squares(8))
        index = json.loads((self.clips / "index.json").read_text())
        for clip in index["clips"][4:]:
            clip["split"] = "test"
        (self.clips / "index.json").write_text(json.dumps(index))
        self.empty, self.trained, self.mapped = (root / name for name in ("empty", "trained", "mapped"))
        self.empty.mkdir()
        self.trained.mkdir()
        run_here(self.verb("train").start(self.trained))
        shutil.copytree(self.trained, self.mapped)
        run_here(self.verb("map").start(self.mapped))
        run_here(["sample", self.mapped / "run", "-n", "2"])
        self._whole: dict[str, dict[str, str]] = {}

    def verb(self, name: str) -> Verb:
        """A verb by its name."""
        if name == "train":
            command: Words = ["train", self.clips, *SHAPE, *TRAIN]
            return Verb(
                name, self.empty, lambda f: [*command, "--out", f / "run"], partial(self._resume, command)
            )
        if name == "clips pack":
            words: Words = ["clips", "pack", self.videos(), "--frames", "8", "--size", "32", "--workers", "1"]
            return _verb(name, self.empty, lambda f: [*words, "--out", f / "clips"])
        if name == "weights import":
            return _verb(name, self.empty, lambda f: ["weights", "import", "lite0", self.weights()])
        if name == "map":
            options = ["--epochs", "3", "--holdout-fraction", "0", "--device", "cpu"]
            return _verb(name, self.trained, lambda f: ["map", f / "run", *options])
        arguments = {
            "evaluate": ["--features", "none", "--invert", "0"],
            "sample": ["-n", "3", "--seed", "1"],
            "reconstruct": [],
            "interpolate": ["--steps", "3"],
            "report": [],
        }[name]
        return _verb(name, self.mapped, lambda f: [name, f / "run", *arguments])

    def _resume(self, command: Words, folder: Path) -> Words:
        begun = (folder / "run" / "options.json").exists()
        return (
            ["train", "--resume", folder / "run", *TRAIN[2:]]
            if begun
            else [*command, "--out", folder / "run"]
        )

    def whole(self, verb: Verb) -> dict[str, str]:
        """Return what the verb leaves when nothing disturbs it, see `left_in`."""
        if verb.name not in self._whole:
            folder = verb.place(self.root / "whole")
            run_here(verb.start(folder))  # all later ones, which are forked, have what it loads
            self._whole[verb.name] = left_in(folder)
        return self._whole[verb.name]

    def came_through(self, ended: Ended, verb: Verb, folder: Path) -> str | None:
        """None if a command that nothing should disturb ended well and left what it always leaves."""
        return f"exit code {ended.code}: {ended.last_line}" if ended.code else self.mends(verb, folder)

    def mends(self, verb: Verb, folder: Path, newest: bool = False) -> str | None:
        """Continue in `folder` after a fault: None if all that is left then is as if there had been none.

        newest: of the checkpoints only the newest counts, since one was saved out of turn.
        """
        ended = run(verb.again(folder), self.log)
        problem = self.differs(ended, verb, folder, newest)
        return problem and f"{verb.name} afterwards: {problem}"

    def differs(self, ended: Ended, verb: Verb, folder: Path, newest: bool = False) -> str | None:
        """None if a command ended well and `folder` holds what an undisturbed one leaves; else what is wrong."""
        if ended.code:
            return f"exit code {ended.code}: {ended.last_line}"
        left, whole = left_in(folder), self.whole(verb)
        if newest:
            left, whole = (_newest_checkpoint(one) for one in (left, whole))
        differing = sorted(name for name in left | whole if left.get(name) != whole.get(name))
        return f"{', '.join(differing[:3])} differ" if differing else None

    def videos(self) -> Path:
        """A folder of two short videos."""
        folder = self.root / "videos"
        if not folder.exists():
            folder.mkdir()
            for number, clip in enumerate(moving_squares(2, frames=24, size=64)):
                write_video(folder / f"{number}.mkv", list(clip.transpose(1, 2, 3, 0)))
        return folder

    def weights(self) -> Path:
        """A weight file of lite0's shapes."""
        file = self.root / "lite0.safetensors"
        if not file.exists():
            from safetensors.numpy import save_file

            shapes = expected_shapes("lite0").items()
            save_file({name: np.full(shape, n, np.float32) for n, (name, shape) in enumerate(shapes)}, file)
        return file


def writers(share: float) -> tuple[str, ...]:
    """The verbs that write; with less than a tenth of the full count, two of them."""
    return WRITERS if share >= 0.1 else ("train", "map")


def _verb(name: str, before: Path, start: Callable[[Path], Words]) -> Verb:
    return Verb(name, before, start, start)


def left_in(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder` by its name, except strays and what differs from run to run.

    Of metrics.jsonl the seconds do not count.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file() or file.name in VOLATILE or ".tmp-" in name:
            continue
        content = file.read_bytes()
        if file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            content = repr([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def strays(folder: Path) -> list[str]:
    """Temporary files and folders that were left under `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".tmp-*"))


def _newest_checkpoint(left: dict[str, str]) -> dict[str, str]:
    steps = sorted(name for name in left if name.startswith("run/checkpoints/"))
    newest = steps[-1].split("/")[2] if steps else ""
    return {name: digest for name, digest in left.items() if name not in steps or f"/{newest}/" in name}
