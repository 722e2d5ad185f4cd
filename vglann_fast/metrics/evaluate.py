"""`vglann evaluate`: what a run makes, against clips it has not seen, in numbers.

The real side are held-out clips, of shots the training saw nothing of. Beside every comparison of made with real
stands its floor: as many training clips against the same held-out clips. Figures without a known best value stand
beside the truth row: halves of the real clips against each other, see `truth.py`. The made side are samples of each
mapping and, so that generator and mapping can be told apart, videos made from the run's own training latents: a
mapping that hits their distribution does as well as they.

Nothing here depends on the batches of measuring or on the order of clips: of real and training clips the
lowest ids are taken, which are hashes, and what is drawn comes from the seed. A video that is made with
batchnorm="train", as preset `paper` does, depends on those it is made with, and so on n. The records are specified in
`record.py`. Features of clips, real and training ones, are computed once for all runs, see `kept_features.py`.

Several processes share what is done for each video: rendering, inversion, features, distances in pixels. Each then
has all of it and computes the same figures; process 0 writes them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.of_run import open_clips
from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.mapping.fit import load_mapping
from vglann_fast.mapping.split import shot_numbers
from vglann_fast.metrics.compare import Measurement, compare, measure
from vglann_fast.metrics.features import Extractor
from vglann_fast.metrics.kept_features import features_of_clips
from vglann_fast.metrics.prdc import nearest_distances
from vglann_fast.metrics.reconstruction import inversion_quality, reconstruction_quality, training_pca
from vglann_fast.metrics.record import RECONSTRUCTION, TRAINING_LATENTS, record_of
from vglann_fast.metrics.sides import Protocol, Sides, prepare
from vglann_fast.metrics.temporal import motion_statistics, quantiles
from vglann_fast.metrics.truth import Truth
from vglann_fast.run.files import write_json
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.numerics import numerics
from vglann_fast.samples.sample import draw_latents, render

# For a process to wait for another: shares are of nearly one size, but hosts may not be equally fast.
PATIENCE = timedelta(hours=1)
_BLOCK = 64  # videos held at a time


@dataclass(frozen=True)
class EvaluationTargets:
    """Both sides, measured, and what sources are compared with.

    shots: int64 [n], of the real clips; None where they are not known.
    floor_shots: the same of the real clips and of the training clips that are held against them, for comparisons of
        the two. Both None also where clips of one shot may be on both sides: these pairs would be left out within
        the sides and not between them.
    floors, truths, truth_figures: by the title of each protocol. The last two are the halves of the real clips and
        the figures of one half against the other, None where the halves are too small.
    """

    sides: Sides
    protocols: list[Protocol]
    training: Measurement
    real: Measurement
    shots: Tensor | None
    floor_shots: tuple[Tensor | None, Tensor | None]
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

    def add(self, name: str, content: dict[str, Any], ranks: Ranks) -> None:
        """Take up a record; process 0 writes it."""
        self.records[name] = record_of(name, content)
        if ranks.rank == 0:
            write_json(self.folder / f"{name}.json", self.records[name])


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
    ranks: Ranks | None = None,
) -> Evaluation:
    """Measure reconstruction and generation of a run, and write evaluation/<name>.json into it.

    Args:
        kinds: mappings to sample from; none: all that were fitted.
        features: names that `metrics.features` has, or "i3d-16"; none: no distances of features.
        n: videos on each side; by default all that are held out, at most 2,048.
        invert: how many held-out clips to invert.
        ranks: the processes that share the work; all of them get the result.

    Raises `VglannError` for a mapping or weights that are missing, and too few clips or frames for a protocol.
    """
    run, ranks = RunDir.open(run_path), ranks or Ranks()
    fitted = sorted(file.parent.name for file in run.path.glob("mapping/[!.]*/mapping.json"))
    # Process 0 alone waits until nobody writes to the run.
    kinds = ranks.from_first(list(dict.fromkeys(kinds)) or fitted)
    if not kinds:
        raise VglannError(f"{run.path} has no mapping to sample from; fit one with `vglann map {run.path}`")
    for kind in kinds:
        load_mapping(run, kind)  # a mistake is to show before the work
    result = Evaluation(run.path / "evaluation")
    sides, protocols = prepare(open_clips(run), features, n, device, result.warnings)

    quality = _reconstruction(run, sides, invert, device, ranks)
    result.add(RECONSTRUCTION, quality, ranks)
    known = _known(sides, protocols, device, result.warnings, ranks)
    for source in (TRAINING_LATENTS, *kinds):
        # Once more for each source: drawing changes the generator's BatchNorm statistics.
        trained = load_trained(run, device)
        batches = ranks.share(_batches(trained, _latents(run, trained, source, sides, seed)))
        videos, own = (render(trained, batch).video for batch in batches), sum(map(len, batches))
        made = measure(source, videos, own, known.networks, sides.training, device, ranks)
        record = {"step": trained.step, "seed": seed, **_compared(source, made, known)}
        result.add(source, record | {"warnings": result.warnings}, ranks)
    return result


def _reconstruction(
    run: RunDir, sides: Sides, invert: int, device: torch.device | str, ranks: Ranks
) -> dict[str, Any]:
    """Quality of training clips and, found by inversion, of up to `invert` held-out clips."""
    trained = load_trained(run, device)
    pca = training_pca(trained, sides.training)
    found: dict[str, Any] = {
        "step": trained.step,
        "train": reconstruction_quality(trained, sides.training, pca, ranks),
    }
    if invert and sides.split == "test":
        clips = sides.real.read(sides.real_rows[:invert])
        found["held_out"] = inversion_quality(trained, clips, sides.training, pca, ranks)
    return found


def _read(clips: ClipSet, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The clips of each block of rows, uint8 (b, 3, T, H, W)."""
    for rows in blocks:
        yield clips.read(rows)


