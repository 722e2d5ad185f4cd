"""`vglann evaluate`: what a run makes, against clips it has not seen, in numbers.

The real side are held-out clips, of shots the training saw nothing of. Beside every comparison of made with real
stands its floor: as many training clips against the same held-out clips. Figures without a known best value stand
beside the truth row: halves of the real clips against each other, see `truth.py`. The made side are samples of each
mapping and, so that generator and mapping can be told apart, videos made from the run's own training latents: a
mapping that hits their distribution does as well as they.

Nothing here depends on the batches of measuring or on the order of clips: of real and training clips those of the
lowest ids are taken, which are hashes, and what is drawn comes from the seed. A video that is made with
batchnorm="train", as preset `paper` does, depends on those it is made with, and so on n. The records are specified in
`record.py`. Features of clips, real and training ones, are computed once for all runs, see `kept_features.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet, read_index
from vglann_fast.clips.of_run import open_clips
from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.mapping.fit import load_mapping
from vglann_fast.mapping.split import shot_numbers
from vglann_fast.metrics.compare import Measurement, compare, measure
from vglann_fast.metrics.features import Extractor, load_extractors
from vglann_fast.metrics.kept_features import features_of_clips
from vglann_fast.metrics.prdc import nearest_distances
from vglann_fast.metrics.reconstruction import inversion_quality, reconstruction_quality, training_pca
from vglann_fast.metrics.record import RECONSTRUCTION, TRAINING_LATENTS, write_record
from vglann_fast.metrics.temporal import motion_statistics, quantiles
from vglann_fast.metrics.truth import Truth
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.numerics import numerics
from vglann_fast.samples.sample import draw_latents, render

FVD_VIDEOS = 2048  # on each side; also the most that are taken unasked
PAPER_VIDEOS = 16  # what the paper's author's code compares
_BLOCK = 64  # videos held at a time


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
        """Which of the training rows are held against the real clips, n of them if there are as many."""
        return slice(self.others, self.others + self.n)


@dataclass(frozen=True)
class EvaluationTargets:
    """Both sides, measured, and what sources are compared with.

    shots: int64 [n], of the real clips; None where they are not known.
    floors, truths, truth_figures: by the title of each protocol. The last two are the halves of the real clips and
        the figures of one half against the other, None where the halves are too small.
    """

    sides: Sides
    protocols: list[Protocol]
    training: Measurement
    real: Measurement
    shots: Tensor | None
    floors: dict[str, dict[str, Any]]
    truths: dict[str, Truth | None]
    truth_figures: dict[str, dict[str, Any] | None]

    @property
    def networks(self) -> dict[str, Extractor]:
        """The extractors by title."""
        return {p.title: p.extractor for p in self.protocols}


@dataclass
class Evaluation:
    """The folder written to, its records by name in the order of the tables, and what makes them doubtful."""

    folder: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@numerics(tf32=False)
def evaluate(
    run_path: str | Path,
    *,
    kinds: Sequence[str] = (),
    features: Sequence[str] = (),
    n: int | None = None,
    invert: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Measure reconstruction and generation of a run, and write evaluation/<name>.json into it.

    Args:
        kinds: mappings to sample from; none: all that were fitted.
        features: names that `metrics.features` has, or "i3d-16"; none: no distances of features.
        n: videos on each side; by default all that are held out, at most 2,048.
        invert: how many held-out clips to invert.

    Raises `VglannError` for a mapping or weights that are missing, and too few clips or frames for a protocol.
    """
    run = RunDir.open(run_path)
    fitted = sorted(file.parent.name for file in run.path.glob("mapping/[!.]*/mapping.json"))
    kinds = list(dict.fromkeys(kinds)) or fitted
    if not kinds:
        raise VglannError(f"{run.path} has no mapping to sample from; fit one with `vglann map {run.path}`")
    for kind in kinds:
        load_mapping(run, kind)  # a mistake is to show before the work
    result = Evaluation(run.path / "evaluation")
    sides, protocols = prepare(open_clips(run), features, n, device, result.warnings)

    quality = _reconstruction(run, sides, invert, device)
    result.records[RECONSTRUCTION] = write_record(result.folder, RECONSTRUCTION, quality)
    known = _known(sides, protocols, device, result.warnings)
    for source in (TRAINING_LATENTS, *kinds):
        trained = load_trained(run, device)  # anew: drawing changes the generator's BatchNorm statistics
        videos = _rendered(trained, _latents(run, trained, source, sides, seed))
        made = measure(source, videos, sides.n, known.networks, sides.training, device)
        record = {"step": trained.step, "seed": seed, **_compared(source, made, known)}
        result.records[source] = write_record(result.folder, source, record | {"warnings": result.warnings})
    return result


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
    """Which clips are real. Appends to `warnings`; raises `VglannError` for more or fewer than there can be."""
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


def _reconstruction(run: RunDir, sides: Sides, invert: int, device: torch.device | str) -> dict[str, Any]:
    """Quality of training clips and, found by inversion, of up to `invert` held-out clips."""
    trained = load_trained(run, device)
    pca = training_pca(trained, sides.training)
    found: dict[str, Any] = {
        "step": trained.step,
        "train": reconstruction_quality(trained, sides.training, pca),
    }
    if invert and sides.split == "test":
        clips = sides.real.read(sides.real_rows[:invert])
        found["held_out"] = inversion_quality(trained, clips, sides.training, pca)
    return found


