"""Options of the training: a frozen dataclass that checks itself. The defaults are preset `modern-2026a`.

Each field carries its help text; the command line is made from it.
"""

from dataclasses import dataclass
from typing import Literal

from vglann_fast.options.fields import check_choices, option, require

Variant = Literal["original", "expanded"]
LatentNorm = Literal["projected", "detached"]
PresetName = Literal["paper", "modern", "modern-2026a", "demo"]
OnMismatch = Literal["error", "keep", "init"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

PERCEPTUAL = (
    "vgg16",
    "hed-vgg16",
    "resnet50-3d",
    "resnext101-3d",
    "lite0",
)  # losses by features of a network
# Upper bounds: larger values are typos or damaged files and would only fail later, out of memory.
MAXIMA = {"width": 4096, "latent_dim": 65_536, "epochs": 10**9, "batch_size": 65_536, "accumulate": 65_536}
# Cost of a background step as a share of a full one, at width 32 and 32 frames of 64 x 64 on a CPU: 0.04 with Adam,
# 0.05 with Muon. Smaller clips pay more: 0.15 to 0.2 at width 16 and 16 frames of 32 x 32.
BACKGROUND_COST = 0.05
# Beyond this many passes the background gains little, however long the run.
MAX_BACKGROUND_PASSES = 100
LOSSES = ("laplacian", "l1", "l2", "motion", *PERCEPTUAL)
# Losses that a still picture has none of.
OF_VIDEOS = ("motion", *PERCEPTUAL)

# The headings of --help.
MODEL, LOSS, OPTIMIZATION, MACHINE = "model", "loss", "optimization", "machine"
PAPER = "reproducing the paper (quirks of the GLANN-VIDEO code, set by --preset paper)"


def loss_terms(spec: str) -> dict[str, float]:
    """Return the weights of the losses in a sum: "laplacian:1,l1:0.1" -> {"laplacian": 1.0, "l1": 0.1}.

    A loss without a weight counts once. Raises `VglannError` for unknown names, for names that occur twice, and for
    weights that are not positive numbers.
    """
    terms: dict[str, float] = {}
    for term in spec.split(","):
        name, colon, factor = (part.strip() for part in term.partition(":"))
        require(name in LOSSES, "loss", f"a sum like laplacian:1,l1:0.1 of {', '.join(LOSSES)}", spec)
        require(name not in terms, "loss", f"{name} once", spec)
        try:
            terms[name] = float(factor) if colon else 1.0
        except ValueError:
            terms[name] = 0.0
        require(0 < terms[name] < float("inf"), "loss", f"a positive number as the weight of {name}", spec)
    return terms


@dataclass(frozen=True)
class TrainOptions:
    """GLO: the generator, the latents and how they are trained together. Defaults: preset `modern-2026a`."""

    variant: Variant = option("original", "generator network", group=MODEL)
    width: int = option(64, "of the generator's last hidden layer", group=MODEL, metavar="CHANNELS")
    latent_dim: int = option(100, "length of a latent", group=MODEL, metavar="NUMBERS")

    loss: str = option(
        "laplacian", f"{', '.join(LOSSES)}, or a sum like l1:1,lite0:0.1", group=LOSS, metavar="SUM"
    )
    levels: int = option(3, "of the Laplacian pyramid, 1 to 5", group=LOSS, metavar="BANDS")
    mask_weight: float = option(
        0.0, "of the mean of the mask; videogan has 0.1", group=LOSS, metavar="WEIGHT"
    )

    epochs: int = option(200, "over the clips", group=OPTIMIZATION, metavar="PASSES")
    batch_size: int = option(
        15, "per process; leftovers join the next pass", group=OPTIMIZATION, metavar="CLIPS"
    )
    accumulate: int = option(
        1, "per update, each normalized by itself", group=OPTIMIZATION, metavar="BATCHES"
    )
    lr_latents: float = option(
        0.03, "of the latents at the start", group=OPTIMIZATION, metavar="RATE", rate=True
    )
    lr_generator: float = option(
        0.002, "of the generator at the start", group=OPTIMIZATION, metavar="RATE", rate=True
    )
    optimizer: Literal["adam", "muon"] = option("adam", "of the transposed convolutions", group=OPTIMIZATION)
    lr_muon: float = option(0.005, "of Muon at the start", group=OPTIMIZATION, metavar="RATE", rate=True)
    background_share: float = option(
        0.0, "of the cost, to learn stills first", group=OPTIMIZATION, metavar="PART"
    )
    ema: float = option(
        0.0, "of a generator averaged over steps; 0: none", group=OPTIMIZATION, metavar="DECAY"
    )
    latent_init: Literal["sphere", "normal", "pca"] = option(
        "pca",
        "first latents, random or along the clips' principal components",
        group=OPTIMIZATION,
    )
    sync_bn: bool = option(False, "BatchNorm statistics over all processes", group=OPTIMIZATION)

    precision: Precision = option(
        "auto",
        "of the generator; auto: as measured, else bf16 on recent GPUs",
        group=MACHINE,
        machine=True,
    )
    data: Literal["auto", "resident", "pinned", "mmap"] = option(
        "auto", "where clips wait: on the device, in pinned memory, on disk", group=MACHINE, machine=True
    )
    cuda_graph: Literal["auto", "on", "off"] = option(
        "auto",
        "a step as one CUDA graph; auto: where `vglann tune` measured it",
        group=MACHINE,
        machine=True,
    )
    cache_features: Literal["auto", "on", "off"] = option(
        "auto", "keep the clips' features", group=MACHINE, machine=True
    )
    compile: bool = option(False, "run the generator through torch.compile", group=MACHINE, machine=True)
    checkpoint_activations: bool = option(
        False, "save memory: compute BatchNorm and ReLU twice", group=MACHINE, machine=True
    )
    deterministic: bool = option(
        False, "same bytes twice on one machine; slower", group=MACHINE, machine=True
    )

    latent_norm: LatentNorm = option(
        "projected", "gradient through z/|z|: along the sphere, or with |z| as a constant", group=PAPER
    )
    reuse_norms: bool = option(False, "expanded: two BatchNorms twice", group=PAPER)
    perceptual: Literal["fixed", "paper"] = option("fixed", "of networks in the loss", group=PAPER)
    blur: Literal["binomial", "gaussian", "paper"] = option("binomial", "of the pyramid", group=PAPER)
    target_range: Literal["symmetric", "unit"] = option(
        "symmetric", "of clips: [-1, 1] or [0, 1]", group=PAPER
    )
    frame_reduction: Literal["mean", "sum-but-last"] = option("mean", "of the loss over frames", group=PAPER)
    schedule: Literal["cosine", "halve-every-tenth"] = option(
        "cosine", "learning rates: cosine to zero, or halved after each tenth of the passes", group=PAPER
    )
    adam_state: Literal["keep", "per-epoch"] = option("keep", "Adam's moments", group=PAPER)
    latent_mode: Literal["sparse", "lazy", "dense"] = option(
        "sparse",
        "Adam on the batch's latents, on all when read, or on all",
        group=PAPER,
    )
    batchnorm: Literal["eval", "train"] = option(
        "eval", "BatchNorm when sampling: re-estimated statistics, or each batch's", group=PAPER
    )

    def __post_init__(self) -> None:
        check_choices(self)
        loss_terms(self.loss)
        for name, most in MAXIMA.items():
            require(1 <= getattr(self, name) <= most, name, f"1 to {most:,}", getattr(self, name))
        require(self.batch_size >= 2, "batch_size", "at least 2 (BatchNorm needs it)", self.batch_size)
        require(1 <= self.levels <= 5, "levels", "1 to 5", self.levels)
        require(0 <= self.mask_weight < float("inf"), "mask_weight", "0 or more", self.mask_weight)
        for name in ("lr_latents", "lr_generator", "lr_muon"):
            require(0 < getattr(self, name) < float("inf"), name, "a positive number", getattr(self, name))
        require(
            self.optimizer == "muon" or self.lr_muon == 0.005, "lr_muon", "--optimizer muon with it", "adam"
        )
        require(0 <= self.ema < 1, "ema", "0 or more and less than 1", self.ema)
        self._check_background()

    def _check_background(self) -> None:
        share = self.background_share
        require(0 <= share < 1, "background_share", "0 or more and less than 1", share)
        require(
            share == 0 or self.background_passes > 0,
            "background_share",
            f"0 or at least {BACKGROUND_COST / self.epochs:.2g}, one pass of {self.epochs} epochs",
            share,
        )
        require(
            share == 0 or self.variant == "original",
            "background_share",
            "0 with --variant expanded, whose wider background stream cannot be copied to the foreground",
            share,
        )

    @property
    def background_passes(self) -> int:
        """Passes over the clips in which the background alone learns.

        They take `background_share` of the cost of `epochs` full passes, and never more than 100 passes: a pass
        visits each latent once, whatever the number of clips, and 30 to 60 passes were tried on 218 clips. With a
        share of 0.15, 20 epochs, which suit 218 clips, have 60 background passes and 17 full ones. 150 epochs on 20
        clips have 100 and 145; 200 epochs on 2,000 or 50,000 clips have 100 and 195, a fortieth of the cost.
        """
        return min(MAX_BACKGROUND_PASSES, round(self.background_share * self.epochs / BACKGROUND_COST))

    @property
    def full_passes(self) -> int:
        """Passes in which everything learns: what the background leaves of `epochs`, at least one."""
        return max(1, round(self.epochs - BACKGROUND_COST * self.background_passes))

    @property
    def passes(self) -> int:
        """Passes over the clips in all."""
        return self.background_passes + self.full_passes

    @property
    def loss_terms(self) -> dict[str, float]:
        """The losses summed, and their weights."""
        return loss_terms(self.loss)

    @property
    def target_limits(self) -> tuple[float, float]:
        """The values that 0 and 255 of a clip are mapped to."""
        return (-1.0, 1.0) if self.target_range == "symmetric" else (0.0, 1.0)

    def scored_frames(self, frames: int) -> int:
        """Return how many of a clip's `frames`, counted from the first, enter the loss."""
        return frames - 1 if self.frame_reduction == "sum-but-last" else frames
