"""Preset `paper` takes the author's training steps: the author's recorded run, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import vglann_kernels.laplacian.reference as laplacian_reference
from four_clips import FourClips
from golden_data import author_generator_state, golden, normal, normal64, relative_l2, uniform

from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.loader import Batch
from vglann_fast.interop.glann_video import load_generator
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir


def blurred_as_recorded(planes, terms):
    """The author's kernel was rounded to float32 before the float64 run; Adam amplifies 3e-8 to 1 % in six steps."""
    kernel = golden("lap_kernels")["kernel_size5_sigma2"][:1].to(planes)
    assert abs(kernel.sum().item() - sum(sum(column) * sum(row) for column, row in terms)) < 1e-7
    return F.conv2d(F.pad(planes[:, None], (2, 2, 2, 2), mode="replicate"), kernel)[:, 0]


@pytest.fixture(scope="module")
def author_run(tmp_path_factory):
    """Six steps over three epochs: (training, losses, latents after each epoch, the recording)."""
    expected = golden("glo_train_lap")
    # The author's recording halves the rates every second epoch: a tenth of 20.
    options = replace(PRESETS["paper"].train, batch_size=2, epochs=20, lr_latents=0.01, lr_generator=0.001)
    run = RunDir(tmp_path_factory.mktemp("run"), {})
    training = new_training(FourClips(), options, run, dtype=torch.float64)
    training.generator.load_state_dict(load_generator(author_generator_state("orig", gain=1.4)).state_dict())
    training.latents.rows.copy_(normal("glo.Z0", (4, 100), std=0.01))
    videos = uniform("glo.videos", (4, 32, 3, 64, 64)).double().transpose(1, 2)  # [N, C, T, H, W]
    losses, latents = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laplacian_reference, "blurred", blurred_as_recorded)
        for epoch in range(3):
            training.begin_epoch(epoch)
            for rows in expected[f"ep{epoch}.perm"].split(2):
                batch = Batch(videos[rows], torch.arange(len(rows)), rows)
                losses.append(training.update([batch], False)[0])
            training.latents.end_epoch()
            latents.append(training.latents.rows.clone())
    return training, torch.stack(losses), latents, expected


def test_losses(author_run):
    _, losses, _, expected = author_run
    assert torch.allclose(losses, expected["losses"], rtol=1e-9, atol=0)


def test_latents_after_each_epoch(author_run):
    _, _, latents, expected = author_run
    for epoch in range(3):
        assert relative_l2(latents[epoch], expected[f"ep{epoch}.Z"]) < 1e-6


def test_generator_at_the_end(author_run):
    training, _, _, expected = author_run
    weight = training.generator.video.conv2.weight.detach()
    probe = torch.from_numpy(normal64("glo.probe.video.conv2.weight", tuple(weight.shape)))
    found = torch.stack([weight.sum(), weight.norm(), (weight * probe).sum()])
    assert torch.allclose(found, expected["ep2.G.video.conv2.weight"], rtol=1e-6, atol=1e-6)


def test_final_videos(author_run):
    training, _, latents, expected = author_run
    training.generator.eval()
    with torch.no_grad():
        videos = training.generator(latents[-1])
    frames = videos[:, :, [0, 16, 31]]
    recorded = expected["final_eval.frames_0_16_31"].double()
    if recorded.shape != frames.shape:
        recorded = recorded.transpose(1, 2)
    assert relative_l2(frames, recorded) < 1e-6
