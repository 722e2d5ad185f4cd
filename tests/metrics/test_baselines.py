"""baselines.py: motion R^2 by hand, PCA against an exact SVD, and what a model below a baseline is told."""

import math

import numpy as np
import pytest
import torch

from vglann_fast.clips.pixels import psnr
from vglann_fast.experiments.moving_squares import moving_squares
from vglann_fast.metrics.baselines import (
    BLOCK,
    fit_pca,
    is_exact,
    motion_r2,
    motion_sums,
    nearest_psnr,
    pca_quality,
    still_psnr,
)
from vglann_fast.metrics.reconstruction import describe, means_of, reconstruction_metrics
from vglann_fast.metrics.record import verdict


class CountedClips:
    """Clips in memory that behave as a ClipSet and remember how many were read at a time."""

    def __init__(self, clips):
        self.clips = clips
        self.frames, self.size = clips.shape[2], clips.shape[-1]
        self.read_at_a_time = []

    def __len__(self):
        return len(self.clips)

    def read(self, rows=None):
        chosen = self.clips[slice(None) if rows is None else rows]
        self.read_at_a_time.append(len(chosen))
        return chosen


def random_clips(count, frames=4, size=4, rank=None, seed=0):
    """Clips whose variances fall off slowly along `rank` directions, as the variances of videos do."""
    rng = np.random.default_rng(seed)
    length = 3 * frames * size * size
    rank = rank or length
    spread = 60 / np.sqrt(1 + np.arange(rank))
    values = rng.normal(size=(count, rank)) * spread @ rng.normal(size=(rank, length)) / np.sqrt(rank)
    return np.clip(values + 128, 0, 255).round().astype(np.uint8).reshape(count, 3, frames, size, size)


def motion_by_loops(made, real):
    """(1 - pooled ratio, ratio of each clip that moves, clips that do not), value by value."""
    errors, energies = [], []
    for y, x in zip(made.astype(np.float64), real.astype(np.float64), strict=True):
        error = energy = 0.0
        for c in range(x.shape[0]):
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    x_mean, y_mean = np.mean(x[c, :, i, j]), np.mean(y[c, :, i, j])
                    for t in range(x.shape[1]):
                        deviation = x[c, t, i, j] - x_mean
                        error += (deviation - (y[c, t, i, j] - y_mean)) ** 2
                        energy += deviation**2
        errors.append(error)
        energies.append(energy)
    moving = [(e, n) for e, n in zip(errors, energies, strict=True) if n > 0]
    pooled = 1 - sum(e for e, _ in moving) / sum(n for _, n in moving)
    return pooled, [1 - e / n for e, n in moving], len(errors) - len(moving)


def test_motion_r2_is_the_double_loop():
    real, made = random_clips(5, seed=1), random_clips(5, seed=2)
    real[3] = real[3, :, :1]  # it does not move
    found = motion_r2(*motion_sums(torch.from_numpy(made), torch.from_numpy(real)).values())
    pooled, by_clip, still = motion_by_loops(made, real)
    assert found["motion_r2"] == pytest.approx(pooled, rel=1e-12)
    assert found["motion_r2_median"] == pytest.approx(np.median(by_clip), rel=1e-12)
    assert found["still_clips"] == still == 1


