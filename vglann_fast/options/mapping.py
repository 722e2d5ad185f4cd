"""Options of every kind of mapping. `training.py` has the options of the training, `presets.py` the presets."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from vglann_fast.errors import VglannError
from vglann_fast.options.fields import check_choices, flag_of, option, require
from vglann_fast.options.training import PAPER

HOLDOUT = "of the latents, in whole shots, to measure overfitting; gmm and the flows also choose by them"

# Upper bounds of counts. As in `training.py`: larger values would only fail later, out of memory or time.
MAXIMA = {
    "noise_dim": 65_536,
    "hidden": 65_536,
    "epochs": 10**9,
    "batch_size": 10**9,
    "pool_factor": 65_536,
    "starts": 65_536,
    "transforms": 1024,
    "bins": 1024,
    "steps": 1024,
}
MAX_COMPONENTS = 65_536
MAX_TEMPERATURE, MAX_TEMPERATURES = 1e6, 16

# Fields that several kinds have.
NOISE_DIM = "length of a noise vector"
HIDDEN = "of the mapping's networks"
LR = "learning rate at the start"
WEIGHT_DECAY = "L2 regularization"
SCHEDULE = "learning rate: cosine to zero, or halved after every 50 passes"
ADAM_STATE = "Adam's moments: keep them, or reset them in each pass"
Schedule = Literal["cosine", "halve-every-50"]


@dataclass(frozen=True)
class MapOptions:
    """The options of every kind of mapping. Kinds that choose nothing by held-out latents have none by default."""

    holdout_fraction: float = option(0.0, HOLDOUT, metavar="FRACTION")

    def __post_init__(self) -> None:
        check_choices(self)
        require(0 <= self.holdout_fraction < 1, "holdout_fraction", "0 to below 1", self.holdout_fraction)
        for name in (field.name for field in fields(self) if field.name in MAXIMA):
            value = getattr(self, name)
            require(1 <= value <= MAXIMA[name], name, f"1 to {MAXIMA[name]:,}", value)


def _require_steps(
    options: "ImleOptions | VaeOptions | AutoregressiveOptions | DriftingOptions | FlowMatchingOptions",
) -> None:
    """Check the options shared by all mappings trained with Adam."""
    require(options.batch_size >= 2, "batch_size", "at least 2", options.batch_size)
    require(0 < options.lr < float("inf"), "lr", "a positive number", options.lr)
    require(0 <= options.weight_decay < float("inf"), "weight_decay", "0 or more", options.weight_decay)


@dataclass(frozen=True)
class ImleOptions(MapOptions):
    """IMLE: the network from noise to latents and how it is fitted. Defaults: preset `modern`."""

    noise_dim: int = option(16, NOISE_DIM, metavar="NUMBERS")
    hidden: int = option(128, HIDDEN, metavar="UNITS")
    epochs: int = option(50, "over the latents; gmm: most rounds of EM", metavar="PASSES")
    batch_size: int = option(128, "per step; imle: also noise per block", metavar="LATENTS")
    pool_factor: int = option(10, "noise vectors per latent and pass", metavar="N")
    reject_quantile: float = option(
        0.0,
        "RS-IMLE: reject noise nearer to a latent than this quantile of the matched distances; 0 rejects none",
        metavar="Q",
    )
    rematch: float = option(
        1.0,
        "match again below this part of the distance",
        metavar="FRACTION",
    )
    lr: float = option(1e-3, LR, metavar="RATE")
    weight_decay: float = option(1e-5, WEIGHT_DECAY, metavar="WEIGHT")
    normalize: bool = option(True, "put mapped noise on the unit sphere before matching", group=PAPER)
    schedule: Schedule = option("cosine", SCHEDULE, group=PAPER)
    adam_state: Literal["keep", "per-epoch"] = option("keep", ADAM_STATE, group=PAPER)
    batchnorm: Literal["eval", "train"] = option(
        "eval", "BatchNorm when sampling: running statistics, or each batch's", group=PAPER
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.reject_quantile < 1, "reject_quantile", "0 to below 1", self.reject_quantile)
        require(0 < self.rematch <= 1, "rematch", "above 0 to 1", self.rematch)
        _require_steps(self)


@dataclass(frozen=True)
class VaeOptions(MapOptions):
    """The variational autoencoder of the latents. Defaults: preset `modern`."""

    noise_dim: int = option(16, NOISE_DIM, metavar="NUMBERS")
    hidden: int = option(512, HIDDEN, metavar="UNITS")
    epochs: int = option(200, "passes over the latents", metavar="PASSES")
    batch_size: int = option(128, "latents per step", metavar="LATENTS")
    kl_weight: float = option(0.01, "of the KL divergence beside the squared error", metavar="WEIGHT")
    lr: float = option(1e-3, LR, metavar="RATE")
    weight_decay: float = option(0.0, WEIGHT_DECAY, metavar="WEIGHT")
    schedule: Schedule = option("cosine", SCHEDULE, group=PAPER)
    adam_state: Literal["keep", "per-epoch"] = option("keep", ADAM_STATE, group=PAPER)

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

    holdout_fraction: float = option(0.1, HOLDOUT, metavar="FRACTION")
    components: str = option(
        "1,4,16,64",
        "normal distributions in the mixture; of several numbers the held-out latents choose one",
        metavar="N,N,...",
    )
    epochs: int = option(100, "most rounds of EM", metavar="ROUNDS")
    starts: int = option(2, "from other centers; the likeliest end is kept", metavar="N")
    tolerance: float = option(1e-3, "EM ends when the mean log-likelihood changes by less", metavar="NATS")
    floor: float = option(1e-6, "added to the diagonal of every covariance", metavar="VARIANCE")
    prior: float = option(
        30.0,
        "weight of the whole set's covariance in each component's, in latents; 0: maximum likelihood",
        metavar="LATENTS",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tolerance", "floor", "prior"):
            require(0 <= getattr(self, name) < float("inf"), name, "0 or more", getattr(self, name))
        sizes = self.sizes
        require(
            len(sizes) == 1 or self.holdout_fraction > 0,
            "components",
            "one number with --holdout-fraction 0",
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

    holdout_fraction: float = option(0.1, HOLDOUT, metavar="FRACTION")
    transforms: int = option(4, "invertible steps, one after the other", metavar="STEPS")
    hidden: int = option(128, HIDDEN, metavar="UNITS")
    epochs: int = option(100, "passes over the latents", metavar="PASSES")
    batch_size: int = option(128, "latents per step", metavar="LATENTS")
    lr: float = option(1e-3, LR, metavar="RATE")
    weight_decay: float = option(1e-5, WEIGHT_DECAY, metavar="WEIGHT")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self)


@dataclass(frozen=True)
class FlowOptions(AutoregressiveOptions):
    """The invertible flow of neural spline couplings. Defaults: preset `modern`."""

    bins: int = option(8, "pieces of each spline", metavar="PIECES")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bins >= 2, "bins", "at least 2", self.bins)


@dataclass(frozen=True)
class DriftingOptions(MapOptions):
    """Drifting: one network from noise to latents, one evaluation a sample. Defaults: preset `modern`."""

    noise_dim: int = option(32, NOISE_DIM, metavar="NUMBERS")
    hidden: int = option(512, HIDDEN, metavar="UNITS")
    epochs: int = option(400, "passes over the latents", metavar="PASSES")
    batch_size: int = option(256, "latents, and as many samples, per step", metavar="LATENTS")
    temperatures: str = option(
        "0.25,0.5,1",
        "reach of a latent, in median distances to the nearest one; several add up",
        metavar="T,T,...",
    )
    lr: float = option(1e-3, LR, metavar="RATE")
    weight_decay: float = option(1e-5, WEIGHT_DECAY, metavar="WEIGHT")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self)
        expected = f"a number above 0, at most {MAX_TEMPERATURE:g}, or up to {MAX_TEMPERATURES} with commas"
        require(bool(self.multiples), "temperatures", expected, self.temperatures)

    @property
    def multiples(self) -> list[float]:
        """The temperatures, in median distances to the nearest latent; empty if the option does not hold any."""
        try:
            found = [float(word) for word in self.temperatures.split(",")]
        except ValueError:
            return []
        good = len(found) <= MAX_TEMPERATURES and all(0 < value <= MAX_TEMPERATURE for value in found)
        return found if good else []


@dataclass(frozen=True)
class FlowMatchingOptions(MapOptions):
    """Flow matching: a network that moves noise to latents in steps. Defaults: preset `modern`."""

    hidden: int = option(512, HIDDEN, metavar="UNITS")
    epochs: int = option(400, "passes over the latents", metavar="PASSES")
    batch_size: int = option(128, "latents per step", metavar="LATENTS")
    solver: Literal["euler", "heun"] = option("heun", "how samples follow the flow")
    steps: int = option(16, "from noise to a sample", metavar="STEPS")
    lr: float = option(1e-3, LR, metavar="RATE")
    weight_decay: float = option(1e-5, WEIGHT_DECAY, metavar="WEIGHT")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_steps(self)


MAP_OPTIONS: dict[str, type[MapOptions]] = {
    "imle": ImleOptions,
    "vae": VaeOptions,
    "gmm": GmmOptions,
    "gaussian": GaussianOptions,
    "flow": FlowOptions,
    "autoregressive": AutoregressiveOptions,
    "drifting": DriftingOptions,
    "flow-matching": FlowMatchingOptions,
}
MAP_KINDS = tuple(MAP_OPTIONS)


def map_options(presets: Mapping[str, MapOptions], kind: str, given: Mapping[str, Any]) -> MapOptions:
    """Return the options of a mapping of `kind`: the preset's, from `presets` by kind, changed by `given`.

    Raises `VglannError` for an unknown kind, an option that this kind does not have, or a bad value.
    """
    if kind not in presets:
        raise VglannError(f"--kind: expected one of {', '.join(presets)}, got {kind}")
    options = presets[kind]
    own = {field.name for field in fields(options)}
    for name in given:
        if name not in own:
            others = ", ".join(other for other, its in presets.items() if hasattr(its, name))
            raise VglannError(f"{flag_of(name)} is not an option of {kind}; it applies to {others}")
    return replace(options, **given)
