"""Several processes: the same training as one process with all shares, and an end that is never silent."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from forked_process import MAIN, ranks
from safetensors.torch import load_file
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import latent_batches, recompute_batchnorm
from vglann_fast.glo.checkpoint import Place, load_trained, place_in_run
from vglann_fast.glo.compatibility import batch_size_for
from vglann_fast.glo.loader import Batch, clip_order
from vglann_fast.options.fields import options_to_json
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS = 9  # shares of 5 and 4: two steps of 2 clips each an epoch, and one clip that waits


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(CLIPS))


def finish(started, timeout=300):
    """Wait for all; their exit codes and what they said."""
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.end(signal.SIGKILL)
    return codes, [process.said() for process in started]


TRAIN = """
import sys
from vglann_fast.cli.main import main
sys.exit(main(["train", *sys.argv[1:], "--device", "cpu", "--log-every", "1"]))
"""


def as_arguments(options):
    words = []
    for name, value in options_to_json(options).items():
        words += [
            "--" + name.replace("_", "-"),
            str(value).lower() if isinstance(value, bool) else str(value),
        ]
    return words


def train_in_processes(clips, out, options, size=2):
    codes, said = finish(
        ranks(TRAIN, clips, "--out", out, *as_arguments(options), folder=out.parent, size=size)
    )
    assert codes == [0] * size, said
    return RunDir.open(out)


def both_shares_in_one_process(clips, path, options):
    """Train in one process as two do: each share is one of the batches of an update."""
    opened = ClipSet.open(clips, "train")
    run = new_run(path, clips, options)
    training = new_training(opened, options, run)
    assert training.batch_size == options.batch_size
    shares = [Ranks(rank, 2).owns(CLIPS).numpy() for rank in range(2)]
    losses = []
    for epoch in range(options.passes):
        training.epoch = epoch
        if epoch == options.background_passes > 0:
            training._inflate()
        training.begin_epoch(epoch)
        orders = [share[clip_order(0, epoch, len(share), rank)] for rank, share in enumerate(shares)]
        for first in range(0, 4, options.batch_size):
            rows = [order[first : first + options.batch_size] for order in orders]
            batches = [
                Batch(torch.from_numpy(opened.read(row)), torch.arange(len(row)), torch.from_numpy(row))
                for row in rows
            ]
            losses.append(training.update(batches, False)[0].item())
        training.latents.end_epoch()
    training._finish()
    return losses, training


# 2 passes for the background, then 3 full ones.
RECIPE = {"optimizer": "muon", "background_share": 0.034, "ema": 0.9}


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("modern", {}), ("paper", {}), ("modern", RECIPE)],
    ids=["modern", "paper", "recipe"],
)
def test_two_processes_equal_one_that_does_both_shares(clips, tmp_path, preset, changes):
    options = tiny_options(preset, batch_size=2, epochs=3, **changes)
    run = train_in_processes(clips, tmp_path / "two", options)
    one = tiny_options(preset, batch_size=2, epochs=3, accumulate=2, **changes)
    losses, training = both_shares_in_one_process(clips, tmp_path / "one", one)
    assert np.allclose([row["loss"] for row in run.logs.metrics("glo")], losses, rtol=2e-5)
    trained = load_trained(run)
    assert trained.ids == ClipSet.open(clips, "train").ids
    assert torch.allclose(trained.latents, training.latents.rows, atol=2e-4)
    made_from = training.average.generator if options.ema else training.generator
    ours, theirs = trained.generator.state_dict(), made_from.state_dict()
    for name in ("stem.weight", "video.conv3.weight", "background.head.bias"):
        assert torch.allclose(ours[name], theirs[name], atol=2e-4), name


def test_sync_bn_equals_one_process_with_the_whole_batch(clips, tmp_path):
    options = tiny_options("modern", batch_size=2, epochs=3, sync_bn=True)
    run = train_in_processes(clips, tmp_path / "two", options)
    one = tiny_options("modern", batch_size=4, epochs=3)
    opened = ClipSet.open(clips, "train")
    training = new_training(opened, one, new_run(tmp_path / "one", clips, one))
    losses = []
    for epoch in range(3):
        training.begin_epoch(epoch)
        shares = [Ranks(rank, 2).owns(CLIPS).numpy() for rank in range(2)]
        orders = [share[clip_order(0, epoch, len(share), rank)] for rank, share in enumerate(shares)]
        for first in (0, 2):
            rows = np.concatenate([order[first : first + 2] for order in orders])
            batch = Batch(
                torch.from_numpy(opened.read(rows)), torch.arange(len(rows)), torch.from_numpy(rows)
            )
            losses.append(training.update([batch], False)[0].item())
    assert np.allclose([row["loss"] for row in run.logs.metrics("glo")], losses, rtol=5e-5)
    recompute_batchnorm(training.generator, latent_batches(training.latents.rows, 2))
    ours, theirs = load_trained(run).generator.state_dict(), training.generator.state_dict()
    for name in ("stem.weight", "video.norm3.running_mean", "video.norm3.running_var"):
        assert torch.allclose(ours[name], theirs[name], atol=1e-3), name


def test_sigterm_to_one_process_saves_and_ends_all(clips, tmp_path):
    options = tiny_options("modern", batch_size=2, epochs=100_000)
    started = ranks(TRAIN, clips, "--out", tmp_path / "run", *as_arguments(options), folder=tmp_path)
    run = wait_for_metrics(tmp_path / "run", started, 3)
    started[1].end(signal.SIGTERM)
    codes, said = finish(started)
    assert codes == [143, 143], said
    assert all("stopped by SIGTERM and saved" in text for text in said)
    step = run.checkpoints.load()[0]["step"]
    assert step >= run.logs.metrics("glo")[-1]["step"]


def wait_for_metrics(path, started, lines):
    for _ in range(1200):
        if (path / "metrics.jsonl").is_file():
            run = RunDir.open(path)
            if len(run.logs.metrics("glo")) >= lines:
                return run
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.05)
    raise AssertionError("no metrics in a minute")


def test_a_killed_process_ends_the_other_at_once(clips, tmp_path):
    options = tiny_options("modern", batch_size=2, epochs=100_000)
    started = ranks(TRAIN, clips, "--out", tmp_path / "run", *as_arguments(options), folder=tmp_path)
    wait_for_metrics(tmp_path / "run", started, 3)
    started[1].end(signal.SIGKILL)
    before = time.monotonic()
    codes, said = finish(started)
    assert codes == [2, -signal.SIGKILL]
    assert time.monotonic() - before < 60  # the timeout is ten minutes
    assert "another process of this job has ended" in said[0]


HANG = """
import sys, time, torch
from datetime import timedelta
from vglann_fast.errors import VglannError
from vglann_fast.runtime.distributed import joined
try:
    with joined(torch.device("cpu"), timeout=timedelta(seconds=3)) as ranks:
        ranks.wait()
        if ranks.rank:
            time.sleep(300)
        ranks.mean(1.0)
