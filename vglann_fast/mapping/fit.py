"""Fit a mapping to a run's latents, and load what was fitted."""

from pathlib import Path
from typing import Any

import torch

from vglann_fast.atomic import atomic_dir
from vglann_fast.config import MapOptions
from vglann_fast.errors import VglannError
from vglann_fast.glo.distributed import Ranks
from vglann_fast.glo.train import load_trained
from vglann_fast.mapping.base import Mapping
from vglann_fast.mapping.imle import IMLE
from vglann_fast.progress import Progress
from vglann_fast.run_dir import RunDir

KINDS = {"imle": IMLE}


def fit_mapping(
    run_path: str | Path,
    kind: str,
    options: MapOptions,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> Path:
    """Fit the mapping `kind` to the latents of a run and store it under mapping/<kind>/; returns that folder.

    With several `ranks` each searches its share of the noise, all take the same steps, and the first one writes.
    An earlier mapping of that kind, and its lines in metrics.jsonl, are replaced. Raises `VglannError` for an
    unknown kind, a folder that is no run, or latents that are not finite.
    """
    run = RunDir.open(run_path)
    latents = load_trained(run, device).latents
    mapping = _mapping_class(kind)(latents.shape[1], options, device, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    destination = run.path / "mapping" / kind
    if ranks is not None and ranks.rank > 0:
        mapping.fit(latents, generator)
        return destination
    run.drop_metrics(kind, after_step=0)
    with Progress(kind, options.epochs, "epoch") as progress:

        def log(row: dict[str, Any]) -> None:
            run.log({"stage": kind, "step": row["epoch"] + 1, **row})
            progress.advance()
            progress.show(loss=row["loss"], match_distance=row["match_distance"], hubness=row["hubness"])

        mapping.fit(latents, generator, log)
    with atomic_dir(destination) as folder:
        mapping.save(folder)
    return destination


def load_mapping(run: RunDir, kind: str, device: torch.device | str = "cpu") -> Mapping:
    """The mapping `kind` of a run. Raises `VglannError` when it was not fitted yet or cannot be read."""
    folder = run.path / "mapping" / kind
    if not folder.is_dir():
        raise VglannError(
            f"{run.path} has no {kind} mapping; fit one with `vglann map {run.path} --kind {kind}`"
        )
    return _mapping_class(kind).load(folder, torch.device(device))


def _mapping_class(kind: str) -> type[IMLE]:
    if kind not in KINDS:
        raise VglannError(f"--kind: expected one of {', '.join(KINDS)}, got {kind}")
    return KINDS[kind]
