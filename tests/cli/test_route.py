"""The whole route from the command line, at tiny size."""

import json

import numpy as np
import pytest

from vglann_fast.cli.main import main


def test_the_route_leaves_what_it_promises(route):
    assert json.loads((route / "options.json").read_text())["train"]["width"] == 4
    samples = route / "media" / "samples"
    assert np.load(samples / "video.npy").shape == (5, 3, 16, 32, 32)
    assert np.load(samples / "mask.npy").shape == (5, 1, 16, 32, 32)
    assert np.load(samples / "latents.npy").shape == (5, 8)
    record = json.loads((samples / "samples.json").read_text())
    assert record["seed"] == 1
    assert len(set(record["nearest"]["id"])) >= 1
    assert np.load(route / "media" / "nearest" / "video.npy").shape == (5, 3, 16, 32, 32)
    assert np.load(route / "media" / "interpolation" / "video.npy").shape == (3, 3, 16, 32, 32)
    reconstruction = json.loads((route / "media" / "reconstruction" / "reconstruction.json").read_text())
    assert reconstruction["clips"] == 6
    assert reconstruction["psnr"] == pytest.approx(np.mean(reconstruction["per_clip"]["psnr"]))
    assert {row["stage"] for row in map(json.loads, (route / "metrics.jsonl").read_text().splitlines())} == {
        "glo",
        "imle",
    }
    page = (route / "report" / "index.html").read_text()
    assert f"{reconstruction['psnr']:.1f}" in page
    for name in ("video.mp4", "video.gif", "sheet.png"):
        assert (samples / name).stat().st_size > 1000


def test_the_same_seed_gives_the_same_samples(route, capsys):
    before = np.load(route / "media" / "samples" / "video.npy")
    assert main(["sample", str(route), "-n", "5", "--seed", "1"]) == 0
    assert np.array_equal(before, np.load(route / "media" / "samples" / "video.npy"))
    assert capsys.readouterr().out.strip() == str(route / "media" / "samples")


def test_kernels_flag_reaches_the_ops(route, capsys):
    assert main(["sample", str(route), "-n", "2", "--kernels", "triton", "--device", "cpu"]) == 2
    assert "triton" in capsys.readouterr().err
    assert main(["sample", str(route), "-n", "2", "--kernels", "reference,nearest=faiss"]) == 0
