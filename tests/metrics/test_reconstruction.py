"""reconstruction.py: measures of a clip against its reconstruction, by hand and against other programs."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import psnr
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.train import train
from vglann_fast.metrics import reconstruction
from vglann_fast.metrics.reconstruction import (
    describe,
    inversion_quality,
    reconstruct,
    reconstruction_metrics,
    reconstruction_quality,
    ssim,
)
from vglann_fast.samples.invert import invert
from vglann_fast.samples.sample import render


def flat(value, frames=4, size=16):
    return torch.full((1, 3, frames, size, size), value, dtype=torch.uint8)


def test_by_hand():
    made, real = flat(110), flat(100)
    made[:, :, -1] = 104
    found = {name: values.item() for name, values in reconstruction_metrics(made, real).items()}
    error = (3 * 10**2 + 4**2) / 4
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / error))
    assert found["psnr_last_frame"] == pytest.approx(10 * math.log10(255**2 / 16))
    assert found["l1"] == pytest.approx((3 * 10 + 4) / 4)
    # Flat pictures have no bands: only the residual differs, by 2/255 for each step of 8 bits.
    assert found["laplacian"] == pytest.approx(found["l1"] * 2 / 255, rel=1e-5)
    # Without variance SSIM is its luminance term.
    c1 = (0.01 * 255) ** 2
    terms = [(2 * 100 * v + c1) / (100**2 + v**2 + c1) for v in (110, 110, 110, 104)]
    assert found["ssim"] == pytest.approx(np.mean(terms), rel=1e-12)
    assert found["psnr_mean_color"] == found["psnr_still"] == math.inf
    assert found["motion_energy"] == 0
    assert found["motion_error"] == pytest.approx(3 * 16**2 * (3 * 1.5**2 + 4.5**2))


def test_ssim_as_scikit_image_has_it():
    """Values of skimage.metrics.structural_similarity 0.26.0: data_range=255, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, the mean over frames and colors."""
    clips = torch.from_numpy(moving_squares(3))
    assert ssim(clips[:1], clips[1:2]).item() == pytest.approx(0.4146356864554385, rel=1e-9)
    expected = [0.8927086024465062, 0.9001111380146775, 0.8881433910368247]
    np.testing.assert_allclose(ssim(clips.roll(1, 3), clips).numpy(), expected, rtol=1e-9)


def test_ssim_of_equal_and_of_inverted_clips():
    clips = torch.from_numpy(moving_squares(2, frames=16))
    assert ssim(clips, clips).tolist() == pytest.approx([1, 1])
    assert (ssim(255 - clips, clips) < 0.6).all()


def test_ssim_is_left_out_where_its_window_does_not_fit():
    small = flat(3, size=8)
    assert "ssim" not in reconstruction_metrics(small, small)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruction")
    clips = write_clip_folder(folder / "clips", moving_squares(7))
    run = new_run(folder / "run", clips, tiny_options())
    train(ClipSet.open(clips, "train"), run)
    return run


def test_quality_is_the_mean_of_what_reconstruct_measures(run):
    quality = reconstruction_quality(load_trained(run), ClipSet.open(run.options["clips"], "train"))
    record = reconstruct(run.path)[1]
    assert quality["clips"] == 7
    for name in ("psnr", "psnr_last_frame", "ssim", "l1", "laplacian", "psnr_still"):
        assert quality[name] == pytest.approx(np.mean(record["per_clip"][name]), rel=1e-9)
        assert record[name] == pytest.approx(quality[name], rel=1e-9)


def test_inversion_beats_the_latents_of_other_clips(run, monkeypatch):
    monkeypatch.setattr(reconstruction, "invert", partial(invert, starts=2, steps=60))
    clips = moving_squares(2, seed=5)
    quality = inversion_quality(load_trained(run), clips, ClipSet.open(run.options["clips"], "train"))
    assert quality["clips"] == 2
    trained = load_trained(run)
    others = torch.from_numpy(render(trained, trained.latents[:2]).video)
    assert quality["psnr"] > reconstruction_metrics(others, torch.from_numpy(clips))["psnr"].mean().item()


def test_clips_of_another_training_are_refused(run, tmp_path):
    other = ClipSet.open(write_clip_folder(tmp_path / "other", moving_squares(7, seed=3)))
    with pytest.raises(VglannError, match="missing"):
        reconstruction_quality(load_trained(run), other)


def test_every_clip_keeps_its_place(run):
    """Batches take every k-th clip; measures and videos are still in the order of the clips."""
    folder, record = reconstruct(run.path)
    videos, originals = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("video", "original"))
    assert record["shown"] == record["per_clip"]["id"]
    assert len(videos) > load_trained(run).options.batch_size
    assert psnr(videos, originals).tolist() == pytest.approx(record["per_clip"]["psnr"])


def test_reconstruct_says_what_the_baselines_reach(run, capsys):
    """Seven clips and eight numbers a latent: PCA is exact, and the report of a few steps is below the still."""
    assert main(["reconstruct", str(run.path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "exact by construction" in said
    assert "motion R²" in said
    assert "worse than a still" in said
    assert "worse than PCA" not in said


def test_with_more_clips_than_components_pca_is_fitted(tmp_path):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(7))
    run = new_run(tmp_path / "run", clips, tiny_options(latent_dim=3))
    train(ClipSet.open(clips, "train"), run)
    record = reconstruct(run.path)[1]
    assert record["pca_components"] == 3
    assert record["pca_exact"] is False
    assert record["psnr_pca"] == pytest.approx(np.mean(record["per_clip"]["psnr_pca"]))
    assert 0 < record["motion_r2_pca"] < 1
    assert record["still_clips"] == 0
    assert f"{record['psnr_pca']:.2f} dB" in describe(record)
