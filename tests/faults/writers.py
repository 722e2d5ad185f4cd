"""Every command that writes, at tiny size: where it writes, and what it leaves when nothing disturbs it."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from faults.forked import run_here
from faults.route import SHAPE, TRAIN, Route, Words, left_in
from feature_weights import import_lite0
from golden_data import author_generator_state, normal

from vglann_fast.study.database import Answer, Study

# Random ids, clocks and measured times.
CHANGES_EACH_TIME = {
    "study.sqlite",
    "page.html",
    "results.json",
    "results.html",
    "profile.json",
    "trace.json",
    "table.json",
    "index.html",
}
PACK = ["--frames", "8", "--size", "32", "--workers", "1"]


@dataclass(frozen=True)
class Writer:
    """A command that writes into the folder `out` of its place.

    Args:
        name: what it is called in the table.
        before: a folder with what must be there already; it is copied.
        words: place -> arguments.
        new: `out` is not in `before`.
        whole_folder: it writes `out` as one folder that must be empty, or its own.
        again: place -> arguments after it was cut short. Default: `words`.
    """

    name: str
    before: Path
    words: Callable[[Path], Words]
    new: bool = False
    whole_folder: bool = False
    again: Callable[[Path], Words] | None = None

    def place(self, folder: Path) -> Path:
        """Make a fresh folder with what the command needs; an older one is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, folder, symlinks=True)
        return self.point_to(folder)

    def point_to(self, folder: Path, name: str = "out") -> Path:
        """Let the environment name this place, for results that are not named on the command line."""
        os.environ["VGLANN_WEIGHTS"] = str(folder / name if self.name == "weights import" else WEIGHTS)
        os.environ["XDG_CACHE_HOME"] = str(folder / name / "cache")
        return folder

    def continued(self, folder: Path) -> Words:
        """The arguments that complete what was cut short."""
        return (self.again or self.words)(folder)


WEIGHTS = Path("/nonexistent")  # set by `writers`


def writers(route: Route) -> list[Writer]:
    """All commands that write but clips fetch, which needs a network, and study serve, which needs a browser."""
    global WEIGHTS
    WEIGHTS = route.root / "imported"
    import_lite0(WEIGHTS)
    run, empty = _befores(route), route.empty
    videos, clips = route.videos(), route.clips
    checkpoints = _author_checkpoints(route.root)
    shape: Words = [*SHAPE, *TRAIN[:2], "--device", "cpu"]
    tabled: Words = ["--losses", "l1", "--mappings", "gaussian", "--features", "none", "--preset", "demo"]

    def of_run(name: str, *words: str | Path, before: Path = run["mapped"]) -> Writer:
        return Writer(name, before, lambda place: [*name.split(), place / "out", *words])

    def to_new(name: str, *words: str | Path, whole_folder: bool = False, again: bool = False) -> Writer:
        resumed = (lambda place: _resumed(words, place)) if again else None
        return Writer(
            name,
            empty,
            lambda place: [*name.split(), *words, "--out", place / "out"],
            True,
            whole_folder,
            resumed,
        )

    return [
        to_new("clips pack", videos, *PACK, whole_folder=True),
        Writer("clips pack --overwrite", run["packed"], lambda place: [
            "clips", "pack", videos, *PACK, "--overwrite", "--out", place / "out"
        ], whole_folder=True),
        to_new("clips merge", clips, whole_folder=True),
        Writer("clips show", empty, lambda place: ["clips", "show", clips, "--out", place / "out" / "a.png"], True),
        to_new("train", clips, *SHAPE, *TRAIN, again=True),
        Writer("train --resume", run["stopped"], lambda place: ["train", "--resume", place / "out", *TRAIN[2:]]),
        of_run("map", "--epochs", "3", "--held-out", "0", "--device", "cpu"),
        of_run("sample", "-n", "3", "--seed", "1"),
        of_run("reconstruct"),
        of_run("interpolate", "--steps", "3"),
        of_run("invert", clips, "--steps", "2", "--starts", "1"),
        of_run("evaluate", "--features", "lite0", "--held-out", "0", "-n", "4", "--kind", "imle"),
        of_run("report"),
        of_run("profile", "--steps", "1"),
        to_new("table", clips, *tabled, *shape),
        to_new("study make", run["mapped"] / "out", "--real", clips, "--pairs", "2", whole_folder=True),
        of_run("study report", before=run["studied"]),
        to_new("replay", run["stopped"] / "out", "--device", "cpu"),
        to_new("import-glann", *checkpoints),
        Writer("weights import", empty, lambda place: ["weights", "import", "lite0", route.weights()], True),
    ]  # fmt: skip


def _befores(route: Route) -> dict[str, Path]:
    """Folders that commands start from, by name; in each `out` is a run, a clip folder or a study."""
    found = {name: route.root / f"before-{name}" for name in ("mapped", "stopped", "packed", "studied")}
    for name, source in (("mapped", route.mapped), ("stopped", route.trained)):
        shutil.copytree(source / "run", found[name] / "out")
    newest = sorted((found["stopped"] / "out" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    run_here(["clips", "pack", route.videos(), *PACK, "--out", found["packed"] / "out", "--stride", "2"])
    (found["packed"] / "out" / "thesis.txt").write_text("a thesis")
    study = ["study", "make", found["mapped"] / "out", "--real", route.clips, "--pairs", "2"]
    run_here([*study, "--out", found["studied"] / "out"])
    with closing(Study.open(found["studied"] / "out")) as answered:
        trial = answered.trials[0]
        answered.add("0" * 16, [Answer(trial.id, trial.left, "left")])
    return found


def _author_checkpoints(root: Path) -> Words:
    """netG and netZ as the GLANN-VIDEO code saves them."""
    state = {key: value.float() for key, value in author_generator_state("orig").items()}
    torch.save(state, root / "netG.pth")
    torch.save({"emb.weight": 0.1 * normal("import.Z", (4, 100))}, root / "netZ.pth")
    return [root / "netG.pth", root / "netZ.pth"]


def _resumed(words: tuple[str | Path, ...], place: Path) -> Words:
    if (place / "out" / "options.json").exists():
        return ["train", "--resume", place / "out", *TRAIN[2:]]
    return ["train", *words, "--out", place / "out"]


def left(folder: Path) -> dict[str, str]:
    """`left_in` of a place, with only the names of files that differ from one undisturbed run to the next.

    A link in place of `out` is followed.
    """
    found, out = left_in(folder), folder / "out"
    if out.is_symlink() and os.path.isdir(out):
        found |= {f"out/{name}": digest for name, digest in left_in(Path(os.path.realpath(out))).items()}
    return {name: "" if _changes(name) else digest for name, digest in found.items()}


def _changes(name: str) -> bool:
    # The library writes metadata, which kept features have, in any order.
    return Path(name).name in CHANGES_EACH_TIME or "/cache/" in name
