"""Options of the training: a frozen dataclass that checks itself. The defaults are preset `modern`.

Each field carries its help text; the command line is made from it.
"""

from dataclasses import dataclass
from typing import Literal

from vglann_fast.options.fields import check_choices, option, require

Variant = Literal["original", "expanded"]
LatentNorm = Literal["projected", "detached"]
PresetName = Literal["paper", "modern", "demo"]
OnMismatch = Literal["error", "keep", "init"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

PERCEPTUAL = (
    "vgg16",
    "hed-vgg16",
    "resnet50-3d",
    "resnext101-3d",
    "lite0",
)  # losses by features of a network
# Beyond any machine: a larger number is a slip of the hand or a damaged file, and would fail as a lack of memory.
MAXIMA = {"width": 4096, "latent_dim": 65_536, "epochs": 10**9, "batch_size": 65_536, "accumulate": 65_536}
# Cost of a background step as a share of a full one, measured at width 16 and 32: 0.04 with Adam, 0.05 with Muon.
BACKGROUND_COST = 0.05
# Beyond this many passes the background gains little, however long the run.
MAX_BACKGROUND_PASSES = 100
LOSSES = ("laplacian", "l1", "l2", *PERCEPTUAL)


def loss_terms(spec: str) -> dict[str, float]:
    """The weights of the losses in a sum: "laplacian:1,l1:0.1" -> {"laplacian": 1.0, "l1": 0.1}.

    A loss without a weight counts once. Raises `VglannError` for names that are no loss, or named twice, and for
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
    """GLO: the generator, the latents and how they are trained together. Defaults: preset `modern`."""

    variant: Variant = option("original", "generator network")
    width: int = option(64, "channels of the generator's last hidden layer")
    latent_dim: int = option(100, "length of a latent")
    latent_norm: LatentNorm = option(
        "projected",
        "gradient through z/|z|: projected on the sphere, or the norm detached as in the author's code",
    )
    reuse_norms: bool = option(
        False, "expanded variant: use two of its BatchNorms twice, as the author's code does"
    )

    loss: str = option(
        "laplacian",
        f"reconstruction loss: {', '.join(LOSSES)}, or a weighted sum like laplacian:1,lite0:0.1; the losses by "
        "features of a network need its weights (vglann weights import) and contain l1",
    )
    perceptual: Literal["fixed", "seed"] = option(
        "fixed",
        "vgg16, resnet50-3d and resnext101-3d in the loss: input as they were trained on, frozen, levels weighing "
        "alike; or the author's levels, colors and range, and BatchNorm by batch",
    )
    blur: Literal["binomial", "gaussian", "seed"] = option("binomial", "blur of the Laplacian pyramid")
    levels: int = option(3, "bands of the Laplacian pyramid, 1 to 5; the low-pass residual comes on top")
    mask_weight: float = option(0.0, "weight of the sparsity prior, the mean of the mask; videogan has 0.1")
    target_range: Literal["symmetric", "unit"] = option(
        "symmetric", "range the clips are mapped to: [-1, 1] like the generator's tanh, or [0, 1]"
    )
    frame_reduction: Literal["mean", "sum-but-last"] = option(
        "mean", "mean over all frames, or the author's sum that leaves out the last frame"
    )

    epochs: int = option(
        200, "passes over the clips; with --background-share the cost of both phases, in full passes"
    )
    batch_size: int = option(
        15, "clips per batch and process; clips left over in an epoch wait for the next one"
    )
    lr_latents: float = option(0.03, "learning rate of the latents at the start", rate=True)
    lr_generator: float = option(0.002, "learning rate of the generator at the start", rate=True)
    optimizer: Literal["adam", "muon"] = option(
        "adam", "of the generator; muon trains its transposed convolutions by Muon and the rest by Adam"
    )
    lr_muon: float = option(0.005, "learning rate of Muon at the start", rate=True)
    background_share: float = option(
        0.0,
        "share of the run's cost, at most, for a first phase in which the background stream alone learns each clip's "
        "mean frame; the foreground then starts as a copy of it. Within 0 to 1; variant original",
    )
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the generator, from which videos are then made; 0: no average",
    )
    schedule: Literal["cosine", "halving"] = option(
        "cosine", "learning rates: cosine to zero, or halved after every tenth of the epochs"
    )
    adam_state: Literal["keep", "per-epoch"] = option(
        "keep", "keep Adam's moments, or start them anew each epoch"
    )
    latent_mode: Literal["row", "dense", "catchup"] = option(
        "row",
        "Adam over the latents: only rows of the batch, with step counts of their own; the whole table at "
        "every step; or that trajectory computed only for the rows that are read",
    )
    latent_init: Literal["sphere", "normal", "pca"] = option(
        "pca",
        "first latents: random unit rows, N(0, 0.01^2), or unit rows along the clips' principal components",
    )
    batchnorm: Literal["eval", "train"] = option(
        "eval", "BatchNorm when reconstructing and sampling: statistics re-estimated, or of each batch"
    )
    accumulate: int = option(
        1, "batches per update, one after the other; each is a BatchNorm batch of its own"
    )
    sync_bn: bool = option(
        False, "several processes: take BatchNorm statistics over all of them, not over each alone"
    )

    precision: Precision = option(
        "auto",
        "of the generator's arithmetic; weights, losses, latents and statistics stay float32. auto: bf16 on a "
        "GPU of compute capability 8.0 or more, else fp32",
        machine=True,
    )
    data: Literal["auto", "resident", "pinned", "mmap"] = option(
        "auto",
        "where the clips wait: all on the device, copied to it one batch ahead through pinned memory, or read "
        "from the mapped files when needed. auto: resident if they fit, else pinned; on a CPU mmap",
        machine=True,
    )
    cuda_graph: Literal["auto", "on", "off"] = option(
        "auto",
        "replay the whole step as one CUDA graph; auto: on GPUs where that was compared with a training without it, "
        "on none so far; on: also where it was not, with a warning",
        machine=True,
    )
    compile: bool = option(False, "run the generator through torch.compile", machine=True)
    cache_features: Literal["auto", "on", "off"] = option(
        "auto",
        "keep the clips' own features in the device's memory, not compute them in each step; auto: if they fit "
        "beside a step",
        machine=True,
    )
    checkpoint_activations: bool = option(
        False, "save memory: compute BatchNorm and ReLU of a layer again in the backward pass", machine=True
    )
    deterministic: bool = option(
        False,
        "give the same bytes twice on one machine, by operations that are slower on a GPU",
        machine=True,
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

        They take `background_share` of the cost of `epochs` full passes, and never more than 100 passes: each latent
        is visited once in a pass, whatever the number of clips, and 40 passes were enough for 218 clips. With a share
        of 0.25, 20 epochs on 218 clips have 100 background passes for 5 of those epochs; 150 epochs on 20 clips, or
        200 on 2,000 or 50,000, have 100 for 5, which is then less than the share.
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
