"""How well the generator reproduces its training clips from their latents."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vglann_fast.glo.checkpoint import check_same_clips, load_trained
from vglann_fast.glo.losses import psnr
from vglann_fast.run_dir import RunDir
from vglann_fast.samples.sample import Rendered, open_clips, render
from vglann_fast.samples.write import write_videos

SHOWN = 24  # clips whose videos are kept


def reconstruct(run_path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Path, dict[str, Any]]:
    """Regenerate every training clip of a run, measure, and write media/reconstruction.

    BatchNorm is in the run's own mode for sampling. Measured on all clips, as uint8, over all frames; kept are
    the videos of up to 24 clips, evenly spaced. Returns the folder and what reconstruction.json holds.
    """
    run = RunDir.open(run_path)
    trained, clips = load_trained(run, device), open_clips(run)
    check_same_clips(trained.ids, clips.ids)
    shown = np.unique(np.linspace(0, len(clips) - 1, min(SHOWN, len(clips))).round().astype(int))
    batch_size = trained.options.batch_size
    measures: list[dict[str, Tensor]] = []
    kept: list[Rendered] = []
    for rows in np.array_split(np.arange(len(clips)), -(-len(clips) // batch_size)):
        made = render(trained, trained.latents[torch.from_numpy(rows).to(trained.latents.device)])
        measures.append(
            reconstruction_metrics(torch.from_numpy(made.video), torch.from_numpy(clips.read(rows)))
        )
        local = np.flatnonzero(np.isin(rows, shown))
        kept.append(
            Rendered(made.video[local], made.foreground[local], made.mask[local], made.background[local])
        )
    per_clip = {name: torch.cat([m[name] for m in measures]) for name in measures[0]}
    record = {
        "clips": len(clips),
        "split": "train",
        "step": trained.step,
        "batchnorm": trained.options.batchnorm,
        **{name: values.mean().item() for name, values in per_clip.items()},
        "shown": [clips.ids[row] for row in shown],
        "per_clip": {"id": clips.ids, **{name: values.tolist() for name, values in per_clip.items()}},
    }
    folder = write_videos(
        run.path / "media" / "reconstruction",
        np.concatenate([k.video for k in kept]),
        original=clips.read(shown),
        foreground=np.concatenate([k.foreground for k in kept]),
        mask=np.concatenate([k.mask for k in kept]),
        background=np.concatenate([k.background for k in kept]),
        records={"reconstruction": record},
    )
    return folder, record


def reconstruction_metrics(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Measures of each clip, float64 [n]; uint8 [n, 3, T, H, W] against uint8 of that shape.

    psnr              of the clip, in dB
    psnr_mean_colour  of the clip's own mean colour in place of the reconstruction: what no network is worth
    psnr_last_frame   of the last frame alone
    l1                mean absolute difference, in 1/255
    """
    colour = real.double().mean((2, 3, 4), keepdim=True).expand(real.shape)
    return {
        "psnr": psnr(made, real),
        "psnr_mean_colour": psnr(colour, real),
        "psnr_last_frame": psnr(made[:, :, -1], real[:, :, -1]),
        "l1": (made.double() - real.double()).abs().flatten(1).mean(1),
    }