def _read(clips: ClipSet, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The clips of `rows`, uint8 (b, 3, T, H, W) at a time."""
    for start in range(0, len(rows), _BLOCK):
        yield clips.read(rows[start : start + _BLOCK])


def _latents(run: RunDir, trained: Trained, source: str, sides: Sides, seed: int) -> Tensor:
    """The latents [n, d] of one source; the generator is then ready for them."""
    if source == TRAINING_LATENTS:
        rows = torch.from_numpy(sides.training_rows[sides.floor])
        return trained.latents[rows.to(trained.latents.device)]
    return draw_latents(trained, load_mapping(run, source, trained.latents.device), sides.n, seed)


def _rendered(trained: Trained, latents: Tensor) -> Iterator[np.ndarray]:
    """What the latents decode to, uint8 (b, 3, T, H, W) at a time; no block is left with a single video."""
    for block in torch.tensor_split(latents, -(-len(latents) // _BLOCK)):
        yield render(trained, block).video


def _known(
    sides: Sides, protocols: list[Protocol], device: torch.device | str, warnings: list[str]
) -> EvaluationTargets:
    """Measure the clips of both sides. Appends to `warnings`."""
    networks = {p.title: p.extractor for p in protocols}
    training = _measured("training clips", sides.training, sides.training_rows, networks)
    real = _measured("real clips", sides.real, sides.real_rows, networks, sides.training, device)
    shots = _shots(sides, warnings) if protocols else None
    floors = {
        p.title: _distance("the floor", p, real, training.features[p.title][sides.floor], shots)
        for p in protocols
    }
    truths = {p.title: _truth(p, real.features[p.title], shots) for p in protocols}
    figures = {title: truth.figures() if truth else None for title, truth in truths.items()}
    if not all(truths.values()):
        warnings.append(
            f"{sides.n} real clips cannot be split by shots into halves of more than 5, so the truth row is missing; "
            "hold out more clips, or of more shots, with a larger --test-fraction"
        )
    return EvaluationTargets(sides, protocols, training, real, shots, floors, truths, figures)


def _shots(sides: Sides, warnings: list[str]) -> Tensor | None:
    """The shots of the real clips, int64 [n]; None, with a warning, where they are not known."""
    try:
        return shot_numbers(sides.real.clips[row] for row in sides.real_rows)
    except VglannError as error:
        warnings.append(
            "the truth row splits single clips, not shots, so it may be too good, and kernel distances "
            f"take clips as independent, so their errors may be too small ({error})"
        )
        return None


def _truth(protocol: Protocol, real: Tensor, shots: Tensor | None) -> Truth | None:
    shots = None if shots is None else shots[: protocol.videos]
    truth = Truth(real[: protocol.videos], shots)
    return truth if truth.enough else None


def _measured(
    name: str,
    clips: ClipSet,
    rows: np.ndarray,
    networks: dict[str, Extractor],
    training: ClipSet | None = None,
    device: torch.device | str = "cpu",
) -> Measurement:
    """`measure` of clips, whose features may be known."""
    found = measure(name, _read(clips, rows), len(rows), {}, training, device)
    shape = (3, clips.frames, clips.size, clips.size)
    features = features_of_clips(name, _read(clips, rows), shape, found.digests, networks)
    return replace(found, features=features)


def _compared(source: str, made: Measurement, known: EvaluationTargets) -> dict[str, Any]:
    """The part of a source's record that says how its videos compare."""
    sides, real, training = known.sides, known.real, known.training
    return {
        "frames": sides.training.frames,
        "size": sides.training.size,
        "real": {"split": sides.split, "clips": sides.n, "of": len(sides.real), "sha256": real.sha256},
        "training": {"clips": len(sides.training), "sha256": training.sha256},
        "generated": {"clips": len(made.steps), "sha256": made.sha256},
        "features": {
            p.title: {
                "protocol": p.extractor.protocol,
                "generated": {
                    **_distance(source, p, real, made.features[p.title], known.shots),
                    "splits": truth and truth.figures_of(made.features[p.title][: p.videos]),
                },
                "floor": known.floors[p.title],
                "truth": known.truth_figures[p.title],
                "nearest_training_clip": _nearest(p.title, made, known),
            }
            for p in known.protocols
            for truth in (known.truths[p.title],)
        },
        "motion": {"generated": motion_statistics(made.steps), "real": motion_statistics(real.steps)},
        "nearest_training_clip": _nearest(None, made, known),
    }


def _distance(
    source: str, protocol: Protocol, real: Measurement, made: Tensor, shots: Tensor | None
) -> dict[str, Any]:
    """`compare`, whose errors are to name the source and the protocol."""
    try:
        shots = None if shots is None else shots[: protocol.videos]
        return compare(real.features[protocol.title][: protocol.videos], made[: protocol.videos], shots)
    except VglannError as error:
        raise VglannError(f"{protocol.title} of {source}: {error}") from error


def _nearest(title: str | None, made: Measurement, known: EvaluationTargets) -> dict[str, Any]:
    """Quantiles of distances to the nearest training clip, of made and of held-out videos.

    In features, or (title None) root mean square in 1/255. Real clips that are training clips have no such figure.
    """
    sets = {"generated": made} | ({"real": known.real} if known.sides.split == "test" else {})
    if title is None:
        return {name: quantiles(one.distances) for name, one in sets.items()}
    training = known.training.features[title]
    return {name: quantiles(nearest_distances(one.features[title], training)) for name, one in sets.items()}
