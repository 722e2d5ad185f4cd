"""Table 1 of the paper in one command: a run for each loss, every mapping fitted to each, every cell measured.

A table is a folder:

    <loss>/                  a run like any other, for every verb that takes one
    samples/<loss>/<kind>/   some videos of each cell, see `samples/write.py`; samples/real/: some real clips
    table.json               what was made, rewritten after each part of it, so that a table that was cut short
                             continues where it was
    table.md, table.html     the results, and the same as a page

table.json: {"format": "vglann-table", "version": 1, "clips": folder, "preset", "seed", "train": {options but the
loss}, "losses": [name], "mappings": [kind], "runs": {loss: {"step", "checkpoint": {file: sha256}, "mappings": {kind:
sha256 of mapping.safetensors}, "measured": {"features": [name], "n": asked for or null, "index": sha256 of the clips'
index.json} or null, "records": {name: a record of `metrics/record.py`}}}}

A training is gone on with where it was cut, and kept when it is done. A mapping and its figures are kept where
table.json names the very files they are of; otherwise they are made once more.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from vglann_fast.clips.dataset import INDEX_FILE, ClipSet
from vglann_fast.clips.of_run import check_same_clips
from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import load_trained, new_generator
from vglann_fast.glo.compatibility import batch_size_for, check_compatibility
from vglann_fast.glo.precision import resolve_precision
from vglann_fast.glo.train import train
from vglann_fast.mapping.base import MAPPING_FILE
from vglann_fast.mapping.fit import KINDS, fit_mapping, load_mapping
from vglann_fast.mapping.split import set_aside, shot_numbers
from vglann_fast.metrics.evaluate import Sides, evaluate, prepare
from vglann_fast.metrics.record import RECONSTRUCTION, TRAINING_LATENTS
from vglann_fast.nets.weights import load_weights
from vglann_fast.options.aliases import read_record
from vglann_fast.options.fields import options_from_json, options_to_json
from vglann_fast.options.mapping import map_options
from vglann_fast.options.presets import preset
from vglann_fast.options.training import LOSSES, PERCEPTUAL, TrainOptions
from vglann_fast.report.page import write_report
from vglann_fast.report.table_page import write_table_page
from vglann_fast.run.destinations import content_of
from vglann_fast.run.files import read_json, sha256, write_json
from vglann_fast.run.folder import RunDir, check_links
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.samples.sample import draw_latents, render
from vglann_fast.samples.write import write_videos

FORMAT = ("vglann-table", 1)
SHOWN = 8  # videos of each cell on the page
NEW, CONTINUE, KEEP = "new", "continue", "keep"  # what is to be done with a part

log = logging.getLogger("vglann_fast")


@dataclass(frozen=True)
class Grid:
    """Definition of a table.

    train: options of all trainings; its loss is replaced by each of `losses`. Mappings have their preset's options.
    features: names that `evaluate` takes; n: videos on each side, by default as it chooses.
    """

    clips: Path
    out: Path
    preset: str
    seed: int
    train: TrainOptions
    losses: Sequence[str]
    kinds: Sequence[str]
    features: Sequence[str]
    n: int | None

    def run_options(self, loss: str, clips: ClipSet) -> dict[str, Any]:
        """Return the content that the options.json of the run of `loss` must have."""
        return {
            "preset": self.preset,
            "seed": self.seed,
            "clips": str(self.clips.absolute()),
            "train": options_to_json(replace(self.train, loss=loss)),
            "frames": clips.frames,
            "size": clips.size,
        }

    def map_options(self, kind: str) -> Any:
        """Options of a mapping. Raises `VglannError` for an unknown kind."""
        return map_options(preset(self.preset).map, kind, {})

    @property
    def measured(self) -> dict[str, Any]:
        """The settings of the measurement of cells, as table.json has them."""
        return {
            "features": list(self.features),
            "n": self.n,
            "index": sha256(self.clips / INDEX_FILE),
        }


@dataclass(frozen=True)
class Part:
    """One run of a table and what is to be done for it: `NEW`, `CONTINUE` or `KEEP`.

    row: its part of table.json, without what does not hold any more.
    """

    training: str
    mappings: dict[str, str]
    measuring: str
    row: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        """The plan alone, JSON-able."""
        return {"training": self.training, "mappings": self.mappings, "measuring": self.measuring}


def plan_table(grid: Grid, *, device: torch.device | str = "cpu") -> dict[str, Part]:
    """Return what `make_table` would do for each loss. Writes nothing.

    Raises `VglannError` for everything that can be known to go wrong: unknown names, missing weights, clips or
    options that do not fit, and runs and mappings that are there with other options.
    """
    return _checked(grid, device)[0]


def make_table(grid: Grid, *, device: torch.device | str = "cpu") -> Path:
    """Train, fit and measure whatever is not there yet, write the results, and return table.md.

    Raises as `plan_table` before anything is made, and as `train`, `fit_mapping` and `evaluate`.
    """
    plan, clips, sides = _checked(grid, device)
    table = _head(grid) | {"runs": _rows_there(grid) | {loss: part.row for loss, part in plan.items()}}

    def save() -> None:
        write_json(grid.out / "table.json", table)

    for loss, part in plan.items():
        if part.training != KEEP:
            log.info("%s: training", grid.out / loss)
            _train(grid, loss, clips, device, resume=part.training == CONTINUE)
        run = RunDir.open(grid.out / loss)
        with run.locked():
            if part.training != KEEP:
                part.row.update(_new_row(run.checkpoints.load()[0]))
            _fit(grid, run, part, device, save)
            if part.measuring != KEEP:
                _measure(grid, loss, part.row, device)
            save()
    write_videos(grid.out / "samples" / "real", sides.real.read(sides.real_rows[:SHOWN]))
    results = write_table_page(grid.out)
    for loss in grid.losses:
        write_report(grid.out / loss)
    return results


def _head(grid: Grid) -> dict[str, Any]:
    options = options_to_json(grid.train)
    del options["loss"]
    return {
        "format": FORMAT[0],
        "version": FORMAT[1],
        "clips": str(grid.clips.absolute()),
        "preset": grid.preset,
        "seed": grid.seed,
        "train": options,
        "losses": list(grid.losses),
        "mappings": list(grid.kinds),
    }


def _checked(grid: Grid, device: torch.device | str) -> tuple[dict[str, Part], ClipSet, Sides]:
    """The plan, the training clips, and the clips of the evaluation."""
    _names("--losses", grid.losses, LOSSES)
    _names("--mappings", grid.kinds, tuple(KINDS))
    clips = ClipSet.open(grid.clips, "train")
    check_links(grid.out / "samples")
    there = _rows_there(grid)
    parts = {}
    for loss in grid.losses:
        _check_training(replace(grid.train, loss=loss), clips, torch.device(device))
        parts[loss] = _part(grid, loss, clips, there.get(loss, {}))
    latents = torch.zeros(len(clips), grid.train.latent_dim)
    for kind in grid.kinds:
        options = grid.map_options(kind)
        fitted, _ = set_aside(latents, shot_numbers(clips.clips), options.holdout_fraction, grid.seed)
        KINDS[kind](grid.train.latent_dim, options).check_latents(fitted)
    sides, _ = prepare(clips, grid.features, grid.n, device, [])
    return parts, clips, sides


def _names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `VglannError` unless there are names, all known and each once."""
    odd = [name for name in names if name not in known]
    if odd or not names:
        raise VglannError(f"{option}: expected some of {', '.join(known)}, got {', '.join(odd) or 'none'}")
    if len(set(names)) < len(names):
        raise VglannError(f"{option}: one of {', '.join(names)} is there twice")