except VglannError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def test_a_hanging_process_ends_the_other_within_the_timeout(tmp_path):
    started = ranks(HANG, folder=tmp_path)
    try:
        assert started[0].wait(60) == 2, started[0].said()
        assert "another process of this job has ended or hangs" in started[0].said()
    finally:
        started[1].end(signal.SIGKILL)


def test_a_process_with_an_error_of_its_own_says_so_first(clips, tmp_path):
    """Process 1 finds its clips damaged; process 0 does not hide that under a message of its own."""
    code = TRAIN.replace(
        "import sys\n",
        "import os, sys\n"
        "from vglann_fast.errors import VglannError\n"
        "from vglann_fast.glo.train import Training\n"
        "if os.environ['RANK'] == '1':\n"
        "    def broken(self, **wanted): raise VglannError('clips-00000.npy: damaged')\n"
        "    Training.train_step = broken\n",
    )
    options = tiny_options("modern", batch_size=2, epochs=3)
    codes, said = finish(
        ranks(code, clips, "--out", tmp_path / "run", *as_arguments(options), folder=tmp_path)
    )
    assert codes == [2, 2], said
    assert "vglann (process 1): error: clips-00000.npy: damaged" in said[1]
    assert "error" not in said[0]


def test_the_same_error_in_all_processes_is_one_line(clips, tmp_path):
    for arguments in (
        [clips, "--out", tmp_path / "run", "--batch-size", "1"],
        [tmp_path, "--out", tmp_path / "run"],
    ):
        codes, said = finish(ranks(TRAIN, *arguments, folder=tmp_path))
        assert codes == [2, 2], said
        assert sum(text.count("error:") for text in said) == 1, said


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_continues_with_another_number_of_processes(clips, tmp_path, before, after):
    options = tiny_options("modern", batch_size=2, epochs=2)
    run = train_in_processes(clips, tmp_path / "run", options, size=before)
    state, parts = run.checkpoints.load()
    record = (tmp_path / "run" / "options.json").read_text()
    (tmp_path / "run" / "options.json").write_text(record.replace('"epochs": 2', '"epochs": 4'))
    codes, said = finish(ranks(TRAIN, "--resume", tmp_path / "run", folder=tmp_path, size=after))
    assert codes == [0] * after, said
    later, newer = RunDir.open(tmp_path / "run").checkpoints.load()
    assert later["epoch"] == 4
    assert later["step"] == state["step"] + 2 * (2 if after == 2 else 4)
    assert later["ids"] == state["ids"]
    visits, first = newer["latents"]["adam.row_step"], parts["latents"]["adam.row_step"]
    assert first.sum() == 2 * 8  # 8 of the 9 clips an epoch
    assert visits.sum() == 4 * 8
    assert (visits >= first).all()


