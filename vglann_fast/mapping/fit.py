"""Fit a mapping to a run's latents, and load what was fitted."""

from pathlib import Path
from typing import Any

import torch

from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.glo.measured import as_chosen, choices_of_mapping, choices_of_run
from vglann_fast.mapping.base import MAPPING_FILE, LatentSampler
from vglann_fast.mapping.drifting import Drifting
from vglann_fast.mapping.flow import AutoregressiveFlow, SplineFlow
from vglann_fast.mapping.flow_matching import FlowMatching
from vglann_fast.mapping.gaussian import Gaussian
from vglann_fast.mapping.generalization import measure_gap
from vglann_fast.mapping.gmm import GMM
from vglann_fast.mapping.imle import IMLE
from vglann_fast.mapping.split import run_shots, set_aside
from vglann_fast.mapping.vae import VAE
from vglann_fast.options.choices import THREADS, Choices
from vglann_fast.options.mapping import MapOptions
from vglann_fast.progress import Progress
from vglann_fast.run.destinations import atomic_dir
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.numerics import numerics

# Steps of a mapping multiply matrices of some hundred rows, which do not keep more threads busy than these. Only the
# nearest rows of many latents are work for all.
FEW_THREADS, FEW_LATENTS = 4, 4096

KINDS: dict[str, type[LatentSampler]] = {
    kind.kind: kind
    for kind in (IMLE, VAE, GMM, Gaussian, SplineFlow, AutoregressiveFlow, Drifting, FlowMatching)
}


@numerics(tf32=False)
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

    Whole shots with `options.holdout_fraction` of the latents are held out, and how near the mapping comes to these
    and to the others is measured. With several `ranks` each searches its share of imle's noise, all take the same
    steps, and the first one writes; no other kind shares its work. An earlier mapping of that kind, and its lines in
    metrics.jsonl, are replaced. Raises `VglannError` for an unknown kind, a folder that is not a run, or latents that
    are not finite.

    On a CPU a fit to fewer than 4,096 latents takes at most 4 threads, however many there may be. The search for
    nearest rows is the one that `vglann tune` found to be the fastest for these latents, which changes no digit. With
    deterministic algorithms, and in several processes, nothing measured counts.
    """
    run, ranks = RunDir.open(run_path), ranks or Ranks()
    if ranks.size > 1 and kind != IMLE.kind:
        raise VglannError(f"--kind {kind}: only imle runs in several processes; start this one alone")
    trained = load_trained(run, device)
    latents = trained.latents
    choices: Choices = {}
    if ranks.size == 1 and not torch.are_deterministic_algorithms_enabled():
        # Threads as the run took them, whatever was measured since: digits depend on their number.
        of_run = choices_of_run(run, trained.options, latents.device)
        choices = {name: value for name, value in of_run.items() if name == THREADS}
        choices |= choices_of_mapping(latents.device, *latents.shape)
    small = latents.device.type == "cpu" and len(latents) < FEW_LATENTS
    with (
        as_chosen(choices),
        numerics(threads=min(FEW_THREADS, torch.get_num_threads()) if small else None),
    ):
        return _fit(run, kind, options, trained, seed, ranks)


def _fit(run: RunDir, kind: str, options: MapOptions, trained: Trained, seed: int, ranks: Ranks) -> Path:
    latents = trained.latents
    device = latents.device
    mapping = _mapping_class(kind)(latents.shape[1], options, device, seed=seed)
    mapping.check_latents(latents)
    fitted, held_out = latents, None
    if options.holdout_fraction > 0:
        fitted, held_out = set_aside(latents, run_shots(run, trained.ids), options.holdout_fraction, seed)
    generator = torch.Generator(device).manual_seed(seed)
    destination = run.path / "mapping" / kind
    if ranks.rank > 0:
        mapping.fit(fitted, generator, held_out=held_out)
        return destination
    rows: list[dict[str, Any]] = []
    with Progress(kind, mapping.most_epochs, "epoch") as progress:

        def log(row: dict[str, Any]) -> None:
            rows.append({"stage": kind, "step": len(rows) + 1, **row})
            progress.advance()
            progress.show(**{name: value for name, value in row.items() if isinstance(value, float)})

        mapping.fit(fitted, generator, log, held_out)
    mapping.gap = measure_gap(mapping, fitted, held_out, torch.Generator(device).manual_seed(seed + 1))
    with atomic_dir(destination, MAPPING_FILE) as folder:
        mapping.save(folder)
    # Only now: an earlier mapping keeps its rows until it is replaced.
    run.logs.drop_metrics(kind, after_step=0)
    for row in rows:
        run.logs.add(row)
    return destination


def load_mapping(run: RunDir, kind: str, device: torch.device | str = "cpu") -> LatentSampler:
    """The mapping `kind` of a run. Raises `VglannError` when it was not fitted yet or cannot be read."""
    mapping = _mapping_class(kind)
    folder = run.path / "mapping" / kind
    if not (folder / MAPPING_FILE).exists():
        raise VglannError(
            f"{run.path} has no {kind} mapping; fit one with `vglann map {run.path} --kind {kind}`"
        )
    return mapping.load(folder, torch.device(device))


def _mapping_class(kind: str) -> type[LatentSampler]:
    if kind not in KINDS:
        raise VglannError(f"--kind: expected one of {', '.join(KINDS)}, got {kind}")
    return KINDS[kind]