def _check_training(options: TrainOptions, clips: ClipSet, device: torch.device) -> None:
    """Raise `VglannError` for what `train` would refuse, as far as that is quickly found."""
    batch_size_for(len(clips), options, Ranks())
    check_compatibility(options, Ranks(), resolve_precision(options.precision, device), device)
    new_generator(options, clips.frames, clips.size)
    for network in options.loss_terms.keys() & set(PERCEPTUAL):
        load_weights(network)


def _rows_there(grid: Grid) -> dict[str, dict[str, Any]]:
    """The runs of the table that is there already; none if there is none."""
    file = grid.out / "table.json"
    if not file.is_file():
        for name in {"table.md", "table.html", "samples"} & {*content_of(grid.out)}:
            raise VglannError(f"{grid.out / name}: is there already, without a table; choose another --out")
        return {}
    table = read_record(read_json(file))
    if not isinstance(table, dict) or (table.get("format"), table.get("version")) != FORMAT:
        raise VglannError(f"{file}: not a table of this version of vglann-fast; choose another --out")
    rows = table.get("runs")
    return {loss: row for loss, row in rows.items() if _is_row(row)} if isinstance(rows, dict) else {}


def _is_row(row: Any) -> bool:
    kinds = {"checkpoint": dict, "mappings": dict, "records": dict, "measured": dict | None}
    return isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def _new_row(state: dict[str, Any]) -> dict[str, Any]:
    """A run of which nothing but its checkpoint is there. `state`: of that."""
    return {
        "step": state["step"],
        "checkpoint": state["sha256"],
        "mappings": {},
        "measured": None,
        "records": {},
    }