STOP_IN_THE_MIDDLE = """
import sys, torch
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import TrainOptions
from vglann_fast.runtime.distributed import joined
from vglann_fast.glo.assemble import new_training
from vglann_fast.run.folder import RunDir
def main():  # a group of processes that outlives the interpreter ends in an abort, at times
    run = RunDir.open(sys.argv[1])
    options = options_from_json(TrainOptions, run.options["train"])
    with joined(torch.device("cpu")) as ranks:
        clips = ClipSet.open(run.options["clips"], "train")
        new_training(clips, options, run, ranks=ranks).loop(max_steps=3, log_every=1)
main()
"""


def test_stopped_within_an_epoch_and_resumed_is_the_same_training_bit_for_bit(clips, tmp_path):
    options = tiny_options("modern", batch_size=2, epochs=3)
    whole = train_in_processes(clips, tmp_path / "whole", options)
    parts = new_run(tmp_path / "parts", clips, options, preset="modern")
    codes, said = finish(ranks(STOP_IN_THE_MIDDLE, parts.path, folder=tmp_path))
    assert codes == [0, 0], said
    assert parts.checkpoints.load()[0]["position"] == 1
    codes, said = finish(ranks(TRAIN, "--resume", parts.path, folder=tmp_path))
    assert codes == [0, 0], said
    assert [row["loss"] for row in whole.logs.metrics("glo")] == [
        row["loss"] for row in parts.logs.metrics("glo")
    ]
    ends = [run.checkpoints.load()[1] for run in (whole, parts)]
    for part, tensors in ends[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ends[1][part][name]), (part, name)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_names_its_clips(clips, tmp_path):
    code = TRAIN.replace(
        "import sys\n",
        "import os, sys\n"
        "from vglann_fast.glo.train import Training\n"
        "step = Training.train_step\n"
        "def poisoned(self, **wanted):\n"
        "    if self.step == 2 and os.environ['RANK'] == '1':\n"
        "        logits = self.logits\n"
        "        self.logits = lambda z: logits(z * float('nan'))\n"
        "    return step(self, **wanted)\n"
        "Training.train_step = poisoned\n",
    )
    options = tiny_options("modern", batch_size=2, epochs=3)
    codes, said = finish(
        ranks(code, clips, "--out", tmp_path / "run", *as_arguments(options), folder=tmp_path)
    )
    assert codes == [2, 2], said
    ids = ClipSet.open(clips, "train").ids
    share = Ranks(1, 2).owns(CLIPS).numpy()
    guilty = ", ".join(ids[row] for row in share[clip_order(0, 1, len(share), 1)][:2])
    assert f"not finite at step 3, on clips {guilty};" in "".join(said)
    assert "".join(said).count("error:") == 1
    assert RunDir.open(tmp_path / "run").checkpoints.load()[0]["step"] == 2


def torchrun(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vglann_fast", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_trains_and_its_processes_map(clips, tmp_path):
    run = tmp_path / "run"
    options = tiny_options("modern", batch_size=2, epochs=1)
    assert len(re.findall("trained: ", torchrun("train", clips, "--out", run, *as_arguments(options)))) == 1
    assert RunDir.open(run).checkpoints.load()[0]["processes"] == 2
    words = ["map", str(run), "--epochs", "3"]
    codes, said = finish(ranks(MAIN, *words, folder=tmp_path))
    assert codes == [0, 0], said
    assert sum("fitted: " in text for text in said) == 1
    together = load_file(run / "mapping" / "imle" / "mapping.safetensors")
    assert [row["step"] for row in RunDir.open(run).logs.metrics("imle")] == [1, 2, 3]
    assert main(words) == 0
    alone = load_file(run / "mapping" / "imle" / "mapping.safetensors")
    assert alone.keys() == together.keys()
    for name, value in alone.items():  # other numbers of threads, other rounding
        assert torch.allclose(value.double(), together[name].double(), atol=1e-4), name


def test_each_clip_belongs_to_one_process():
    owned = [Ranks(rank, 4).owns(10) for rank in range(4)]
    assert sorted(torch.cat(owned).tolist()) == list(range(10))


def test_where_another_number_of_processes_continues():
    state = {"step": 50, "epoch": 3, "position": 5, "processes": 2}
    assert place_in_run(state, 2) == Place(50, 3, 5)
    assert place_in_run(state, 4) == Place(50, 3, 0)


def test_more_processes_than_clips_are_refused():
    options = tiny_options("modern", batch_size=4)
    assert batch_size_for(10, options, Ranks(0, 2)) == 4
    assert batch_size_for(10, options, Ranks(0, 4)) == 2
    with pytest.raises(VglannError, match="10 clips are too few for 6 processes"):
        batch_size_for(10, options, Ranks(0, 6))
