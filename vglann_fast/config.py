"""Options of every stage: frozen dataclasses that check themselves, and the presets `paper`, `modern`, `demo`.

`paper` is what the paper's author's code does, quirks included, so that his results can be reproduced.
`modern` mends the quirks. `demo` is `modern`, small enough for two CPU cores.

Each field carries its help text; the command line is made from these classes.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from vglann_fast.errors import VglannError

Variant = Literal["original", "expanded"]
LatentNorm = Literal["projected", "detached"]
PresetName = Literal["paper", "modern", "demo"]
OnMismatch = Literal["error", "keep", "init"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


def _option(default: Any, text: str, *, machine: bool = False) -> Any:
    """A field with its help text; `machine` marks what a resumed run may choose anew."""
    return field(default=default, metadata={"help": text, "machine": machine})


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise VglannError(f"--{name.replace('_', '-')}: expected {expected}, got {got}")


def _check_choices(options: Any) -> None:
    """Every field annotated with a Literal holds one of its values."""
    for name, hint in get_type_hints(type(options)).items():
        choices = get_args(hint)
        if choices and all(isinstance(choice, str) for choice in choices):
            value = getattr(options, name)
            _require(value in choices, name, f"one of {', '.join(choices)}", value)


@dataclass(frozen=True)
class TrainOptions:
    """GLO: the generator, the latents and how they are trained together. Defaults: preset `modern`."""

    variant: Variant = _option("original", "generator network")
    width: int = _option(64, "channels of the generator's last hidden layer")
    latent_dim: int = _option(100, "length of a latent")
    latent_norm: LatentNorm = _option(
        "projected",
        "gradient through z/|z|: projected on the sphere, or the norm detached as in the author's code",
    )
    reuse_norms: bool = _option(
        False, "expanded variant: use two of its BatchNorms twice, as the author's code does"
    )

    loss: Literal["laplacian", "l1"] = _option("laplacian", "reconstruction loss")
    blur: Literal["binomial", "gaussian", "seed"] = _option("binomial", "blur of the Laplacian pyramid")
    levels: int = _option(3, "bands of the Laplacian pyramid, 1 to 5; the low-pass residual comes on top")
    mask_weight: float = _option(0.0, "weight of the sparsity prior, the mean of the mask; videogan has 0.1")
    target_range: Literal["symmetric", "unit"] = _option(
        "symmetric", "range the clips are mapped to: [-1, 1] like the generator's tanh, or [0, 1]"
    )
    frame_reduction: Literal["mean", "sum-but-last"] = _option(
        "mean", "mean over all frames, or the author's sum that leaves out the last frame"
    )

    epochs: int = _option(200, "passes over the clips")
    batch_size: int = _option(
        15, "clips per batch and process; clips left over in an epoch wait for the next one"
    )
    lr_latents: float = _option(0.01, "learning rate of the latents at the start")
    lr_generator: float = _option(0.001, "learning rate of the generator at the start")
    schedule: Literal["cosine", "halving"] = _option(
        "cosine", "learning rates: cosine to zero, or halved after every tenth of the epochs"
    )
    adam_state: Literal["keep", "per-epoch"] = _option(
        "keep", "keep Adam's moments, or start them anew each epoch"
    )
    latent_mode: Literal["row", "dense", "catchup"] = _option(
        "row",
        "Adam over the latents: only rows of the batch, with step counts of their own; the whole table at "
        "every step; or that trajectory computed only for the rows that are read",
    )
    latent_init: Literal["sphere", "normal", "pca"] = _option(
        "sphere",
        "first latents: random unit rows, N(0, 0.01^2), or unit rows along the clips' principal components",
    )
    batchnorm: Literal["eval", "train"] = _option(
        "eval", "BatchNorm when reconstructing and sampling: statistics re-estimated, or of each batch"
    )
    accumulate: int = _option(
        1, "batches per update, one after the other; each is a BatchNorm batch of its own"
    )
    sync_bn: bool = _option(
        False, "several processes: take BatchNorm statistics over all of them, not over each alone"
    )

    precision: Precision = _option(
        "auto",
        "of the generator's arithmetic; weights, losses, latents and statistics stay float32. auto: bf16 on a "
        "GPU of compute capability 8.0 or more, else fp32",
        machine=True,
    )
    data: Literal["auto", "resident", "pinned", "mmap"] = _option(
        "auto",
        "where the clips wait: all on the device, copied to it one batch ahead through pinned memory, or read "
        "from the mapped files when needed. auto: resident if they fit, else pinned; on a CPU mmap",
        machine=True,
    )
    cuda_graph: Literal["auto", "on", "off"] = _option(
        "auto", "replay the whole step as one CUDA graph; auto: where that was tested", machine=True
    )
    compile: bool = _option(False, "run the generator through torch.compile", machine=True)
    checkpoint_activations: bool = _option(
        False, "save memory: compute BatchNorm and ReLU of a layer again in the backward pass", machine=True
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("width", "latent_dim", "epochs", "accumulate"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.batch_size >= 2, "batch_size", "at least 2 (BatchNorm needs it)", self.batch_size)
        _require(1 <= self.levels <= 5, "levels", "1 to 5", self.levels)
        _require(self.mask_weight >= 0, "mask_weight", "0 or more", self.mask_weight)
        for name in ("lr_latents", "lr_generator"):
            _require(0 < getattr(self, name) < float("inf"), name, "a positive number", getattr(self, name))

    @property
    def target_limits(self) -> tuple[float, float]:
        """The values that 0 and 255 of a clip are mapped to."""
        return (-1.0, 1.0) if self.target_range == "symmetric" else (0.0, 1.0)


@dataclass(frozen=True)
class MapOptions:
    """IMLE: the network from noise to latents and how it is fitted. Defaults: preset `modern`."""

    noise_dim: int = _option(16, "length of a noise vector")
    hidden: int = _option(128, "hidden units of the mapping network")
    epochs: int = _option(50, "rounds of drawing a pool of noise, matching it to the latents and regressing")
    batch_size: int = _option(128, "latents per step, and noise vectors per block of the pool")
    pool_factor: int = _option(10, "noise vectors drawn per latent in each epoch")
    reject_quantile: float = _option(
        0.0,
        "RS-IMLE: reject noise nearer to a latent than this quantile of the matched distances, 0 to below 1; "
        "0 rejects nothing",
    )
    rematch: float = _option(
        1.0,
        "match a latent anew once its distance has fallen to this share of what it was when matched, above 0 to "
        "1; 1 matches every latent in every epoch",
    )
    lr: float = _option(1e-3, "learning rate of the mapping network at the start")
    schedule: Literal["cosine", "halving"] = _option(
        "cosine", "learning rate: cosine to zero, or halved after every 50 epochs"
    )
    weight_decay: float = _option(1e-5, "L2 regularisation added to the gradient")
    normalise: bool = _option(
        True, "put the mapped noise on the unit sphere, where the latents are, before matching"
    )
    adam_state: Literal["keep", "per-epoch"] = _option(
        "keep", "keep Adam's moments, or start them anew each epoch"
    )
    batchnorm: Literal["eval", "train"] = _option(
        "eval", "BatchNorm of the mapping network when sampling: running statistics, or of each batch"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("noise_dim", "hidden", "epochs", "pool_factor"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.batch_size >= 2, "batch_size", "at least 2 (BatchNorm needs it)", self.batch_size)
        _require(0 <= self.reject_quantile < 1, "reject_quantile", "0 to below 1", self.reject_quantile)
        _require(0 < self.rematch <= 1, "rematch", "above 0 to 1", self.rematch)
        _require(0 < self.lr < float("inf"), "lr", "a positive number", self.lr)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)


@dataclass(frozen=True)
class Preset:
    """One named set of options for every stage that trains."""

    train: TrainOptions
    map: MapOptions


_PAPER = Preset(
    train=TrainOptions(
        latent_norm="detached",
        reuse_norms=True,
        blur="seed",
        target_range="unit",
        frame_reduction="sum-but-last",
        schedule="halving",
        adam_state="per-epoch",
        latent_mode="dense",
        latent_init="normal",
        batchnorm="train",
    ),
    map=MapOptions(
        pool_factor=2, schedule="halving", normalise=False, adam_state="per-epoch", batchnorm="train"
    ),
)
_MODERN = Preset(train=TrainOptions(), map=MapOptions())
_DEMO = Preset(
    train=replace(_MODERN.train, width=32, batch_size=5, epochs=150, lr_generator=0.002, latent_init="pca"),
    map=replace(_MODERN.map, epochs=400, batch_size=32, pool_factor=100, lr=3e-3),
)
PRESETS: dict[PresetName, Preset] = {"paper": _PAPER, "modern": _MODERN, "demo": _DEMO}


def preset(name: str) -> Preset:
    """The preset called `name`; `VglannError` names the known ones."""
    if name not in PRESETS:
        raise VglannError(f"--preset: expected one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name]


def options_from_json(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass of options from a JSON object. An option that is missing, since the file is of an earlier
    version, has its default; unknown names are refused with `VglannError`."""
    odd = sorted(values.keys() - {f.name for f in fields(cls)})
    if odd:
        raise VglannError(f"options: unknown {', '.join(odd)}; made by another version?")
    for field_ in fields(cls):
        value, kind = values.get(field_.name, field_.default), type(field_.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise VglannError(
                f"options: {field_.name} is {value!r}, not a {kind.__name__}; the file was changed"
            )
    return cls(**values)


def options_to_json(options: Any) -> dict[str, Any]:
    """The JSON object `options_from_json` reads."""
    return asdict(options)