def _part(grid: Grid, loss: str, clips: ClipSet, row: dict[str, Any]) -> Part:
    """Plan what to do for a run, `row` being its part of table.json. Raises `VglannError` for other options."""
    path = grid.out / loss
    if not (path / "options.json").is_file():
        RunDir.new(path, {})  # raises when something else is there
        return Part(NEW, dict.fromkeys(grid.kinds, NEW), NEW, {})
    run = RunDir.open(path)
    _check_options(path, _fixed(run.options), _fixed(grid.run_options(loss, clips)))
    for kind in grid.kinds:
        if (path / "mapping" / kind / MAPPING_FILE).is_file():
            there, wanted = load_mapping(run, kind).options, grid.map_options(kind)
            _check_options(path / "mapping" / kind, options_to_json(there), options_to_json(wanted))
    state = run.checkpoints.load()[0] if run.checkpoints.exist() else {}
    if not state.get("finished"):
        return Part(CONTINUE, dict.fromkeys(grid.kinds, NEW), NEW, {})
    check_same_clips(state["ids"], clips.ids)
    if row.get("checkpoint") != state["sha256"]:
        row = _new_row(state)
    kept = {kind: _is_kept(path, kind, row["mappings"].get(kind)) for kind in grid.kinds}
    sources = {RECONSTRUCTION, TRAINING_LATENTS, *grid.kinds}
    whole = all(kept.values()) and sources <= row["records"].keys() and row["measured"] == grid.measured
    mappings = {kind: KEEP if same else NEW for kind, same in kept.items()}
    return Part(KEEP, mappings, KEEP if whole else NEW, row)


def _fixed(options: dict[str, Any]) -> dict[str, Any]:
    """Of a run's options those that decide what is learned, in one dictionary."""
    train_options = options_to_json(options_from_json(TrainOptions, options["train"]))
    named = {f.name: train_options[f.name] for f in fields(TrainOptions) if not f.metadata["machine"]}
    return {name: options[name] for name in ("preset", "seed", "clips", "frames", "size")} | named


def _check_options(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `VglannError` that names the options which differ."""
    differ = [f"{name} {there[name]}, not {wanted[name]}" for name in wanted if there[name] != wanted[name]]
    if differ:
        raise VglannError(
            f"{path} was made with other options: {'; '.join(differ)}. Give those, or choose another --out"
        )


def _mapping_digest(run: Path, kind: str) -> str:
    return sha256(run / "mapping" / kind / "mapping.safetensors")


def _is_kept(run: Path, kind: str, digest: str | None) -> bool:
    """Return True if the mapping is there, and is the very one that table.json has."""
    return (run / "mapping" / kind / MAPPING_FILE).is_file() and _mapping_digest(run, kind) == digest


def _train(grid: Grid, loss: str, clips: ClipSet, device: torch.device | str, *, resume: bool) -> None:
    path = grid.out / loss
    run = RunDir.open(path) if resume else RunDir.new(path, grid.run_options(loss, clips))
    train(clips, run, seed=grid.seed, device=device, resume=resume)
    for warning in run.warnings:
        log.warning("%s", warning)


def _fit(grid: Grid, run: RunDir, part: Part, device: torch.device | str, save: Callable[[], None]) -> None:
    """Fit the mappings that are not to be kept. Figures of those before do not hold any more."""
    for kind, what in part.mappings.items():
        if what == KEEP:
            continue
        fit_mapping(run.path, kind, grid.map_options(kind), seed=grid.seed, device=device)
        run.logs.remember("map", {"kind": kind, "preset": grid.preset, "seed": grid.seed})  # for `replay`
        part.row["mappings"][kind] = _mapping_digest(run.path, kind)
        part.row["records"].pop(kind, None)
        save()


def _measure(grid: Grid, loss: str, row: dict[str, Any], device: torch.device | str) -> None:
    """Evaluate a run, draw the videos that are shown, and only then say in `row` that it is measured.

    Nothing is inverted: held-out clips are for comparing samples with.
    """
    path = grid.out / loss
    log.info("%s: measuring", path)
    found = evaluate(
        path,
        kinds=grid.kinds,
        features=grid.features,
        n=grid.n,
        invert=0,
        seed=grid.seed,
        device=device,
    )
    run = RunDir.open(path)
    for kind in grid.kinds:
        # Loaded again, because drawing changes the generator's BatchNorm statistics.
        trained = load_trained(run, device)
        latents = draw_latents(trained, load_mapping(run, kind, device), SHOWN, grid.seed)
        record = {"seed": grid.seed, "mapping": kind, "n": SHOWN, "step": trained.step}
        videos = render(trained, latents).video
        write_videos(grid.out / "samples" / loss / kind, videos, records={"samples": record})
    row["records"], row["measured"] = found.records, grid.measured
