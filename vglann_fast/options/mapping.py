"""Options of every kind of mapping. `training.py` has the options of the training, `presets.py` the presets."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vglann_fast.errors import VglannError
from vglann_fast.options.fields import check_choices, option, require

HELD_OUT = (
    "share of the latents that is set aside, whole shots, to measure how well the mapping does on latents it has not "
    "seen; gmm and the flows also choose by them, so do a little better there; 0 to below 1"
)


# Of what is counted from 1. As in `training.py`: beyond any machine, and would fail as a lack of memory or of time.
MAXIMA = {
    "noise_dim": 65_536,
    "hidden": 65_536,
    "epochs": 10**9,
    "batch_size": 10**9,
    "pool_factor": 65_536,
    "starts": 65_536,
    "transforms": 1024,
    "bins": 1024,
}
MAX_COMPONENTS = 65_536


@dataclass(frozen=True)
class MapOptions:
    """What every kind of mapping has. Kinds that choose nothing by latents set aside have none by default."""

    held_out: float = option(0.0, HELD_OUT)

    def __post_init__(self) -> None:
        check_choices(self)
        require(0 <= self.held_out < 1, "held_out", "0 to below 1", self.held_out)
        for name in (field.name for field in fields(self) if field.name in MAXIMA):
            value = getattr(self, name)
            require(1 <= value <= MAXIMA[name], name, f"1 to {MAXIMA[name]:,}", value)


def _require_steps(options: "ImleOptions | VaeOptions | AutoregressiveOptions") -> None:
    """What all that are trained by Adam ask of their options."""
    require(options.batch_size >= 2, "batch_size", "at least 2", options.batch_size)
    require(0 < options.lr < float("inf"), "lr", "a positive number", options.lr)
    require(0 <= options.weight_decay < float("inf"), "weight_decay", "0 or more", options.weight_decay)


@dataclass(frozen=True)
class ImleOptions(MapOptions):
    """IMLE: the network from noise to latents and how it is fitted. Defaults: preset `modern`."""

    noise_dim: int = option(16, "length of a noise vector")
    hidden: int = option(128, "hidden units of the mapping's networks")
    epochs: int = option(
        50, "passes over the latents; imle: each draws a pool of noise and matches it to them"
    )
    batch_size: int = option(128, "latents per step; imle: and noise vectors per block of the pool")
    pool_factor: int = option(10, "noise vectors drawn per latent in each epoch")
    reject_quantile: float = option(
        0.0,
        "RS-IMLE: reject noise nearer to a latent than this quantile of the matched distances, 0 to below 1; "
        "0 rejects nothing",
    )
    rematch: float = option(
        1.0,
        "match a latent anew once its distance has fallen to this share of what it was when matched, above 0 to "
        "1; 1 matches every latent in every epoch",
    )
    lr: float = option(1e-3, "learning rate at the start")
    schedule: Literal["cosine", "halving"] = option(
        "cosine", "learning rate: cosine to zero, or halved after every 50 epochs"
    )
    weight_decay: float = option(1e-5, "L2 regularization added to the gradient")
    normalize: bool = option(
        True, "put the mapped noise on the unit sphere, where the latents are, before matching"
    )
    adam_state: Literal["keep", "per-epoch"] = option(
        "keep", "keep Adam's moments, or start them anew each epoch"
    )
    batchnorm: Literal["eval", "train"] = option(
        "eval", "BatchNorm of the mapping network when sampling: running statistics, or of each batch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.reject_quantile < 1, "reject_quantile", "0 to below 1", self.reject_quantile)
        require(0 < self.rematch <= 1, "rematch", "above 0 to 1", self.rematch)
        _require_steps(self)


@dataclass(frozen=True)
class VaeOptions(MapOptions):
    """The variational autoencoder of the latents. Defaults: preset `modern`."""

    noise_dim: int = option(16, "length of a noise vector")
    hidden: int = option(512, "hidden units of the mapping's networks")
    epochs: int = option(200, "passes over the latents")
    batch_size: int = option(128, "latents per step")
    kl_weight: float = option(
        0.01, "weight of the divergence of the codes from the standard normal, beside the squared error"
    )
    lr: float = option(1e-3, "learning rate at the start")
    schedule: Literal["cosine", "halving"] = option(
        "cosine", "learning rate: cosine to zero, or halved after every 50 epochs"
    )
    weight_decay: float = option(0.0, "L2 regularization added to the gradient")
    adam_state: Literal["keep", "per-epoch"] = option(
        "keep", "keep Adam's moments, or start them anew each epoch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.kl_weight < float("inf"), "kl_weight", "0 or more", self.kl_weight)
        _require_steps(self)


@dataclass(frozen=True)
class GaussianOptions(MapOptions):
    """One normal distribution. Defaults: preset `modern`."""


@dataclass(frozen=True)
class GmmOptions(MapOptions):
    """A mixture of normal distributions with full covariances. Defaults: preset `modern`."""

    held_out: float = option(0.1, HELD_OUT)
    components: str = option(
        "1,4,16,64",
        "normal distributions in the mixture; of several numbers the one that gives the latents set aside the "
        "highest likelihood, those above the number of latents left out",
    )
    epochs: int = option(100, "rounds of EM at most")
    starts: int = option(2, "beginnings from other centers; the likeliest end is kept")
    tolerance: float = option(1e-3, "EM ends when the mean log-likelihood changes by less, nats a latent")
    floor: float = option(1e-6, "added to the diagonal of every covariance")
    prior: float = option(
        30.0,
        "latents' worth of the whole set's covariance that is mixed into that of every component, so that one of "
        "few latents still has a shape; 0: maximum likelihood",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tolerance", "floor", "prior"):
            require(0 <= getattr(self, name) < float("inf"), name, "0 or more", getattr(self, name))
        sizes = self.sizes
        require(
            len(sizes) == 1 or self.held_out > 0,
            "components",
            "one number with --held-out 0",
            self.components,
        )

    @property
    def sizes(self) -> list[int]:
        """The numbers of components to try."""
        words = [word.strip() for word in self.components.split(",")]
        good = all(word.isdecimal() and len(word) < 10 and 1 <= int(word) <= MAX_COMPONENTS for word in words)
        expected = f"a number from 1 to {MAX_COMPONENTS:,}, or several with commas"
        require(good, "components", expected, self.components)
        return [int(word) for word in words]


@dataclass(frozen=True)
class AutoregressiveOptions(MapOptions):
    """The masked autoregressive flow. Defaults: preset `modern`."""

    held_out: float = option(0.1, HELD_OUT)
    transforms: int = option(4, "invertible steps one after the other")
    hidden: int = option(128, "hidden units of the mapping's networks")
    epochs: int = option(100, "passes over the latents")
    batch_size: int = option(128, "latents per step")
    lr: float = option(1e-3, "learning rate at the start")
    weight_decay: float = option(1e-5, "L2 regularization added to the gradient")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self)


@dataclass(frozen=True)
class FlowOptions(AutoregressiveOptions):
    """The invertible flow of neural spline couplings. Defaults: preset `modern`."""

    bins: int = option(8, "pieces of each spline")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bins >= 2, "bins", "at least 2", self.bins)


MAP_OPTIONS: dict[str, type[MapOptions]] = {
    "imle": ImleOptions,
    "vae": VaeOptions,
    "gmm": GmmOptions,
    "gaussian": GaussianOptions,
    "flow": FlowOptions,
    "autoregressive": AutoregressiveOptions,
}
MAP_KINDS = tuple(MAP_OPTIONS)


def map_options(presets: Mapping[str, MapOptions], kind: str, given: Mapping[str, Any]) -> MapOptions:
    """The options of a mapping of `kind`: those of a preset, by kind, but for what is `given`.

    Raises `VglannError` for an unknown kind, an option that this kind does not have, or a bad value.
    """
    if kind not in presets:
        raise VglannError(f"--kind: expected one of {', '.join(presets)}, got {kind}")
    options = presets[kind]
    own = {field.name for field in fields(options)}
    for name in given:
        if name not in own:
            others = [other for other, its in presets.items() if hasattr(its, name)]
            raise VglannError(
                f"--{name.replace('_', '-')}: {kind} has no such option, but {', '.join(others)}"
            )
    return replace(options, **given)
