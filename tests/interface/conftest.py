"""A tiny clip folder, and a run trained on it through the Python interface."""

import pytest

import vglann_fast as vf
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder

TINY = {
    "preset": "demo",
    "width": 4,
    "latent_dim": 8,
    "levels": 2,
    "batch_size": 3,
    "epochs": 3,
    "background_share": 0.0,
}


@pytest.fixture(scope="session")
def tiny():
    """Keyword arguments of `vf.train` for a generator of a few thousand parameters and six steps."""
    return TINY


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("interface") / "clips", moving_squares(6))


@pytest.fixture(scope="session", params=["eval", "train"])
def run(request, clips, tmp_path_factory):
    """A run with one mapping; tests leave its training and its mapping as they are."""
    trained = vf.train(clips, tmp_path_factory.mktemp("run") / "run", **TINY, batchnorm=request.param)
    trained.fit_mapping("imle", epochs=3)
    return trained
