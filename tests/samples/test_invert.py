"""invert.py: latents of clips the generator has not seen."""

import json

import numpy as np
import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.pixels import psnr
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.train import train
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.invert import invert
from vglann_fast.samples.sample import great_circle, render


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that knows its 12 clips a little."""
    folder = tmp_path_factory.mktemp("invert")
    clips = write_clip_folder(folder / "clips", moving_squares(12))
    options = tiny_options(epochs=20, width=8, lr_generator=0.005, batch_size=4)
    run = new_run(folder / "run", clips, options)
    from vglann_fast.clips.dataset import ClipSet

    train(ClipSet.open(clips, "train"), run)
    return run


def test_latents_of_its_own_videos_come_back(run):
    trained = load_trained(run)
    latents = torch.cat([great_circle(*trained.latents[[i, i + 5]], 3)[1:2] for i in range(2)])
    videos = render(trained, latents).video
    found = invert(trained, videos, starts=3, steps=50)
    assert found.psnr.min() > 34
    torch.testing.assert_close(found.latents.norm(dim=1), torch.ones(2))
    again = psnr(torch.from_numpy(render(trained, found.latents).video), torch.from_numpy(videos))
    torch.testing.assert_close(found.psnr, again, rtol=0, atol=0.05)


def test_held_out_clips_come_closer_than_the_nearest_training_clip(run, tmp_path, capsys):
    held_out = write_clip_folder(tmp_path / "held", moving_squares(4, seed=99), split="test")
    before = RunDir.open(run.path).checkpoints.load()[1]
    assert main(["invert", str(run.path), str(held_out), "--starts", "3", "--steps", "20"]) == 0
    folder = run.path / "media" / "inversion"
    record = json.loads((folder / "inversion.json").read_text())
    video, original = np.load(folder / "video.npy"), np.load(folder / "original.npy")
    training = torch.from_numpy(moving_squares(12))
    for i, clip in enumerate(torch.from_numpy(original)):
        likeness = psnr(training, clip.expand_as(training))
        assert record["nearest"]["psnr"][i] == pytest.approx(likeness.max().item())
        reached = psnr(torch.from_numpy(video[i : i + 1]), clip[None]).item()
        assert record["psnr"][i] == pytest.approx(reached, abs=0.05)
    assert np.mean(record["psnr"]) > np.mean(record["nearest"]["psnr"])
    assert np.array_equal(original, moving_squares(4, seed=99))
    assert f"{record['psnr'][0]:.2f} dB" in capsys.readouterr().out
    for name in ("video.mp4", "sheet.png"):
        assert (folder / name).stat().st_size > 1000
    after = RunDir.open(run.path).checkpoints.load()[1]
    assert all(torch.equal(before[part][key], after[part][key]) for part in before for key in before[part])


def test_more_steps_and_starts_do_not_harm(run):
    clips = moving_squares(2, seed=7)
    trained = load_trained(run)
    few, many = (invert(trained, clips, starts=s, steps=n).psnr for s, n in ((1, 1), (2, 20)))
    assert (many > few).all()


def test_a_clip_does_not_depend_on_the_others_even_where_batchnorm_trains(run):
    run.options["train"]["batchnorm"] = "train"
    try:
        trained = load_trained(run)
        assert trained.generator.training
        clips = moving_squares(2, seed=8)
        both, alone = invert(trained, clips, steps=5), invert(load_trained(run), clips[1:], steps=5)
    finally:
        run.options["train"]["batchnorm"] = "eval"
    torch.testing.assert_close(both.latents[1:], alone.latents, rtol=1e-4, atol=1e-5)


def test_mistakes(run):
    trained = load_trained(run)
    with pytest.raises(VglannError, match="the run makes"):
        invert(trained, moving_squares(1, size=48))
    for bad in ({"starts": 0}, {"steps": 0}):
        with pytest.raises(VglannError, match="at least 1"):
            invert(trained, moving_squares(1), **bad)


def test_videos_are_cut_as_the_runs_clips_are(run, tmp_path):
    av = pytest.importorskip("av")
    frames = moving_squares(1, frames=40, size=96)[0].transpose(1, 2, 3, 0)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 96, 96, "bgr0"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24").reformat(format="bgr0")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert main(["invert", str(run.path), str(tmp_path / "a.mkv"), "--steps", "2", "--starts", "1"]) == 0
    assert np.load(run.path / "media" / "inversion" / "original.npy").shape == (2, 3, 16, 32, 32)
