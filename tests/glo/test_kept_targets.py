"""Features of the clips that a loss keeps: once the first step has shown what is left for them, or not at all."""

import logging
import os
import signal
from dataclasses import replace

import pytest
import torch
from feature_weights import import_lite0, random_weights
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.loader import Mapped
from vglann_fast.glo.memory import too_large
from vglann_fast.glo.perceptual import FeatureLoss
from vglann_fast.glo.train import train
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime import memory
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.memory import forget_peak, free_beside_a_step
from vglann_fast.runtime.numerics import numerics
from vglann_fast.runtime.signals import Interrupted

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


@pytest.fixture(scope="module")
def fresh(clips, tmp_path_factory):
    """A run with features computed again in each of its six steps."""
    folder = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VGLANN_WEIGHTS", str(folder / "weights"))
        import_lite0(folder / "weights")
        run = new_run(folder / "run", clips, two_passes("off"))
        train(ClipSet.open(clips, "train"), run, log_every=1)
    return run


def two_passes(wish):
    """Of three steps each. Seven clips in batches of two: the last of a look at all of them is not a whole one."""
    return tiny_options("modern", loss="laplacian:1,lite0:0.5", batch_size=2, epochs=2, cache_features=wish)


@pytest.mark.parametrize("cut", [1, 2])
def test_kept_features_change_no_bit(clips, tmp_path, looks, fresh, cut):
    """Of a training that stops at step `cut`, after which its features are computed and kept again."""
    run, opened = new_run(tmp_path / "run", clips, two_passes("on")), ClipSet.open(clips, "train")
    new_training(opened, two_passes("on"), run).loop(max_steps=cut, log_every=1)
    looks.clear()
    train(opened, run, log_every=1, resume=True)
    # Both videos of a step; of the first alone, then of the clips in four batches, then the made one.
    assert len(looks) == 2 + 4 + (6 - cut - 1)
    assert [row["loss"] for row in run.logs.metrics("glo")] == [
        row["loss"] for row in fresh.logs.metrics("glo")
    ]
    (state, parts), (expected_state, expected) = run.checkpoints.load(), fresh.checkpoints.load()
    assert state["step"] == 6
    assert state == expected_state
    for part, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(parts[part][name], tensor), (part, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_of_a_clip_do_not_depend_on_its_place_in_the_batch():
    options, device = tiny_options("modern", loss="lite0", deterministic=True), torch.device("cuda")
    table = torch.from_numpy(moving_squares(7)).to(device)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).to(device)
    with numerics(deterministic=True):
        for name in ("lite0", "vgg16", "resnet50-3d"):
            loss = FeatureLoss(random_weights(name), options, device)
            for one, other in zip(loss.levels(table[order]), loss.levels(table), strict=True):
                assert torch.equal(one, other[order]), name


def test_a_signal_ends_the_first_look_at_the_clips(clips, tmp_path, monkeypatch, caplog):
    """After two of three batches: the training is saved as after any step, and keeps nothing."""
    seen, levels = [], FeatureLoss.levels

    def told_to_stop(self, video):
        seen.append(0)
        if len(seen) == 4:  # after the two of the first step and one
            os.kill(os.getpid(), signal.SIGTERM)
        return levels(self, video)

    monkeypatch.setattr(FeatureLoss, "levels", told_to_stop)
    options = tiny_options("modern", loss="lite0")
    training = new_training(ClipSet.open(clips, "train"), options, new_run(tmp_path / "run", clips, options))
    with caplog.at_level(logging.INFO, "vglann_fast"), pytest.raises(Interrupted):
        training.loop()
    assert len(seen) == 4
    assert not training.features["lite0"].keeps_targets
    assert training.run.checkpoints.load()[0]["step"] == 1
    assert "features of lite0: clip 6/7" in caplog.text


def test_no_look_at_the_clips_after_the_last_step(clips, tmp_path, monkeypatch, caplog):
    """A finished training is not lost because the features that were asked for do not fit."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    options = tiny_options("modern", loss="lite0", batch_size=4, epochs=1, cache_features="on")
    run = new_run(tmp_path / "run", clips, options)
    with caplog.at_level("INFO", "vglann_fast"):
        train(ClipSet.open(clips, "train"), run)
    assert run.checkpoints.load()[0]["finished"]
    assert "peak memory after the first full step" in caplog.text


def test_what_a_step_leaves_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**10)
    torch.ones(50_000_000)  # 200 MB that the process had and gave back, before the step
    forget_peak(CPU)
    assert free_beside_a_step(CPU) > 10**10 - 0.05e9
    torch.ones(50_000_000)  # and in the step
    alone = free_beside_a_step(CPU)
    assert 10**10 - 0.25e9 < alone < 10**10 - 0.15e9
    assert free_beside_a_step(torch.device("cuda")) == 10**10
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)  # each of four processes takes a step
    assert free_beside_a_step(CPU) == pytest.approx(alone - 0.75 * 10**10, abs=0.05e9)
    assert free_beside_a_step(torch.device("cuda")) == 10**10


def test_features_that_do_not_fit_are_computed_anew(clips, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    options = tiny_options("modern", loss="lite0", epochs=1)
    with caplog.at_level("INFO", "vglann_fast"):
        train(ClipSet.open(clips, "train"), new_run(tmp_path / "run", clips, options))
    assert "lite0 of 7 clips take" in caplog.text
    assert "computed again in each step" in caplog.text


def kept_in_process(clips, monkeypatch, rank, *, said_by_others=(), **changes):
    """(lite0's loss, how often it asked whether to stop) of one of two processes, with one clip more in the first."""
    monkeypatch.setattr(Ranks, "gather_words", lambda self, words: [*words, *said_by_others])
    opened, ranks, asked = ClipSet.open(clips, "train"), Ranks(rank, 2), []
    loss = FeatureLoss(random_weights("lite0"), tiny_options("modern", loss="lite0", **changes), CPU)
    source = Mapped(opened, ranks.owns(7).numpy(), CPU)
    loss.keep_targets(source, 7, 3, ranks, lambda: bool(asked.append(0)))
    return loss, len(asked)


def test_all_processes_ask_equally_often_and_keep_their_own_clips(clips, monkeypatch):
    """4 clips are two batches of 3, 3 clips are one."""
    for rank, own in enumerate((4, 3)):
        loss, asked = kept_in_process(clips, monkeypatch, rank)
        assert asked == 2
        assert [len(level) for level in loss._kept] == [own] * 4


def test_what_does_not_fit_in_one_process_none_keeps(clips, monkeypatch):
    loss, asked = kept_in_process(clips, monkeypatch, 0, said_by_others=["no room there"])
    assert not loss.keeps_targets
    assert asked == 0
    with pytest.raises(VglannError, match="--cache-features on: no room there; "):
        kept_in_process(clips, monkeypatch, 0, said_by_others=["no room there"], cache_features="on")


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
    assert last.endswith(
        "; use --cache-features off (of a run: vglann train --resume RUN --cache-features off)"
    )
    assert main(["train", "--resume", str(run), "--cache-features", "off", "--device", "cpu"]) == 0
    assert RunDir.open(run).checkpoints.load()[0]["finished"]


def test_out_of_memory_names_kept_features(clips, tmp_path, caplog):
    taken = []
    for wish in ("off", "on"):
        options = tiny_options("modern", loss="lite0", cache_features=wish)
        training = new_training(ClipSet.open(clips, "train"), options, RunDir(tmp_path / wish, {}))
        training.keep_targets()
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
    with pytest.raises(VglannError, match="depend on the batch with --perceptual paper"):
        FeatureLoss(weights, replace(options, cache_features="on"), CPU)
