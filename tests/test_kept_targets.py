"""Features of the clips that a loss keeps: once the first step has shown what is left for them, or not at all."""

from dataclasses import replace

import pytest
import torch
from test_perceptual import import_lite0, random_weights
from tiny import moving_squares, new_run, tiny_options, write_clip_folder

from vglann_fast.cli import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.config import PRESETS
from vglann_fast.errors import VglannError
from vglann_fast.glo import memory
from vglann_fast.glo.memory import free_beside_a_step, too_large
from vglann_fast.glo.perceptual import FeatureLoss
from vglann_fast.glo.train import Training, train
from vglann_fast.run_dir import RunDir

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def imported(tmp_path, monkeypatch):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "weights"))
    import_lite0(tmp_path / "weights")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(7))


@pytest.fixture
def looks(monkeypatch):
    """Grows by one with each look at a batch through a network."""
    seen, levels = [], FeatureLoss.levels
    monkeypatch.setattr(FeatureLoss, "levels", lambda self, video: seen.append(0) or levels(self, video))
    return seen


def test_kept_features_change_no_bit(clips, tmp_path, looks):
    """Seven clips in batches of three: the last batch of the first look at them is not a whole one."""
    losses = []
    for wish in ("off", "on"):
        options = tiny_options("modern", loss="laplacian:1,lite0:0.5", cache_features=wish)
        run = new_run(tmp_path / wish, clips, options)
        looks.clear()
        Training(ClipSet.open(clips, "train"), options, run).loop(max_steps=3, log_every=1)
        losses.append([row["loss"] for row in run.metrics("glo")])
        # Both videos of a step; of the first alone, then of the clips in three batches, then the made one.
        assert len(looks) == {"off": 3 * 2, "on": 2 + 3 + 2}[wish]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_what_a_step_leaves_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**10)
    torch.ones(50_000_000)  # 200 MB that the process had and gave back
    assert free_beside_a_step(CPU) < 10**10 - 0.15e9
    assert free_beside_a_step(torch.device("cuda")) == 10**10


def test_features_that_do_not_fit_are_computed_anew(clips, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    options = tiny_options("modern", loss="lite0", epochs=1)
    with caplog.at_level("INFO", "vglann_fast"):
        train(ClipSet.open(clips, "train"), new_run(tmp_path / "run", clips, options))
    assert "lite0 of 7 clips take" in caplog.text
    assert "computed anew in each step" in caplog.text


def test_asked_for_and_no_room_is_one_line_and_the_run_goes_on_without(clips, tmp_path, monkeypatch, capsys):
    run, options = (
        tmp_path / "run",
        ["--width", "4", "--latent-dim", "8", "--batch-size", "3", "--epochs", "1"],
    )
    command = ["train", str(clips), "--out", str(run), *options, "--loss", "lite0", "--cache-features", "on"]
    with monkeypatch.context() as full:
        full.setattr(memory, "free_memory", lambda device: 1000)
        assert main([*command, "--device", "cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vglann: error: --cache-features on: the features of lite0 of 7 clips take")
    assert last.endswith("go on with --resume and --cache-features off")
    assert main(["train", "--resume", str(run), "--cache-features", "off", "--device", "cpu"]) == 0
    assert RunDir.open(run).load_checkpoint()[0]["finished"]


def test_out_of_memory_names_kept_features(clips, tmp_path, caplog):
    taken = []
    for wish in ("off", "on"):
        options = tiny_options("modern", loss="lite0", cache_features=wish)
        training = Training(ClipSet.open(clips, "train"), options, RunDir(tmp_path / wish, {}))
        training.after_first_step()
        with caplog.at_level("INFO", "vglann_fast"):
            message = str(training.out_of_memory())
        assert message.startswith("out of memory; try --cache-features off,") == (wish == "on")
        taken.append(training.features["lite0"].nbytes)
    assert caplog.text.count("networks, kept features") == 2
    levels = training.features["lite0"].levels(torch.zeros(7, 3, 16, 32, 32))
    assert taken[1] - taken[0] == sum(4 * level.numel() for level in levels)
    assert taken[0] >= sum(4 * p.numel() for p in training.features["lite0"].network.parameters())


def test_out_of_memory_while_they_are_made_names_them_too(clips, tmp_path, monkeypatch):
    levels, looks = FeatureLoss.levels, []

    def full(self, video):
        looks.append(0)
        if len(looks) == 4:  # two of the first step, one before the room for all is taken
            raise torch.OutOfMemoryError("CUDA out of memory")
        return levels(self, video)

    monkeypatch.setattr(FeatureLoss, "levels", full)
    run = new_run(tmp_path / "run", clips, tiny_options("modern", loss="lite0"))
    with pytest.raises(VglannError, match=r"^out of memory; try --cache-features off, "):
        train(ClipSet.open(clips, "train"), run)


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({}, "clips do not fit; try --data pinned, --width 32 or"),
        ({"data": "pinned"}, "clips do not fit; try --width 32 or"),
        (
            {"loss": "l1,lite0"},
            "clips and lite0 do not fit; try --data pinned, --width 32, a --loss without lite0 or",
        ),
    ],
)
def test_before_the_first_step_only_what_helps_is_named(changes, tried):
    assert tried in str(too_large(replace(PRESETS["modern"].train, **changes)))


def test_batch_statistics_are_not_kept():
    options = replace(PRESETS["paper"].train, loss="resnext101-3d")
    weights = random_weights("resnext101-3d")
    FeatureLoss(weights, options, CPU).keep_targets(None, 2, 2)  # does not look at a clip
    with pytest.raises(VglannError, match="depend on the batch with --perceptual seed"):
        FeatureLoss(weights, replace(options, cache_features="on"), CPU)
