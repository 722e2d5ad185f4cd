"""import_glann.py: checkpoints as the paper's author's code writes them become a run that does all a run does."""

import json

import numpy as np
import pytest
import torch
from golden_data import author_generator_state, normal
from torch import nn

from vglann_fast.cli.main import main
from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.interop.glann_video import load_generator
from vglann_fast.interop.import_glann import import_glann
from vglann_fast.run.folder import RunDir


def write_checkpoints(folder, variant, prefix="", latents=12):
    """netG_glo.pth and netZ_glo.pth, float32, as `torch.save(net.state_dict())` leaves them."""
    author = "orig" if variant == "original" else variant
    state = {prefix + key: value.float() for key, value in author_generator_state(author).items()}
    torch.save(state, folder / "netG_glo.pth")
    torch.save({f"{prefix}emb.weight": 0.1 * normal("import.Z", (latents, 100))}, folder / "netZ_glo.pth")
    return [str(folder / "netG_glo.pth"), str(folder / "netZ_glo.pth")]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    files = write_checkpoints(folder, "original", "module.")
    assert main(["import-glann", *files, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_it_goes_through_map_sample_interpolate_and_report(imported, capsys):
    for command in (
        ["map", str(imported), "--epochs", "2"],
        ["sample", str(imported), "-n", "3"],
        ["interpolate", str(imported), "--steps", "2"],
        ["report", str(imported)],
    ):
        assert main(command) == 0, command
    samples = imported / "media" / "samples"
    assert np.load(samples / "video.npy").shape == (3, 3, 32, 64, 64)
    nearest = json.loads((samples / "samples.json").read_text())["nearest"]
    assert set(nearest) == {"id", "latent_distance"}
    assert all(name.startswith("row-0000") for name in nearest["id"])
    assert "Sample" in (imported / "report" / "index.html").read_text()
    assert not (imported / "media" / "nearest").exists()
    options = RunDir.open(imported).options
    assert options["imported"]["generator"]["file"] == "netG_glo.pth"
    assert (options["preset"], options["clips"]) == ("paper", None)
    capsys.readouterr()
    for command in (["reconstruct", str(imported)], ["train", "--resume", str(imported)]):
        assert main(command) == 2
        assert "was imported" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_its_videos_are_the_authors_with_the_colors_swapped(variant, tmp_path):
    files = write_checkpoints(tmp_path, variant)
    run = import_glann(*files, tmp_path / "run", variant)
    trained = load_trained(run)
    assert trained.latents.shape == (12, 100)
    theirs = load_generator(torch.load(files[0], weights_only=True), variant)
    z = trained.latents[:2]
    with torch.no_grad():
        ours, expected = trained.generator.eval()(z), theirs.eval()(z)
    torch.testing.assert_close(ours, expected[:, [2, 1, 0]])
    assert (ours - expected).abs().max() > 0.1


def test_files_that_are_something_else(imported, tmp_path):
    generator, latents = write_checkpoints(tmp_path, "original")
    others = {
        "text": b"no checkpoint",
        "empty": b"",
        "cut": (tmp_path / "netG_glo.pth").read_bytes()[:5000],
    }
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    torch.save(nn.Linear(2, 2), tmp_path / "network")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"emb.weight": torch.randn(5, 64)}, tmp_path / "shorter")
    torch.save({"emb.weight": torch.zeros(5, 100)}, tmp_path / "zeros")
    for name, what in (
        ("text", "state dict"),
        ("empty", "state dict"),
        ("cut", "state dict"),
        ("network", r"net\.state_dict"),
        ("list", r"net\.state_dict"),
        ("none", "no such file"),
    ):
        for files in ((tmp_path / name, latents), (generator, tmp_path / name)):
            with pytest.raises(VglannError, match=what) as caught:
                import_glann(*files, tmp_path / "run")
            assert "\n" not in str(caught.value)
            assert "weights_only" not in str(caught.value)  # no advice to switch the protection off
    for name, what in (("shorter", "length 64"), ("zeros", "zero"), ("netG_glo.pth", "embedding")):
        with pytest.raises(VglannError, match=what):
            import_glann(generator, tmp_path / name, tmp_path / "run")
    with pytest.raises(VglannError, match="is the variant right"):
        import_glann(generator, latents, tmp_path / "run", "expanded")
    assert not (tmp_path / "run").exists()
    with pytest.raises(VglannError, match="is there already"):
        import_glann(generator, latents, imported)
