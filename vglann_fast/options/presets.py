"""The presets `paper`, `modern`, `modern-2026a` and `demo`: named sets of options for every stage that trains.

`paper` reproduces the GLANN-VIDEO code, the published program of the paper's author, including its quirks.
`modern-2026a` is the same model with those quirks fixed, and the defaults of all options. `modern` trains that model
by another recipe: Muon, the background first, and L2 beside the pyramid. `demo` is `modern`, small enough for two CPU
cores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vglann_fast.errors import VglannError
from vglann_fast.options.mapping import (
    MAP_OPTIONS,
    AutoregressiveOptions,
    DriftingOptions,
    FlowMatchingOptions,
    FlowOptions,
    GaussianOptions,
    GmmOptions,
    ImleOptions,
    MapOptions,
    VaeOptions,
)
from vglann_fast.options.training import PresetName, TrainOptions


@dataclass(frozen=True)
class Preset:
    """One named set of options for every stage that trains."""

    train: TrainOptions
    map: Mapping[str, MapOptions]  # by kind


_MODERN_2026A = Preset(train=TrainOptions(), map={kind: options() for kind, options in MAP_OPTIONS.items()})
# docs/ablation.md has the measurements behind these values.
_MODERN = Preset(
    train=TrainOptions(optimizer="muon", background_share=0.15, lr_latents=0.01, loss="laplacian:1,l2:32"),
    map=_MODERN_2026A.map,
)

# The GLANN-VIDEO code has neither flows nor drifting. They are as in `modern`; like every mapping of `paper` they fit
# all latents.
_PAPER_MAP: dict[str, MapOptions] = {
    "imle": ImleOptions(
        pool_factor=2, schedule="halve-every-50", normalize=False, adam_state="per-epoch", batchnorm="train"
    ),
    "vae": VaeOptions(schedule="halve-every-50", adam_state="per-epoch"),
    "gmm": GmmOptions(components="100", starts=10, prior=0.0, holdout_fraction=0.0),
    "gaussian": GaussianOptions(),
    "flow": FlowOptions(),
    "autoregressive": AutoregressiveOptions(),
    "drifting": DriftingOptions(),
    "flow-matching": FlowMatchingOptions(),
}
_PAPER = Preset(
    train=TrainOptions(
        latent_norm="detached",
        reuse_norms=True,
        blur="paper",
        perceptual="paper",
        target_range="unit",
        frame_reduction="sum-but-last",
        schedule="halve-every-tenth",
        adam_state="per-epoch",
        latent_mode="dense",
        latent_init="normal",
        lr_latents=0.01,
        lr_generator=0.001,
        batchnorm="train",
    ),
    map={kind: replace(options, holdout_fraction=0.0) for kind, options in _PAPER_MAP.items()},
)

# The demo has too few latents to hold any out.
_DEMO_MAP: dict[str, MapOptions] = {
    **_MODERN_2026A.map,
    "imle": ImleOptions(epochs=400, batch_size=32, pool_factor=100, lr=3e-3),
    "gmm": GmmOptions(components="1", holdout_fraction=0.0),
}
_DEMO = Preset(
    train=replace(_MODERN.train, width=32, batch_size=5, epochs=100),
    map={kind: replace(options, holdout_fraction=0.0) for kind, options in _DEMO_MAP.items()},
)

PRESETS: dict[PresetName, Preset] = {
    "paper": _PAPER,
    "modern": _MODERN,
    "modern-2026a": _MODERN_2026A,
    "demo": _DEMO,
}


def preset(name: str) -> Preset:
    """Return the preset called `name`. Raises `VglannError` that lists the known ones."""
    if name not in PRESETS:
        raise VglannError(f"--preset: expected one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name]
