"""Quality of the clips a generator reproduces from latents: its training clips, and clips it has not seen."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vglann_kernels import laplacian_pyramid_loss

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.of_run import check_same_clips
from vglann_fast.clips.pixels import psnr, to_range
from vglann_fast.glo.checkpoint import Trained, load_trained
from vglann_fast.metrics.baselines import (
    PrincipalComponents,
    fit_pca,
    is_exact,
    motion_r2,
    motion_sums,
    nearest_psnr,
    pca_quality,
    still_psnr,
)
from vglann_fast.metrics.record import verdict
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.numerics import numerics
from vglann_fast.samples.invert import invert
from vglann_fast.samples.sample import (
    RenderedVideos,
    open_clips,
    render,
    render_training_clips,
    training_batches,
)
from vglann_fast.samples.write import write_videos

SHOWN = 24  # clips whose videos are kept
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM
_SUMS = ("motion_error", "motion_energy", "motion_error_pca")  # measures that are summed, not averaged


@numerics(tf32=False)
def reconstruct(run_path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Path, dict[str, Any]]:
    """Regenerate every training clip of a run, measure, and write media/reconstruction.

    BatchNorm is in the run's own mode for sampling. Measurement on all clips, as uint8, over all frames; kept are
    the videos of up to 24 clips, evenly spaced. Returns the folder and what reconstruction.json holds.
    """
    run = RunDir.open(run_path)
    trained, clips = load_trained(run, device), open_clips(run)
    check_same_clips(trained.ids, clips.ids)
    pca = training_pca(trained, clips)
    shown = np.unique(np.linspace(0, len(clips) - 1, min(SHOWN, len(clips))).round().astype(int))
    measures: list[dict[str, Tensor]] = []
    kept: list[RenderedVideos] = []
    measured: list[np.ndarray] = []
    for rows, made, real in _reconstructed(trained, clips, training_batches(trained)):
        measured.append(rows)
        measures.append(_measured(made.video, real, pca))
        local = np.flatnonzero(np.isin(rows, shown))
        kept.append(
            RenderedVideos(
                made.video[local], made.foreground[local], made.mask[local], made.background[local]
            )
        )
    order = np.argsort(np.concatenate(measured))  # as the clips lie
    per_clip = {name: torch.cat([m[name] for m in measures])[order] for name in measures[0]}
    per_clip["motion_r2"] = 1 - per_clip["motion_error"] / per_clip["motion_energy"]
    place = np.argsort([row for rows in measured for row in rows[np.isin(rows, shown)]])
    record = {
        "split": "train",
        "step": trained.step,
        "batchnorm": trained.options.batchnorm,
        **_training_quality(measures, trained, pca),
        "shown": [clips.ids[row] for row in shown],
        "per_clip": {
            "id": clips.ids,
            **{name: values.tolist() for name, values in per_clip.items() if name not in _SUMS},
        },
    }
    folder = write_videos(
        run.path / "media" / "reconstruction",
        np.concatenate([k.video for k in kept])[place],
        original=clips.read(shown),
        foreground=np.concatenate([k.foreground for k in kept])[place],
        mask=np.concatenate([k.mask for k in kept])[place],
        background=np.concatenate([k.background for k in kept])[place],
        records={"reconstruction": record},
    )
    return folder, record


def describe(record: dict[str, Any]) -> str:
    """Describe what `reconstruct` measured: quality, baselines, motion, and a sentence if a baseline is better."""
    exact = f"exact by construction for at most {record['pca_components'] + 1} clips"
    pca = exact if record["pca_exact"] else f"{record['psnr_pca']:.2f} dB"
    moving = record["clips"] - record["still_clips"]
    motion = f"{record['motion_r2']:.2f} (median {record['motion_r2_median']:.2f}, {moving} clips that move)"
    below = verdict(record)
    lines = [
        f"reconstruction PSNR {record['psnr']:.2f} dB over {record['clips']} clips",
        f"baselines: mean color {record['psnr_mean_color']:.2f} dB, mean frame (a still) "
        f"{record['psnr_still']:.2f} dB, PCA with {record['pca_components']} components {pca}",
        f"motion R² {motion if moving else 'undefined: no clip moves'}",
        *([f"{below} Train longer, or on fewer clips."] if below else []),
    ]
    return "\n".join(lines)


def training_pca(trained: Trained, clips: ClipSet) -> PrincipalComponents | None:
    """Fit as many components to the training clips as a latent has numbers; None where that is exact."""
    if is_exact(len(clips), trained.options.latent_dim):
        return None
    return fit_pca(clips, trained.options.latent_dim, trained.latents.device)


def reconstruction_quality(
    trained: Trained,
    clips: ClipSet,
    pca: PrincipalComponents | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Means of `reconstruction_metrics` and baselines over the training clips, see `means_of`.

    pca: of `training_pca`. ranks: the processes that share the work. Raises `VglannError` when `clips` are not the
    clips of the training.
    """
    check_same_clips(trained.ids, clips.ids)
    ranks = ranks or Ranks()
    share = ranks.share(training_batches(trained))
    own = [_measured(made.video, real, pca) for _, made, real in _reconstructed(trained, clips, share)]
    return _training_quality(ranks.gather_shares(own), trained, pca)