def test_motion_r2_of_a_still_is_zero_and_of_the_clip_itself_one():
    real = torch.from_numpy(moving_squares(3, frames=16))
    still = real[:, :, :1].expand_as(real)
    assert motion_r2(*motion_sums(still, real).values())["motion_r2"] == pytest.approx(0, abs=1e-12)
    brighter = (real // 2 + 60).to(torch.uint8)
    assert motion_r2(*motion_sums(real, real).values())["motion_r2"] == 1
    assert motion_r2(*motion_sums(brighter, real).values())["motion_r2"] == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("frames", [16, 48])
def test_clips_that_are_all_still_have_no_motion_to_measure(frames):
    real = torch.from_numpy(random_clips(2, frames=1, size=8)).expand(-1, -1, frames, -1, -1)
    assert motion_sums(real, real)["motion_energy"].tolist() == [0, 0]
    found = means_of([reconstruction_metrics(torch.zeros_like(real), real)])
    assert found["still_clips"] == 2
    assert math.isnan(found["motion_r2"])
    assert math.isnan(found["motion_r2_median"])
    record = {**found, "pca_components": 100, "pca_exact": True}
    assert verdict(record) == ""
    assert "no clip moves" in describe(record)


def test_the_still_is_the_mean_frame_by_hand():
    real = random_clips(2, seed=3)
    expected = []
    for clip in real.astype(np.float64):
        error = np.mean([(frame - clip.mean(1)) ** 2 for frame in clip.transpose(1, 0, 2, 3)])
        expected.append(10 * math.log10(255**2 / error))
    assert still_psnr(torch.from_numpy(real)).tolist() == pytest.approx(expected, rel=1e-12)


def exact_pca(train, clips, components):
    """Project clips on the components of an exact SVD, as uint8."""
    rows = train.reshape(len(train), -1).astype(np.float64)
    mean = rows.mean(0)
    directions = np.linalg.svd(rows - mean, full_matrices=False)[2][:components]
    kept = (clips.reshape(len(clips), -1) - mean) @ directions.T @ directions + mean
    return kept.round().clip(0, 255).astype(np.uint8).reshape(clips.shape)


@pytest.mark.parametrize(("count", "components"), [(60, 12), (300, 30), (300, 100), (130, 1)])
def test_pca_is_within_a_twentieth_of_a_decibel_of_an_exact_svd(count, components):
    train, other = random_clips(count), random_clips(20, seed=9)
    pca = fit_pca(CountedClips(train), components)
    assert pca.components == components
    torch.testing.assert_close(pca.directions.T @ pca.directions, torch.eye(components), atol=1e-4, rtol=0)
    for clips in (train, other):
        expected = psnr(torch.from_numpy(exact_pca(train, clips, components)), torch.from_numpy(clips))
        found = pca_quality(pca, clips)
        assert found["psnr_pca"].mean().item() == pytest.approx(expected.mean().item(), abs=0.05)
        by_hand = motion_by_loops(pca.project(clips).numpy(), clips)[0]
        sums = found["motion_error_pca"], motion_sums(torch.from_numpy(clips), torch.from_numpy(clips))
        assert motion_r2(sums[0], sums[1]["motion_energy"])["motion_r2"] == pytest.approx(by_hand, rel=1e-9)


def test_pca_reads_a_block_of_clips_at_a_time():
    clips = CountedClips(random_clips(5 * BLOCK + 3, frames=1))
    fit_pca(clips, 3)
    assert max(clips.read_at_a_time) == BLOCK
    assert sum(clips.read_at_a_time) % len(clips) == 0


def test_pca_is_exact_by_construction_up_to_one_clip_more_than_components():
    clips = random_clips(9)
    for components in (7, 8, 9):
        kept = fit_pca(CountedClips(clips), components).project(clips).numpy()
        assert np.array_equal(kept, clips) == is_exact(9, components), components


def test_the_nearest_training_clip_by_hand():
    train, clips = random_clips(70, seed=4), random_clips(3, seed=5)
    errors = [min(((a.astype(float) - b.astype(float)) ** 2).mean() for b in train) for a in clips]
    expected = [10 * math.log10(255**2 / error) for error in errors]
    assert nearest_psnr(clips, CountedClips(train)).tolist() == pytest.approx(expected, rel=1e-9)


def quality(**changes):
    return {"psnr": 20.0, "psnr_still": 19.0, "psnr_over_still": 1.0, "psnr_pca": 18.0} | changes


def test_a_model_below_a_baseline_is_told_so_in_one_sentence():
    assert verdict(quality()) == ""
    below_still = verdict(quality(psnr_still=24.2, psnr_over_still=-4.2))
    assert "a still" in below_still
    assert "24.20 dB" in below_still
    assert "PCA" not in below_still
    both = verdict(
        quality(psnr_still=24.2, psnr_over_still=-4.2, psnr_pca=25.3, pca_components=100),
    )
    assert "a still" in both
    assert "PCA with 100 components (25.30 dB)" in both
    assert both.count(".") == 3  # one sentence with two numbers


def test_no_verdict_is_given_about_a_pca_that_is_exact_by_construction():
    assert verdict(quality(psnr_pca=None, pca_exact=True)) == ""


@pytest.mark.parametrize("value", [None, "x", [], {}, True, math.nan])
def test_a_verdict_passes_over_what_is_not_a_number(value):
    assert verdict(dict.fromkeys(quality(), value)) == ""


def test_means_leave_out_clips_that_do_not_move_only_where_the_still_counts():
    real = torch.from_numpy(random_clips(3, size=8))
    real[1] = real[1, :, :1]
    made = torch.from_numpy(random_clips(3, size=8, seed=1))
    parts = [reconstruction_metrics(made[:1], real[:1]), reconstruction_metrics(made[1:], real[1:])]
    found, still = means_of(parts), still_psnr(real)[[0, 2]]
    assert found["clips"] == 3
    assert found["psnr"] == pytest.approx(psnr(made, real).mean().item())
    assert found["psnr_still"] == pytest.approx(still.mean().item())
    expected = (psnr(made, real)[[0, 2]] - still).mean().item()
    assert found["psnr_over_still"] == pytest.approx(expected)
