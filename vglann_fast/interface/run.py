"""`vf.Run`, `vf.load` and `vf.evaluate`: a trained run as an object."""

import html
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.interface.arguments import check_names, checked_seed, typed, whole, words
from vglann_fast.interface.decoding import latents_between, reconstructed, rows_of, with_own_statistics
from vglann_fast.interface.machine import computing, torch_device
from vglann_fast.interface.videos import Videos, gif_html
from vglann_fast.mapping.fit import fit_mapping, load_mapping
from vglann_fast.metrics.evaluate import PATIENCE, Evaluation
from vglann_fast.metrics.evaluate import evaluate as evaluate_run
from vglann_fast.metrics.record import doubts
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.mapping import MapOptions, map_options
from vglann_fast.options.presets import preset as preset_named
from vglann_fast.options.training import PresetName, TrainOptions
from vglann_fast.report.page import write_report
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import joined
from vglann_fast.samples.invert import invert
from vglann_fast.samples.sample import MAX_VIDEOS, draw_latents, render

log = logging.getLogger("vglann_fast")

FEATURES = ("transnetv2", "lite0", "lite0-step")
_SHOWN = 8  # reconstructions that a notebook shows of a run


class Run:
    """A run folder, and what can be made from it. `vf.train` and `vf.load` return one.

    Generator and latents are loaded when they are first used, and stay as they are then. A method gives the same
    result whatever was called before it. Only `fit_mapping`, `evaluate` and `report` write to the folder, and they
    read it as it is at the time. All methods may be called from any thread.

    Attributes:
        path: the run folder.
        device: device of the generator and the latents.
        kernels: choice of kernels as for `--kernels`, or None.
    """

    def __init__(
        self, path: str | Path, *, device: str | torch.device | None = None, kernels: str | None = None
    ) -> None:
        self.path = Path(path)
        self.device = torch_device(device)
        self.kernels = kernels
        self._record = RunDir.open(path).options
        with self._computing():
            pass  # kernels that cannot run are an error here, not at their first use

    @property
    def generator(self) -> TwoStreamGenerator:
        """The generator: float32 latents [B, d] -> videos float32 [B, 3, T, H, W] in (-1, 1).

        Its parameters have no gradients. It is in eval mode, or in train mode for a run with batchnorm="train".
        """
        return self._trained.generator

    @property
    def latents(self) -> Tensor:
        """The latents of the training clips, float32 [N, d] on `device`, in the order of `ids`."""
        return self._trained.latents

    @property
    def ids(self) -> list[str]:
        """The ids of the N training clips: 16 hexadecimal digits each."""
        return list(self._trained.ids)

    @property
    def step(self) -> int:
        """The number of training steps that generator and latents have taken."""
        return self._trained.step

    @property
    def options(self) -> TrainOptions:
        """The options of the training."""
        options: TrainOptions = options_from_json(TrainOptions, self._record["train"])
        return options

    @property
    def mappings(self) -> list[str]:
        """The kinds of the mappings that are fitted at present, in alphabetical order."""
        return sorted(file.parent.name for file in self.path.glob("mapping/[!.]*/mapping.json"))

    def reconstruct(self, ids: Iterable[str] | None = None) -> Videos:
        """Return the generator's videos of training clips, uint8 [n, 3, T, H, W].

        Args:
            ids: n ids of training clips. Default: all N of them, in the order of `Run.ids`.

        Raises `VglannError` for an id that is not in `Run.ids`.
        """
        with self._computing():
            trained = with_own_statistics(self._trained)
            rows = range(len(trained.ids)) if ids is None else rows_of(trained, words(ids))
            return Videos(reconstructed(trained, rows))

    def sample(self, n: int, *, kind: str | None = None, seed: int = 0) -> Videos:
        """Return n new videos, uint8 [n, 3, T, H, W]: the same that `vglann sample RUN -n N --seed SEED` writes.

        Args:
            n: number of videos, at least 1.
            kind: mapping to sample from. Default: "imle" if it is fitted, else the only one that is.
            seed: seed of the noise, 0 to below 2^63.

        Raises `VglannError` when the mapping is not fitted, and for a bad `n` or `seed`.
        """
        n, seed = whole("n", n, 1, MAX_VIDEOS), checked_seed(seed)
        with self._computing():
            trained = with_own_statistics(self._trained)
            mapping = load_mapping(RunDir.open(self.path), self._kind(kind), self.device)
            return Videos(render(trained, draw_latents(trained, mapping, n, seed)).video)

    def interpolate(self, a: str | Tensor, b: str | Tensor, steps: int) -> Videos:
        """Return videos along the great circle from latent `a` to latent `b`, uint8 [steps, 3, T, H, W].

        Args:
            a: a training clip's id, or a latent [d] of any length above 0.
            b: the same.
            steps: number of videos, both ends included, at least 2.

        Raises `VglannError` for an unknown id, a latent of another shape or with values that are not finite, opposite
        latents, or a bad `steps`.
        """
        steps = whole("steps", steps, 2, MAX_VIDEOS)
        with self._computing():
            trained = with_own_statistics(self._trained)
            return Videos(render(trained, latents_between(trained, a, b, steps)).video)

    def invert(self, videos: np.ndarray, *, starts: int = 4, steps: int = 200) -> Tensor:
        """Return the latents that make the given videos best, float32 [n, d] of length 1, on `device`.

        The generator stays as it is. The same videos give the same latents.

        Args:
            videos: uint8 [n, 3, T, H, W] of the size that the generator makes, n >= 1.
            starts: latents tried for each video, at least 1.
            steps: gradient steps for each video, at least 1.

        Raises `VglannError` for videos of another dtype or size, and when the loss needs weights that are missing.
        """
        starts, steps = whole("starts", starts, 1, MAX_VIDEOS), whole("steps", steps, 1, MAX_VIDEOS)
        # A copy, since PyTorch takes no array that is read-only or has negative strides.
        array = np.array(Videos(videos), order="C", copy=True)
        if not len(array):
            raise VglannError("videos: there are none; give at least one")
        with self._computing():
            return invert(with_own_statistics(self._trained), array, starts=starts, steps=steps).latents

    def fit_mapping(
        self, kind: str = "imle", *, preset: PresetName | None = None, seed: int = 0, **options: Any
    ) -> Path:
        """Fit a mapping from noise to the latents and store it, as `vglann map RUN --kind KIND` does.

        An earlier mapping of that kind is replaced, and the call is noted in history.jsonl for `vglann replay`.

        Args:
            kind: "imle", "vae", "gmm", "gaussian", "flow", "autoregressive", "drifting" or "flow-matching".
            preset: preset of the options that are not given. Default: the preset of the run.
            seed: seed of the fit, 0 to below 2^63.
            options: options of `vglann map` with underscores, e.g. epochs=50, holdout_fraction=0.1.

        Returns:
            The folder mapping/<kind>; its mapping.json has the losses by epoch, and distances to held-out latents.

        Raises `VglannError` for an unknown kind, an option it does not have, with the nearest name, a bad value, or
        a run that is being written by another process or thread.
        """
        seed = checked_seed(seed)
        chosen = self.mapping_options(kind, preset, options)
        run = RunDir.open(self.path)
        with self._computing(), joined(self.device) as ranks, run.locked(ranks.rank):
            folder = fit_mapping(self.path, kind, chosen, seed=seed, device=self.device, ranks=ranks)
            if ranks.rank == 0:
                call = {"kind": kind, "preset": preset, "seed": seed, "kernels": self.kernels}
                given = {name: getattr(chosen, name) for name in options}
                run.logs.remember("map", {**call, "device": str(self.device), **given})
        warn(run.warnings)
        return folder

    def mapping_options(self, kind: str, preset: str | None, options: dict[str, Any]) -> MapOptions:
        """Return the options with which `fit_mapping` fits. Raises `VglannError` for them as it does."""
        presets = preset_named(preset or self._record["preset"]).map
        known = [field.name for defaults in presets.values() for field in fields(defaults)]
        check_names(options, [*known, "kind", "preset", "seed"], "map")
        return map_options(presets, kind, typed(options, presets[kind]) if kind in presets else {})

    def evaluate(
        self,
        *,
        kinds: str | Iterable[str] = (),
        features: str | Iterable[str] = FEATURES,
        n: int | None = None,
        invert: int = 8,
        seed: int = 0,
    ) -> Evaluation:
        """Measure reconstruction and generation against held-out clips, as `vglann evaluate RUN` does.

        Args:
            kinds: mappings to sample from. Default: all that are fitted.
            features: networks whose features are compared: "transnetv2", "lite0", "lite0-step", "i3d" (FVD),
                "i3d-16"; () for none. Their weights must have been imported.
            n: videos on each side. Default: all held-out clips, at most 2,048.
            invert: held-out clips to find latents for, 0 for none.
            seed: seed of the noise, 0 to below 2^63.

        Returns:
            `folder`, the evaluation/ of the run; `records` by name, as in its JSON files (PSNR in dB, distances as
            `vglann_fast/metrics/record.py` says); `warnings`, which are logged too.

        Raises `VglannError` for a mapping or weights that are missing, too few clips or frames, or a run that another
        process or thread is writing to.
        """
        seed, invert = checked_seed(seed), whole("invert", invert, 0, MAX_VIDEOS)
        run = RunDir.open(self.path)
        with self._computing(), joined(self.device, PATIENCE) as ranks, run.locked(ranks.rank):
            result = evaluate_run(
                self.path,
                kinds=words(kinds),
                features=words(features),
                n=n,
                invert=invert,
                seed=seed,
                device=self.device,
                ranks=ranks,
            )
        warn([*result.warnings, *doubts(result.records)])
        return result

    def report(self) -> Path:
        """Write the page report/index.html from what the folder holds, and return its path.

        It shows the videos that `vglann reconstruct`, `sample` and `interpolate` wrote. Raises `VglannError` when
        jinja2, matplotlib or OpenCV is not installed, or the disk is full.
        """
        with self._computing():
            return write_report(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, device={str(self.device)!r})"

    def _repr_html_(self) -> str:
        """Return what the run is, in a line, and some of its reconstructions as an inline GIF."""
        try:
            ids, mappings = self.ids, ", ".join(self.mappings) or "none"
            facts = f"{len(ids)} clips, {self.step} steps, mappings: {mappings}"
            shown = ids[:: -(-len(ids) // _SHOWN)]
            picture = gif_html(np.asarray(self.reconstruct(shown)))
        except VglannError as error:  # no checkpoint, or no PyAV
            picture, facts = "", html.escape(str(error))
        return f"<b>{html.escape(str(self.path))}</b>: {facts}<br>{picture}"

    @cached_property
    def _trained(self) -> Trained:
        run = RunDir.open(self.path)
        with self._computing():
            trained = load_trained(run, self.device)
        warn(run.warnings)
        return trained

    def _computing(self) -> AbstractContextManager[None]:
        return computing(self.device, self.kernels)

    def _kind(self, kind: str | None) -> str:
        """Return the mapping to sample from. Raises `VglannError` where none is fitted or the choice is open."""
        fitted = self.mappings
        if kind is not None:
            return kind
        if not fitted:
            advice = f"fit one with Run.fit_mapping() or `vglann map {self.path}`"
            raise VglannError(f"{self.path} has no mapping to sample from; {advice}")
        if "imle" not in fitted and len(fitted) > 1:
            raise VglannError(f"kind: {self.path} has several mappings; choose one of {', '.join(fitted)}")
        return "imle" if "imle" in fitted else fitted[0]


def warn(lines: Iterable[str]) -> None:
    """Log each line as a warning."""
    for line in lines:
        log.warning("%s", line)


def load(path: str | Path, *, device: str | torch.device | None = None, kernels: str | None = None) -> Run:
    """Load a run from its folder: the generator and the latents of its newest checkpoint.

    Args:
        path: run folder.
        device: "cpu", "cuda" or "cuda:N". Default: "cuda" if there is a GPU, else "cpu".
        kernels: "auto", "triton" or "reference", with exceptions such as "reference,nearest=faiss".

    Raises `VglannError` for a file, a folder that is not a run, a run of a newer version or without a checkpoint, and
    a device or kernels that cannot be used on this machine.
    """
    run = Run(path, device=device, kernels=kernels)
    _ = run.generator
    return run


def evaluate(
    run: Run | str | Path,
    *,
    kinds: str | Iterable[str] = (),
    features: str | Iterable[str] = FEATURES,
    n: int | None = None,
    invert: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Measure a run, or the run in a folder; see `Run.evaluate`."""
    run = run if isinstance(run, Run) else Run(run)
    return run.evaluate(kinds=kinds, features=features, n=n, invert=invert, seed=seed)
