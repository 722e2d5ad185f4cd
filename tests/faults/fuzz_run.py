"""The good run and the good weights whose files are broken, and reading all of a run that makes videos."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.train import train
from vglann_fast.interop.weight_shapes import expected_shapes
from vglann_fast.interop.weights import import_weights
from vglann_fast.mapping.fit import fit_mapping, load_mapping
from vglann_fast.options.mapping import map_options
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.sample import draw_latents, render, sample

KINDS = {
    "imle": {"hidden": 4, "epochs": 1, "noise_dim": 2},
    "gmm": {"components": "2"},
    "gaussian": {},
    "vae": {"hidden": 4, "epochs": 1},
    "flow": {"hidden": 4, "epochs": 1, "transforms": 1, "bins": 2},
    "autoregressive": {"hidden": 4, "epochs": 1, "transforms": 1},
    "drifting": {"hidden": 4, "epochs": 1, "noise_dim": 2},
    "flow-matching": {"hidden": 4, "epochs": 1, "steps": 1},
}


def run_with_mappings(root: Path) -> Path:
    """A run of two epochs on eight clips, its mappings and samples, and beside it JSON of all that a report shows."""
    torch.set_num_threads(1)
    clips = write_clip_folder(root / "clips", moving_squares(8))
    # Batch statistics, for running ones would be computed again for each video.
    options = tiny_options(width=2, latent_dim=4, levels=1, epochs=2, batchnorm="train")
    run = new_run(root / "run", clips, options)
    train(ClipSet.open(clips, "train"), run, checkpoint_every=1, log_every=1)
    for kind, values in KINDS.items():
        fit_mapping(
            run.path, kind, map_options(PRESETS["demo"].map, kind, {"holdout_fraction": 0.0, **values})
        )
        run.logs.remember("map", {"kind": kind, "seed": 0, "preset": "demo", **values})
    sample(run.path, n=2)
    run.logs.remember("sample", {"n": 2, "seed": 0, "kind": "imle"})
    spreads = {
        name: {"mean": 0.5, "sd": 0.1} for name in ("mmd", "precision", "recall", "density", "coverage")
    }
    splits = {"n": 6, "splits": 20, **spreads}
    figures = {
        "n": 8,
        "dimensions": 3,
        "mmd": 0.25,
        "mmd_error": 0.1,
        "splits": splits,
        "frechet": 2.5,
        "precision": 0.5,
        "recall": 1.0,
        "density": 1.0,
        "coverage": 0.5,
        "warnings": [],
        "quarters": {"n": 2, "mean": 3.0, "sd": 0.1},
    }
    features = {
        "frechet[lite0]": {
            "generated": figures,
            "floor": figures,
            "truth": splits,
            "nearest_training_clip": {"generated": {"median": 1.0}},
        }
    }
    motion = {
        name: {"energy": {"mean": 1.0, "p05": 0.5, "p95": 2.0}, "last_frame_jump": 1.0, "steps": [1.0, 2.0]}
        for name in ("generated", "real")
    }
    head = {"format": "vglann-evaluation", "version": 1, "step": 4}
    quality = {"clips": 8, "psnr": 20.0, "psnr_last_frame": 19.0, "ssim": 0.5, "l1": 9.0, "laplacian": 0.1}
    records = {
        "reconstruction": {**head, "name": "reconstruction", "train": quality, "held_out": quality},
        "imle": {**head, "name": "imle", "features": features, "motion": motion},
    }
    _write(run.path / "evaluation", records)
    rows = [
        {"regime": "20", "row": name, "seed": 0, "psnr": 20.0, "ssim": 0.5} for name in ("modern", "paper")
    ]
    table = {
        "format": "vglann-table",
        "version": 1,
        "preset": "demo",
        "seed": 0,
        "losses": ["run"],
        "mappings": ["imle"],
        "train": {"width": 2},
        "clips": "clips",
        "runs": {"run": {"records": records}},
    }
    _write(run.path, {"ablation": {"runs": rows}, "table": table})
    return run.path


def _write(folder: Path, values: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def rendered(folder: Path) -> None:
    """Read a run and make two videos from its own latents."""
    trained = load_trained(RunDir.open(folder))
    render(trained, trained.latents[:2])


def sampled(folder: Path, kind: str) -> None:
    """Read a run and make two videos from a mapping of it."""
    run = RunDir.open(folder)
    trained = load_trained(run)
    render(trained, draw_latents(trained, load_mapping(run, kind), 2, 0))


def weights_of_lite0(folder: Path) -> Path:
    """A folder with the weights of lite0, all zero."""
    folder.mkdir()
    file = folder.with_suffix(".safetensors")
    save_file({name: torch.zeros(shape) for name, shape in expected_shapes("lite0").items()}, file)
    with weights_at(folder):
        import_weights("lite0", file)
    return folder


@contextmanager
def weights_at(folder: Path) -> Iterator[None]:
    """The folder of weights is this one."""
    before = os.environ.get("VGLANN_WEIGHTS")
    os.environ["VGLANN_WEIGHTS"] = str(folder)
    try:
        yield
    finally:
        del os.environ["VGLANN_WEIGHTS"]
        if before is not None:
            os.environ["VGLANN_WEIGHTS"] = before
