"""The two sides of an evaluation, real and training clips, and the ways to compare videos with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vglann_fast.clips.dataset import ClipSet, read_index
from vglann_fast.errors import VglannError
from vglann_fast.metrics.features import Extractor, load_extractors

FVD_VIDEOS = 2048  # on each side; also the most that are taken unasked
PAPER_VIDEOS = 16  # what the paper's author's code compares


@dataclass(frozen=True)
class Protocol:
    """One way to compare videos: what it is called, its network, and how many videos it takes, if not all."""

    title: str
    extractor: Extractor
    videos: int | None = None


@dataclass(frozen=True)
class Sides:
    """Real clips, n of them, and all training clips, both by ascending id: rows of their sets.

    split: "test", or "train" where too few clips are held out; half of the training clips are real ones then.
    others: where in `training_rows` those clips begin that are not among the real ones.
    """

    real: ClipSet
    real_rows: np.ndarray
    training: ClipSet
    training_rows: np.ndarray
    split: str
    others: int

    @property
    def n(self) -> int:
        """Videos on each side."""
        return len(self.real_rows)

    @property
    def floor(self) -> slice:
        """The training rows that are held against the real clips, n of them if there are as many."""
        return slice(self.others, self.others + self.n)


def prepare(
    training: ClipSet,
    features: Sequence[str],
    n: int | None,
    device: torch.device | str,
    warnings: list[str],
) -> tuple[Sides, list[Protocol]]:
    """Choose the clips of an evaluation and load its networks; arguments as `evaluate` has them.

    Needs no run, so that what is wrong with them shows before one is trained. Appends to `warnings`, and raises as
    `evaluate`.
    """
    sides = _sides(training, n, warnings)
    names = list(dict.fromkeys(features))
    found = load_extractors(dict.fromkeys(map(_full, names)), device)
    return sides, [_protocol(name, found[_full(name)], sides) for name in names]


def _sides(training: ClipSet, n: int | None, warnings: list[str]) -> Sides:
    """Choose the real clips. Appends to `warnings`; raises `VglannError` for more or fewer than there can be."""
    order = np.argsort(training.ids)
    held_out = sum(clip["split"] == "test" for clip in read_index(training.folder)["clips"])
    if held_out >= 2:
        real, split, others = ClipSet.open(training.folder, "test", verify=False), "test", 0
        rows = np.argsort(real.ids)
    else:
        real, split, others = training, "train", len(training) // 2
        rows = order[:others]
        warnings.append(
            f"{held_out} clips are held out in {training.folder}: half of the training clips stand for real ones, "
            "so nothing is said about clips it has not seen; pack with a larger --test-fraction"
        )
    most = min(len(rows), len(training) - others)  # as many training clips are the floor
    if n is not None and n > most:
        raise VglannError(
            f"-n: {n} videos on each side asked for, but there are {len(rows)} {split} clips and "
            f"{len(training) - others} others: {most} at most"
        )
    chosen = rows[: min(most, FVD_VIDEOS) if n is None else n]
    if len(chosen) < 2:
        raise VglannError(f"-n: a comparison needs at least 2 videos on each side, here are {len(chosen)}")
    return Sides(real, chosen, training, order, split, others)


def _full(name: str) -> str:
    """The features behind a name of --features."""
    return "i3d" if name == "i3d-16" else name


def _protocol(name: str, found: Extractor, sides: Sides) -> Protocol:
    """The protocol `name`. Raises `VglannError` for fewer videos or frames than it needs."""
    if sides.training.frames < found.min_frames:
        raise VglannError(
            f"--features {name}: takes clips of at least {found.min_frames} frames, the run's have "
            f"{sides.training.frames}"
        )
    if name == "i3d" and sides.n < FVD_VIDEOS:
        raise VglannError(
            f"--features i3d: FVD takes at least {FVD_VIDEOS} videos on each side, here are {sides.n}; hold out "
            "more clips, or compare by transnetv2, lite0 or, as the paper did, i3d-16"
        )
    if name == "i3d-16":
        return Protocol(f"frechet[i3d, {PAPER_VIDEOS} videos]", found, PAPER_VIDEOS)
    return Protocol("FVD" if name == "i3d" else f"frechet[{name}]", found)
