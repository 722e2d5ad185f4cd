"""Memory of a training: what is reckoned, what autograd keeps, and what is said when there is too little."""

import logging

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import assemble
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.memory import checkpoint_activations, memory_table, out_of_memory
from vglann_fast.glo.train import train
from vglann_fast.glo.training import Training
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.memory import peak_memory


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(6))


def test_activation_checkpointing_keeps_less():
    kept = []
    for checkpointed in (False, True):
        generator = TwoStreamGenerator("original", 8, 8, frames=32, size=64).channels_last().train()
        if checkpointed:
            checkpoint_activations(generator)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = generator.logits(torch.randn(3, 8))
        kept.append(sum(sizes.values()))
        del result
    assert kept[1] < 0.7 * kept[0]


def table_of(options, **changes):
    generator = TwoStreamGenerator("original", 100, options.width)
    latents = [torch.zeros(1000, 100)] * 3
    given = {"batch_size": 15, "frames": 32, "size": 64, "clips": 1000, "half": False, **changes}
    return dict(memory_table(generator, latents, options, **given))


def test_the_memory_table_adds_up():
    table = table_of(TrainOptions())
    assert table["weights and gradients"] == 2 * 4 * 16_245_383 - 2 * 4 * (16_245_383 - count_of(64))
    assert table["optimizer of generator"] == table["weights and gradients"]
    assert table["latents and their Adam"] == 3 * 4 * 100_000
    assert table["clips"] == 1000 * 393_216
    halved = table_of(TrainOptions(), half=True, clips=15)
    assert halved["activations (estimate)"] * 2 == table["activations (estimate)"]
    saved = table_of(TrainOptions(checkpoint_activations=True))
    assert saved["activations (estimate)"] < 0.6 * table["activations (estimate)"]


def count_of(width):
    return sum(p.numel() for p in TwoStreamGenerator("original", 100, width).parameters())


def test_the_activation_estimate_is_what_autograd_keeps():
    """Within a quarter: the background stream and the loss are not counted."""
    options = TrainOptions(width=8)
    generator = TwoStreamGenerator("original", 100, 8).channels_last().train()
    sizes = {}
    parameters = {p.untyped_storage().data_ptr() for p in generator.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = generator.logits(torch.randn(4, 100))
    head = result[0].numel() * 4
    estimate = dict(
        memory_table(generator, [], options, batch_size=4, frames=32, size=64, clips=0, half=False)
    )["activations (estimate)"]
    assert sum(sizes.values()) + head == pytest.approx(estimate, rel=0.35)


def test_the_three_options_that_help():
    options = TrainOptions()
    first = str(out_of_memory(options, 15, resident=True, half=False))
    for option in ("--batch-size 7 --accumulate 2", "--checkpoint-activations true", "--data pinned"):
        assert option in first
    options = TrainOptions(checkpoint_activations=True, width=64)
    last = str(out_of_memory(options, 2, resident=False, half=True))
    assert "--width 32" in last
    assert "--batch-size" not in last


def test_out_of_memory_is_one_line_after_a_table_and_loses_nothing(clips, tmp_path, monkeypatch, caplog):
    options = tiny_options("modern", batch_size=3)
    run = new_run(tmp_path / "run", clips, options)
    opened = ClipSet.open(clips, "train")
    new_training(opened, options, run).loop(max_steps=2)
    step = Training.train_step

    def full(self, **wanted):
        if self.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, **wanted)

    monkeypatch.setattr(Training, "train_step", full)
    with caplog.at_level(logging.INFO, "vglann_fast"), pytest.raises(VglannError) as caught:
        train(opened, run, resume=True)
    assert str(caught.value).startswith(
        "out of memory; try --checkpoint-activations true, or --precision bf16"
    )
    for part in ("weights and gradients", "optimizer of generator", "latents", "activations", "clips"):
        assert part in caplog.text
    assert run.checkpoints.load()[0]["step"] == 2


def test_out_of_memory_before_the_first_step_is_one_line_too(clips, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(assemble, "open_source", full)
    run = RunDir(tmp_path / "run", new_run(tmp_path / "other", clips, tiny_options("modern")).options)
    with pytest.raises(VglannError, match=r"out of memory before the first step.*--data pinned, --width 2"):
        train(ClipSet.open(clips, "train"), run)
    assert not run.path.exists()


def test_the_peak_is_told_once_after_the_first_step(clips, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "vglann_fast"):
        options = tiny_options("modern")
        opened = ClipSet.open(clips, "train")
        new_training(opened, options, new_run(tmp_path / "run", clips, options)).loop(max_steps=3)
    assert caplog.text.count("peak memory after the first full step: ") == 1
    assert 1e7 < peak_memory(torch.device("cpu")) < 1e12
