"""Runs that several tests of the command line look at."""

import pytest

from vglann_fast.cli.main import main
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder

TINY = ["--width", "4", "--latent-dim", "8", "--levels", "2", "--batch-size", "3"]


@pytest.fixture(autouse=True)
def no_choice_of_kernels_is_left_behind():
    """`--kernels` sets the default of the process, and these tests are one process."""
    from vglann_kernels import use_impl

    yield
    use_impl(None)


@pytest.fixture(scope="session")
def tiny():
    """Options of a training of a few thousand parameters."""
    return TINY


@pytest.fixture(scope="module")
def route(tmp_path_factory):
    """A run that went through train, map, reconstruct, sample, interpolate and report."""
    folder = tmp_path_factory.mktemp("route")
    clips = write_clip_folder(folder / "clips", moving_squares(6))
    run = folder / "run"
    for command in (
        ["train", str(clips), "--preset", "demo", "--out", str(run), "--epochs", "3", *TINY],
        ["map", str(run), "--epochs", "3"],
        ["reconstruct", str(run)],
        ["sample", str(run), "-n", "5", "--seed", "1"],
        ["interpolate", str(run), "--steps", "3"],
        ["report", str(run)],
    ):
        assert main(command) == 0, command
    return run


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A trained run without a mapping, its clips, and clips of the test split."""
    folder = tmp_path_factory.mktemp("untouched")
    clips = write_clip_folder(folder / "clips", moving_squares(3))
    write_clip_folder(folder / "held_out", moving_squares(1, seed=1), split="test")
    assert main(["train", str(clips), "--out", str(folder / "run"), "--epochs", "1", *TINY]) == 0
    return folder