def inversion_quality(
    trained: Trained,
    clips: np.ndarray,
    training: ClipSet,
    pca: PrincipalComponents | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The same of clips the generator has not seen, uint8 [n, 3, T, H, W], from the latents `invert` finds.

    There "psnr_nearest" is the PSNR of the nearest of the `training` clips.
    """
    ranks = ranks or Ranks()
    share, device = clips[ranks.rank :: ranks.size], trained.latents.device
    latents = invert(trained, share, shown=ranks.rank == 0).latents.cpu()
    nearest = nearest_psnr(share, training, device)
    # In one batch everywhere, as one process would: batches of another size are rounded in another way.
    made = render(trained, ranks.gather_rows(latents, len(clips)).to(device))
    measures = _measured(made.video, clips, pca)
    measures["psnr_nearest"] = ranks.gather_rows(nearest, len(clips))
    return {
        **means_of([measures]),
        "pca_components": 0 if pca is None else pca.components,
        "pca_exact": False,
    }


def _measured(made: np.ndarray, real: np.ndarray, pca: PrincipalComponents | None) -> dict[str, Tensor]:
    measures = reconstruction_metrics(torch.from_numpy(made), torch.from_numpy(real))
    return measures if pca is None else {**measures, **pca_quality(pca, real)}


def _training_quality(
    measures: list[dict[str, Tensor]], trained: Trained, pca: PrincipalComponents | None
) -> dict[str, Any]:
    components = trained.options.latent_dim if pca is None else pca.components
    return {**means_of(measures), "pca_components": components, "pca_exact": pca is None}


def means_of(measures: list[dict[str, Tensor]]) -> dict[str, Any]:
    """{"clips": how many, and of batches of `reconstruction_metrics` the mean of each measure over all clips}.

    In place of the motion sums there is `motion_r2`, and with a PCA "motion_r2_pca". "psnr_still" and
    "psnr_over_still", by how much the model is above it, are over the clips that move.
    """
    values = {name: torch.cat([m[name] for m in measures]) for name in measures[0]}
    moves = values["motion_energy"] > 0
    found: dict[str, Any] = {"clips": len(moves)}
    found |= {name: v.mean().item() for name, v in values.items() if name not in _SUMS}
    found["psnr_still"] = values["psnr_still"][moves].mean().item()
    found["psnr_over_still"] = (values["psnr"] - values["psnr_still"])[moves].mean().item()
    found |= motion_r2(values["motion_error"], values["motion_energy"])
    if "motion_error_pca" in values:
        found["motion_r2_pca"] = motion_r2(values["motion_error_pca"], values["motion_energy"])["motion_r2"]
    return found


def reconstruction_metrics(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Measures of each clip, float64 [n]; uint8 [n, 3, T, H, W] against uint8 of that shape.

    psnr              of the clip, in dB
    psnr_mean_color   baseline: the clip's own mean color in every pixel
    psnr_still        baseline: the clip's own mean frame for all of its frames; infinite if the clip does not move
    psnr_last_frame   of the last frame alone
    ssim              mean over frames and colors, -1 to 1 (see `ssim`); left out for sides under 11
    l1                mean absolute difference, in 1/255
    laplacian         Laplacian pyramid loss with 3 bands, binomial blur and range [-1, 1], whatever the run's own
    motion_error, motion_energy    see `baselines.motion_sums`
    """
    color = real.double().mean((2, 3, 4), keepdim=True).expand(real.shape)
    pyramid = laplacian_pyramid_loss(to_range(made, torch.float32, (-1.0, 1.0)), real, reduction="none")
    return {
        "psnr": psnr(made, real),
        "psnr_mean_color": psnr(color, real),
        "psnr_still": still_psnr(real),
        "psnr_last_frame": psnr(made[:, :, -1], real[:, :, -1]),
        **({"ssim": ssim(made, real)} if min(made.shape[-2:]) >= WINDOW else {}),
        "l1": (made.double() - real.double()).abs().flatten(1).mean(1),
        "laplacian": pyramid.double().flatten(1).mean(1),
        **motion_sums(made, real),
    }


def ssim(made: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of uint8 clips [n, 3, T, H, W], sides of at least 11, a frame and color at a time.

    Wang, Bovik, Sheikh and Simoncelli 2004: Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, range
    255, biased variances, only windows that lie inside the frame. Returns float64 [n], the mean over windows,
    frames and the three colors. The same as scikit-image's with gaussian_weights and use_sample_covariance=False.
    """
    return torch.stack([_ssim_of_planes(*pair) for pair in zip(made, real, strict=True)])


def _ssim_of_planes(made: Tensor, real: Tensor) -> Tensor:
    """Mean SSIM of the planes [..., H, W] of one clip."""
    height, width = made.shape[-2:]
    down, across = _windows(height, made.device), _windows(width, made.device).T
    x, y = made.double().reshape(-1, height, width), real.double().reshape(-1, height, width)
    # Products with banded matrices: for planes as small as these much quicker than a float64 convolution.
    mx, my, xx, yy, xy = (down @ planes @ across for planes in (x, y, x * x, y * y, x * y))
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean()


def _windows(size: int, device: torch.device) -> Tensor:
    """float64 [size - 10, size]: row i weighs the places i to i + 10 by a Gaussian of sum 1."""
    offsets = torch.arange(size)[None, :] - torch.arange(size - WINDOW + 1)[:, None] - WINDOW // 2
    weights = torch.exp(-offsets.double().square() / (2 * SIGMA**2)) * (offsets.abs() <= WINDOW // 2)
    return (weights / weights.sum(1, keepdim=True)).to(device)


def _reconstructed(
    trained: Trained, clips: ClipSet, batches: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, RenderedVideos, np.ndarray]]:
    """(rows, what their latents decode to, the clips uint8 (b, 3, T, H, W)) of each batch of rows."""
    for rows in batches:
        yield rows, render_training_clips(trained, rows), clips.read(rows)
