"""Perceptual losses: how far the features of two videos are apart in a network trained for something else.

The networks are frozen and read weights the user has imported (`nets/weights.py`). Networks for pictures see every
frame of a batch as a picture of its own, all at once; those for videos see whole clips. The features of the real
clips need no gradient and are the same in every epoch, so they are kept where memory allows: after the first step,
when it is known what a step takes.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vglann_fast.clips.pixels import to_range
from vglann_fast.errors import VglannError
from vglann_fast.glo.loader import HEADROOM, ClipSource
from vglann_fast.glo.precision import AUTOCAST
from vglann_fast.nets.efficientnet_lite0 import EfficientNetLite0
from vglann_fast.nets.resnet3d import MEAN as KINETICS_MEAN
from vglann_fast.nets.resnet3d import ResNet3d
from vglann_fast.nets.vgg16 import CAFFE, IMAGENET, VGG16
from vglann_fast.nets.weights import Weights, load_weights
from vglann_fast.options.training import PERCEPTUAL, Precision, TrainOptions
from vglann_fast.progress import Progress
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.memory import free_beside_a_step

log = logging.getLogger("vglann_fast")

TargetLoss = Callable[[Tensor], Tensor]  # video [B, 3, T, H, W] -> loss [], against clips given before
Statistics = tuple[
    tuple[float, float, float], tuple[float, float, float]
]  # mean, deviation of R, G, B in 0..255

EPS = 1e-6  # of the size of a level's features, below which they count as nothing
AS_IS: Statistics = ((0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True)
class Recipe:
    """The features of a network that are compared, and how.

    taps: its layers, in ascending order; times: how often each is counted.
    statistics: the network reads (x - mean) / deviation of x in 0..255; None: values in the range of the training.
    swap_colors: the network's first layer expects B, G, R.
    whole_clips: a network for videos; otherwise one for pictures.
    batch_statistics: its BatchNorms use the statistics of each batch, the made and the real one apart.
    relative: differences at a level are divided by the mean size of the real clip's features there, so that
        levels, and networks, weigh alike.
    """

    taps: tuple[Any, ...]
    times: tuple[int, ...]
    statistics: Statistics | None
    swap_colors: bool = False
    whole_clips: bool = False
    batch_statistics: bool = False
    relative: bool = True


_KINETICS: Statistics = (KINETICS_MEAN, (1.0, 1.0, 1.0))
# Outputs of the last ReLU before each of VGG16's maxima 1 to 4, but of conv3_2 in the third, as the author has it.
_RECIPES: dict[str, Recipe] = {
    "vgg16": Recipe((3, 8, 13, 22), (1, 1, 1, 1), IMAGENET),
    "hed-vgg16": Recipe((3, 8, 13, 22), (1, 1, 1, 1), CAFFE, swap_colors=True),
    "lite0": Recipe((0, 2, 4, 10), (1, 1, 1, 1), AS_IS),  # the last blocks at strides 2, 4, 8, 16
    "resnet50-3d": Recipe(("pool", "layer1", "layer2", "layer4"), (1, 1, 1, 1), _KINETICS, whole_clips=True),
    "resnext101-3d": Recipe(("pool", "layer1", "layer2"), (1, 1, 1), _KINETICS, whole_clips=True),
}
# What the author's code computes: in-place ReLUs put layers 2, 7 and 12 of VGG16 behind their ReLU but leave 21
# before it; the ResNeXt's list of features names layer2 twice; no statistics of the input; colors from cv2.
_PAPER: dict[str, Recipe] = {
    "vgg16": Recipe((3, 8, 13, 21), (1, 1, 1, 1), None, swap_colors=True, relative=False),
    "resnet50-3d": Recipe(
        ("pool", "layer1", "layer2", "layer4"),
        (1, 1, 1, 1),
        None,
        swap_colors=True,
        whole_clips=True,
        batch_statistics=True,
        relative=False,
    ),
    "resnext101-3d": Recipe(
        ("pool", "layer1", "layer2"),
        (1, 1, 2),
        None,
        swap_colors=True,
        whole_clips=True,
        batch_statistics=True,
        relative=False,
    ),
}


def recipe_of(name: str, options: TrainOptions) -> Recipe:
    """Return the recipe by which `options` compare the features of network `name`."""
    return (_PAPER.get(name) if options.perceptual == "paper" else None) or _RECIPES[name]


def load_features(
    options: TrainOptions,
    device: torch.device | str,
    *,
    precision: Precision = "fp32",
    dtype: torch.dtype = torch.float32,
) -> "dict[str, FeatureLoss]":
    """The feature losses named in `options.loss`, with their imported weights; empty if it names none.

    precision: of the networks' arithmetic, as resolved for the generator. Raises as `load_weights` and `FeatureLoss`.
    """
    return {
        name: FeatureLoss(load_weights(name), options, torch.device(device), precision, dtype)
        for name in options.loss_terms
        if name in PERCEPTUAL
    }


class FeatureLoss:
    """Distance of a video from a clip in the features of one network.

    The mean absolute difference of the values and, at each level of the recipe, of the features: a tensor [B, T, h,
    w, C], with the network's own t for T where it reads whole clips. Raises `VglannError` for --cache-features on
    where the features of a clip depend on its batch.
    """

    def __init__(
        self,
        weights: Weights,
        options: TrainOptions,
        device: torch.device,
        precision: Precision = "fp32",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.sha256, self.device = weights.name, weights.sha256, device
        self.recipe = recipe_of(weights.name, options)
        if self.recipe.batch_statistics and options.cache_features == "on":
            raise VglannError(
                f"--cache-features on: the features of {self.name} depend on the batch with --perceptual paper; "
                "use --perceptual fixed or leave it out"
            )
        form = torch.channels_last_3d if self.recipe.whole_clips else torch.channels_last
        network = _network(weights, self.recipe).to(device, dtype)
        self.network: nn.Module = network.to(memory_format=form)  # type: ignore[call-overload]
        self.network.train(self.recipe.batch_statistics)
        self.options = replace(options, frame_reduction="mean") if self.recipe.whole_clips else options
        self.by_clip = options.checkpoint_activations and not self.recipe.batch_statistics
        self._autocast_to = AUTOCAST.get(precision)
        self._dtype = dtype
        low, high = options.target_limits
        unit = (high - low) / 255.0
        statistics = self.recipe.statistics or ((-low / unit,) * 3, (1 / unit,) * 3)
        mean, deviation = (torch.tensor(v, dtype=torch.float64) for v in statistics)
        # Network inputs are shift + scale * x: of uint8 clips, and of videos in the range of the training.
        self._of_bytes = self._affine(-mean / deviation, 1.0 / deviation)
        self._of_values = self._affine((-low / unit - mean) / deviation, 1.0 / (unit * deviation))
        self._kept: list[Tensor] | None = None

    def against(self, clips: Tensor, rows: Tensor | None = None) -> TargetLoss:
        """The loss of videos [B, 3, T, H, W] against `clips`, uint8 or in the range of the training.

        Args:
            rows: [B], of these clips among those whose features were kept; None computes them.

        Returns:
            video -> scalar: the mean over clips and frames; for networks that see pictures, with
            frame_reduction="sum-but-last", the sum over all frames but the last.
        """
        clips = self._scored(clips)
        with torch.no_grad():
            if self._kept is None or rows is None:
                targets = self.levels(clips)
            else:
                targets = [level.index_select(0, rows) for level in self._kept]

        def loss(video: Tensor) -> Tensor:
            video = self._scored(video).to(torch.promote_types(video.dtype, torch.float32))
            pixels = (video - to_range(clips, video.dtype, self.options.target_limits)).abs().mean()
            distance = self._distance_by_clip if self.by_clip else self._distance
            total = pixels + distance(video, targets).mean()
            return total if self.options.frame_reduction == "mean" else video.shape[2] * total

        return loss

    def levels(self, video: Tensor) -> list[Tensor]:
        """Features of videos [B, 3, T, H, W], uint8 or in the range of the training, at each level."""
        shift, scale = self._of_values if video.is_floating_point() else self._of_bytes
        # Channels last in memory from here on: one copy, and the network gets its layout as a view.
        pixels = torch.addcmul(shift, video.movedim(1, -1).to(self._dtype), scale).contiguous()
        x = pixels if self.recipe.whole_clips else pixels.flatten(0, 1)
        with self._autocast():
            found = self.network(x.movedim(-1, 1), taps=self.recipe.taps)
        levels = [level.movedim(1, -1) for level in found]
        return levels if self.recipe.whole_clips else [f.unflatten(0, pixels.shape[:2]) for f in levels]

    def keep_targets(
        self,
        source: ClipSource,
        count: int,
        batch_size: int,
        ranks: Ranks | None = None,
        told: Callable[[], bool] = lambda: False,
    ) -> None:
        """Compute the features of all clips once, if --cache-features and the memory of every process allow.

        Called after a training step, since it takes of what that leaves free. In batches as the training's, so
        that the numbers are those it would have computed in each step.

        Args:
            source: the clips of this process's share.
            count: of the clips of all processes.
            told: whether to stop and keep nothing. Asked after each batch, by all processes equally often.

        Raises:
            VglannError: "on" does not fit; the same in all processes.
        """
        if self.options.cache_features == "off" or self.recipe.batch_statistics or self.keeps_targets:
            return
        ranks = ranks or Ranks()
        own = len(ranks.owns(count))
        levels = self._look(source, 0, batch_size, own)
        if not self._fits(levels, own, ranks):
            return
        self._kept = []  # from here on --cache-features off would help, should memory not suffice
        self._kept += [level.new_empty((own, *level.shape[1:])) for level in levels]
        named, done = f"features of {self.name}", min(batch_size, own)
        with Progress(named, own, "clip", done) if ranks.rank == 0 else nullcontext() as progress:
            for first in range(0, -(-count // ranks.size), batch_size):  # to the end of the longest share
                if first:
                    levels = self._look(source, first, batch_size, own)
                for kept, level in zip(self._kept, levels, strict=True):
                    kept[first : first + batch_size] = level[: own - first]
                if progress is not None and first:
                    for _ in range(first, min(first + batch_size, own)):
                        progress.advance()
                    progress.show()
                if told():
                    self._kept = None
                    return

    def _look(self, source: ClipSource, first: int, batch_size: int, own: int) -> list[Tensor]:
        """Features of a whole batch of clips from row `first` of `own` on; behind the last comes the first again."""
        batch = source.batch(torch.arange(first, first + batch_size).remainder(own).numpy())
        with torch.no_grad():
            return self.levels(self._scored(batch.clips[batch.at]))

    @property
    def keeps_targets(self) -> bool:
        """Return True if the features of the clips are kept."""
        return self._kept is not None

    @property
    def nbytes(self) -> int:
        """Bytes on the device: the network's weights and the features that are kept."""
        tensors = [*self.network.parameters(), *self.network.buffers(), *(self._kept or [])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _fits(self, levels: list[Tensor], own: int, ranks: Ranks) -> bool:
        """Return True if every process has room for the features of its share: else some would wait for others."""
        needed = sum(level[0].numel() * level.element_size() for level in levels) * own
        room = int(HEADROOM * free_beside_a_step(self.device))
        shortage = (
            f"the features of {self.name} of {own} clips take {needed / 1e9:.2f} GB and {self.device} has "
            f"{max(0, room) / 1e9:.2f} GB for them beside a step"
        )
        shortages = ranks.gather_words([shortage] if needed > room else [])
        if not shortages:
            return True
        if self.options.cache_features == "on":
            raise VglannError(
                f"--cache-features on: {shortages[0]}; use --cache-features off "
                "(of a run: vglann train --resume RUN --cache-features off)"
            )
        log.info("%s: computed again in each step", shortages[0])
        return False

    def _distance(self, video: Tensor, targets: list[Tensor]) -> Tensor:
        """[B], the sum over levels."""
        total = torch.zeros((), device=video.device)
        for made, real, times in zip(self.levels(video), targets, self.recipe.times, strict=True):
            wide = torch.promote_types(made.dtype, torch.float32)  # half-precision values, summed in float32
            level = (made - real).abs().mean((1, 2, 3, 4), dtype=wide)
            if self.recipe.relative:
                level = level / (real.abs().mean((1, 2, 3, 4), dtype=wide) + EPS)
            total = total + times * level
        return total

    def _distance_by_clip(self, video: Tensor, targets: list[Tensor]) -> Tensor:
        """The same, keeping no activations: each clip's are computed again in the backward pass."""
        return torch.cat(
            [
                checkpoint(
                    self._distance,
                    video[i : i + 1],
                    [level[i : i + 1] for level in targets],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for i in range(len(video))
            ]
        )

    def _scored(self, clips: Tensor) -> Tensor:
        return clips[:, :, : self.options.scored_frames(clips.shape[2])]

    def _affine(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return shift.to(self.device, self._dtype), scale.to(self.device, self._dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_to is None:
            return nullcontext()
        # The cache of cast weights would outlive the graph it was filled in.
        return torch.autocast(self.device.type, dtype=self._autocast_to, cache_enabled=False)


def _network(weights: Weights, recipe: Recipe) -> nn.Module:
    """The network that the weights are of, no deeper than the last tap where it comes in pieces."""
    if weights.name == "lite0":
        return EfficientNetLite0.loaded(weights.tensors)
    if weights.name in ("resnet50-3d", "resnext101-3d"):
        return ResNet3d.loaded(
            weights.name,  # type: ignore[arg-type]
            weights.tensors,
            until=recipe.taps[-1],
            swap_colors=recipe.swap_colors,
        )
    return VGG16.loaded(weights.tensors, depth=recipe.taps[-1] + 1, swap_colors=recipe.swap_colors)


def weight_records(features: Mapping[str, FeatureLoss]) -> dict[str, str]:
    """Return a checkpoint's record of the networks in the loss: name -> sha256 of the weight file."""
    return {name: loss.sha256 for name, loss in features.items()}


def check_weights(recorded: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Raise `VglannError` if a network's weights are not those a checkpoint was made with; see `weight_records`.

    A network of which the checkpoint has no record, as older and imported ones, may have any.
    """
    for name, sha256 in present.items():
        if recorded.get(name, sha256) != sha256:
            raise VglannError(
                f"the run was trained with other weights of {name} (sha256 {str(recorded[name])[:12]}, now "
                f"{sha256[:12]}); import that file: vglann weights import {name} FILE"
            )
