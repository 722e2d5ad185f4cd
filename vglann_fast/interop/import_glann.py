"""The checkpoint files of the paper author's code (GLANN-VIDEO) -> a run, as if it had been trained here.

The author's networks made pictures in BGR, since the loader never swapped what OpenCV reads; the run's generator has
the colors swapped in its last layers, so that what it makes is RGB like everything else. The files
hold no clips: the run samples, maps and interpolates, and latents are called by their row, "row-000000" and so on.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.interop.glann_video import load_generator
from vglann_fast.interop.torch_file import read_torch_file
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.presets import preset
from vglann_fast.options.training import Variant
from vglann_fast.run.files import sha256
from vglann_fast.run.folder import RunDir, whole_run
from vglann_fast.runtime.numerics import numerics

_FRAMES, _SIZE = 32, 64  # of the videos the author's networks make


@numerics(tf32=False)
def import_glann(
    generator_file: str | Path, latents_file: str | Path, out: str | Path, variant: Variant = "original"
) -> RunDir:
    """Make the run `out` from netG_*.pth, the generator's state dict, and netZ_*.pth, the state dict of the latents.

    Options are the options of preset `paper`. Raises `VglannError` when a file is not what it should be, or `out` is
    there already; then nothing is written.
    """
    generator = load_generator(read_state(generator_file), variant).float()
    latents = _latents(read_state(latents_file), Path(latents_file))
    if latents.shape[1] != generator.latent_dim:
        raise VglannError(
            f"{latents_file}: latents of length {latents.shape[1]}, the generator wants {generator.latent_dim}; "
            "are the two files of one training?"
        )
    swap_colors(generator)
    options = replace(
        preset("paper").train,
        variant=variant,
        width=generator.channels // 8,
        latent_dim=generator.latent_dim,
    )
    record = {
        "preset": "paper",
        "seed": 0,
        "clips": None,
        "frames": _FRAMES,
        "size": _SIZE,
        "train": options_to_json(options),
        "imported": {
            name: {"file": Path(file).name, "sha256": sha256(Path(file))}
            for name, file in (("generator", generator_file), ("latents", latents_file))
        },
    }
    state = {
        "epoch": 0,
        "position": 0,
        "processes": 1,
        "seconds": 0.0,
        "finished": True,
        "ids": [f"row-{row:06d}" for row in range(len(latents))],
    }
    with whole_run(out) as folder:
        run = RunDir.new(folder, record).begin()
        run.checkpoints.save(0, {"generator": generator.state_dict(), "latents": {"rows": latents}}, state)
    return RunDir.open(out)


def read_state(file: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a .pth file, on the CPU; no code in it is run. Raises `VglannError` for anything else."""
    state = read_torch_file(file)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VglannError(f"{file}: not a state dict, names with tensors; save net.state_dict()")
    return state


@torch.no_grad()
def swap_colors(generator: TwoStreamGenerator) -> None:
    """Make a generator of BGR videos one of RGB videos, in place; the mask stays."""
    for layer, order in ((generator.video.head, [2, 1, 0, 3]), (generator.background.head, [2, 1, 0])):
        assert layer.bias is not None
        layer.weight.copy_(layer.weight[:, order].clone())
        layer.bias.copy_(layer.bias[order].clone())


def _latents(state: Mapping[str, Tensor], file: Path) -> Tensor:
    """The one matrix [N, d] of an embedding's state, float32."""
    if len(state) != 1:
        raise VglannError(f"{file}: not the state of an embedding: {len(state)} tensors, not 1")
    (rows,) = state.values()
    if rows.ndim != 2 or not rows.is_floating_point() or len(rows) < 2:
        raise VglannError(f"{file}: not latents: {rows.dtype} {list(rows.shape)}, not a matrix of them")
    rows = rows.float()
    if not torch.isfinite(rows).all() or not (rows.square().sum(1) > 0).all():
        raise VglannError(f"{file}: some latents are zero, NaN or infinite")
    return rows