def _latents(run: RunDir, trained: Trained, source: str, sides: Sides, seed: int) -> Tensor:
    """The latents [n, d] of one source; the generator is then ready for them."""
    if source == TRAINING_LATENTS:
        rows = torch.from_numpy(sides.training_rows[sides.floor])
        return trained.latents[rows.to(trained.latents.device)]
    return draw_latents(trained, load_mapping(run, source, trained.latents.device), sides.n, seed)


def _batches(trained: Trained, latents: Tensor) -> list[Tensor]:
    """The latents [b, d] that are decoded together, in batches of nearly one size."""
    size = trained.options.batch_size
    blocks = torch.tensor_split(latents, -(-len(latents) // _BLOCK))
    return [batch for block in blocks for batch in torch.tensor_split(block, -(-len(block) // size))]


def _known(
    sides: Sides,
    protocols: list[Protocol],
    device: torch.device | str,
    warnings: list[str],
    ranks: Ranks,
) -> EvaluationTargets:
    """Measure the clips of both sides. Appends to `warnings`."""
    networks = {p.title: p.extractor for p in protocols}
    training = _measured("training clips", sides.training, sides.training_rows, networks, ranks)
    real = _measured("real clips", sides.real, sides.real_rows, networks, ranks, sides.training, device)
    shots, others = _shots(sides, warnings) if protocols else (None, None)
    floor_shots = (shots, others) if sides.split == "test" else (None, None)
    floors = {
        p.title: _distance("the floor", p, real, training.features[p.title][sides.floor], floor_shots)
        for p in protocols
    }
    truths = {p.title: _truth(p, real.features[p.title], shots) for p in protocols}
    figures = {title: truth.figures() if truth else None for title, truth in truths.items()}
    if not all(truths.values()):
        warnings.append(
            f"{sides.n} real clips cannot be split by shots into halves of more than 5, so the truth row is missing; "
            "hold out more clips, or of more shots, with a larger --test-fraction"
        )
    return EvaluationTargets(sides, protocols, training, real, shots, floor_shots, floors, truths, figures)


def _shots(sides: Sides, warnings: list[str]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The shots of the real and of the floor's clips, int64 [n] each; None, with a warning, where unknown."""
    try:
        return (
            shot_numbers(sides.real.clips[row] for row in sides.real_rows),
            shot_numbers(sides.training.clips[row] for row in sides.training_rows[sides.floor]),
        )
    except VglannError as error:
        warnings.append(
            "the truth row splits single clips, not shots, so it may be too good, and kernel distances "
            f"take clips as independent, so their errors may be too small ({error})"
        )
        return None, None


def _truth(protocol: Protocol, real: Tensor, shots: Tensor | None) -> Truth | None:
    truth = Truth(real[: protocol.videos], _first_of(shots, protocol))
    return truth if truth.enough else None


def _first_of(rows: Any, protocol: Protocol) -> Any:
    """The rows of as many videos as the protocol takes; None stays."""
    return None if rows is None else rows[: protocol.videos]


def _measured(
    name: str,
    clips: ClipSet,
    rows: np.ndarray,
    networks: dict[str, Extractor],
    ranks: Ranks,
    training: ClipSet | None = None,
    device: torch.device | str = "cpu",
) -> Measurement:
    """`measure` of clips, whose features may be known."""
    # As many for each process.
    count = ranks.size * -(-len(rows) // (_BLOCK * ranks.size))
    blocks = ranks.share(np.array_split(rows, min(len(rows), count)))
    own = sum(map(len, blocks))
    found = measure(name, _read(clips, blocks), own, {}, training, device, ranks)
    shape = (3, clips.frames, clips.size, clips.size)
    features = features_of_clips(name, _read(clips, blocks), shape, found.digests, networks, ranks, own)
    return replace(found, features=features)


def _compared(source: str, made: Measurement, known: EvaluationTargets) -> dict[str, Any]:
    """The part of a source's record that says how its videos compare."""
    sides, real, training = known.sides, known.real, known.training
    # Training latents belong to the clips of the floor, in their order.
    shots = known.floor_shots if source == TRAINING_LATENTS else (known.shots, None)
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
                    **_distance(source, p, real, made.features[p.title], shots),
                    "splits": truth
                    and truth.figures_of(made.features[p.title][: p.videos], _first_of(shots[1], p)),
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
    source: str,
    protocol: Protocol,
    real: Measurement,
    made: Tensor,
    shots: tuple[Tensor | None, Tensor | None],
) -> dict[str, Any]:
    """`compare`, whose errors are to name the source and the protocol; shots: of either side."""
    sides = (real.features[protocol.title], made, *shots)
    try:
        return compare(*(_first_of(side, protocol) for side in sides))
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
