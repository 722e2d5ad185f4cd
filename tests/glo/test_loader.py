"""Clips batch by batch: every way to keep them gives the same training, and none takes its time from the step."""

import time
from statistics import median

import numpy as np
import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import to_range
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import loader
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.loader import Mapped, Pinned, Resident, batches_of, clip_order, open_source
from vglann_fast.glo.losses import glo_loss, reconstruction_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(7))
    return ClipSet.open(folder, "train")


def sources(clips, own):
    return [Resident(clips, own, CPU), Mapped(clips, own, CPU), Pinned(clips, own, CPU, 2)]


@pytest.mark.parametrize("which", range(3), ids=["resident", "mmap", "pinned"])
def test_a_batch_is_the_clips_of_its_rows(clips, which):
    own = np.array([1, 3, 5, 6])  # a share: its rows are numbered 0..3
    source = sources(clips, own)[which]
    rows = [np.array(pair) for pair in ([2, 0], [3, 1], [0, 1], [2, 3])]
    for row, following in zip(rows, [rows[1], rows[3], rows[3], None], strict=True):  # one announced in vain
        batch = source.batch(row, following)
        assert batch.clips.dtype == torch.uint8
        assert np.array_equal(batch.clips[batch.at].numpy(), clips.read(own[row]))
        assert batch.rows.tolist() == row.tolist()
    source.close()


def test_pinned_reads_ahead_while_the_step_runs(clips):
    source = Pinned(clips, np.arange(7), CPU, 2)
    source.batch(np.array([0, 1]), np.array([2, 3]))
    rows, coming = source._coming
    coming.result(timeout=10)
    assert rows.tolist() == [2, 3]
    assert np.array_equal(source._table[source._slot].numpy(), clips.read([2, 3]))
    source.close()


def test_a_failed_read_ahead_is_not_lost(clips, monkeypatch):
    source = Pinned(clips, np.arange(7), CPU, 2)
    read = clips.read
    monkeypatch.setattr(clips, "read", lambda rows: read(rows) if 2 not in rows else read([99]))
    source.batch(np.array([0, 1]), np.array([2, 3]))
    with pytest.raises(IndexError):
        source.batch(np.array([2, 3]))
    source.close()


@pytest.mark.parametrize("kind", ["resident", "mmap", "pinned"])
def test_training_is_the_same_however_the_clips_are_kept(clips, tmp_path, kind):
    losses = []
    for name in ("mmap", kind):
        options = tiny_options("modern", data="mmap", batch_size=2, accumulate=1 + (kind == "pinned"))
        training = new_training(
            clips, options, new_run(tmp_path / f"{kind}-{name}-{len(losses)}", clips.folder, options)
        )
        if name == "pinned":
            training.source = Pinned(clips, training.own.numpy(), CPU, training.batch_size)
        elif name == "resident":
            training.source = Resident(clips, training.own.numpy(), CPU)
        losses.append([training.train_step()[0].item() for _ in range(4)])
        training.source.close()
    assert losses[0] == losses[1]


def test_which_source_auto_takes(clips, monkeypatch):
    own = np.arange(7)
    assert open_source("auto", clips, own, CPU, 2).name == "mmap"
    assert open_source("resident", clips, own, CPU, 2).name == "resident"
    with pytest.raises(VglannError, match="--data pinned: needs a GPU"):
        open_source("pinned", clips, own, CPU, 2)
    monkeypatch.setattr(
        loader, "free_memory", lambda device: 600_000
    )  # 7 clips take 344 kB, half is for them
    with pytest.raises(VglannError, match=r"--data resident: the clips take 0.00 GB .* use --data mmap"):
        open_source("resident", clips, own, CPU, 2)
    gpu = torch.device("cuda")
    taken = []
    monkeypatch.setattr(loader, "Resident", lambda *args: taken.append("resident"))
    monkeypatch.setattr(loader, "Pinned", lambda *args: taken.append("pinned"))
    open_source("auto", clips, own, gpu, 2)
    monkeypatch.setattr(loader, "free_memory", lambda device: 700_000)
    open_source("auto", clips, own, gpu, 2)
    assert taken == ["pinned", "resident"]


def test_an_epoch_visits_each_clip_once_and_leaves_out_the_rest():
    order = clip_order(3, 1, 11)
    batches = list(batches_of(order, 4))
    assert [len(batch) for batch in batches] == [4, 4]
    assert len(set(np.concatenate(batches))) == 8
    assert not np.array_equal(order, clip_order(3, 1, 11, share=1))


@pytest.mark.parametrize("changes", [{}, {"preset": "paper"}, {"mask_weight": 0.3, "levels": 1}], ids=str)
@pytest.mark.parametrize("mask_weight", [0.0, 0.2])
def test_the_fused_loss_reads_rows_of_the_table_and_gives_the_same_numbers(clips, changes, mask_weight):
    changes = {"mask_weight": mask_weight, **changes}
    options = tiny_options(changes.pop("preset", "modern"), **changes)
    batch = Resident(clips, np.arange(7), CPU).batch(np.array([4, 1, 6]))
    torch.manual_seed(0)
    made = [torch.randn(3, 4, 16, 32, 32), torch.randn(3, 3, 32, 32)]
    results = []
    for table in (batch.clips, to_range(batch.clips, torch.float32, options.target_limits)):
        logits = [tensor.clone().requires_grad_() for tensor in made]
        loss, video = glo_loss(*logits, loader.Batch(table, batch.at, batch.rows), options, with_video=True)
        loss.backward()
        results.append([loss.detach(), video, *(tensor.grad for tensor in logits)])
    for fused, apart in zip(*results, strict=True):
        assert torch.allclose(fused, apart, rtol=1e-5, atol=1e-7 * apart.abs().max().item() + 1e-9)
    plain = reconstruction_loss(results[0][1], batch.clips[batch.at], options)
    mask = torch.sigmoid(made[0][:, 3]).mean()
    assert results[0][0].item() == pytest.approx((plain + options.mask_weight * mask).item(), rel=1e-5)
    assert glo_loss(*made, batch, options, with_video=False)[1] is None


def test_data_and_logging_take_under_three_percent_of_a_step(tmp_path):
    """At batch 5 and width 16; at the preset's width 64 a step is sixteen times longer, the data the same."""
    folder = write_clip_folder(tmp_path / "clips", moving_squares(10, frames=32, size=64))
    opened = ClipSet.open(folder, "train")
    options = tiny_options("modern", width=16, batch_size=5, levels=3, latent_dim=100, epochs=50)
    training = new_training(opened, options, new_run(tmp_path / "run", folder, options))
    spent = {"step": [], "batch": [], "log": []}

    def timed(name, call):
        def run(*args, **options):
            started = time.thread_time()  # not the clock: other processes share the machine
            result = call(*args, **options)
            spent[name].append(time.thread_time() - started)
            return result

        return run

    training.loop(max_steps=2)
    training.source.batch = timed("batch", training.source.batch)
    training.train_step, training.logger.write = (
        timed("step", training.train_step),
        timed("log", training.logger.write),
    )
    training.loop(max_steps=12, log_every=2)
    assert {name: len(seconds) for name, seconds in spent.items()} == {"step": 10, "batch": 10, "log": 5}
    step, batch, log = (median(seconds) for seconds in spent.values())
    assert batch + log / 10 < 0.03 * step, (step, batch, log)  # a line every ten steps, as is the default
