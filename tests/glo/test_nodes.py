"""Several nodes: agents of torchrun that meet over the network, here two of them on one machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from forked_process import MAIN, Forked, ranks
from tiny import tiny_options

from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.options.fields import options_to_json
from vglann_fast.run.folder import RunDir


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("nodes") / "clips", moving_squares(9))


def training(clips, out, **changes):
    """The words of a tiny training on a CPU."""
    words = ["train", str(clips), "--out", str(out), "--device", "cpu", "--log-every", "1"]
    for name, value in options_to_json(tiny_options(batch_size=2, **changes)).items():
        words += [f"--{name.replace('_', '-')}", str(value).lower() if value in (True, False) else str(value)]
    return words


def agents(words):
    """Two agents that meet at a port of this machine, as the agents of two nodes meet at a port of the first."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [
        subprocess.Popen(
            [*command, "-m", "vglann_fast", *words],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]


def losses(run):
    return [row["loss"] for row in RunDir.open(run).logs.metrics("glo")]


def test_two_nodes_train_as_two_processes_of_one_and_one_that_dies_ends_the_other(clips, tmp_path):
    """One node can resume what the two of them left."""
    run, one = tmp_path / "nodes", tmp_path / "one"
    endless = {"epochs": 100_000}
    started = agents([*training(clips, run, **endless), "--checkpoint-every", "1"])
    try:
        wait_for_checkpoint(run, started, after=3)
        kill_node(started[0])
        words = started[1].communicate(timeout=300)[1]
        assert started[1].returncode != 0
        assert "another process of this job has ended" in words
    finally:
        for agent in started:
            kill_node(agent)
    state, _ = RunDir.open(run).checkpoints.load()
    assert state["processes"] == 2
    of_nodes = losses(run)[:4]
    assert len(of_nodes) == 4

    words = [*training(clips, one, **endless), "--checkpoint-every", "1"]
    run_until_checkpoint(one, ranks(MAIN, *words, folder=tmp_path), after=3)
    assert losses(one)[:4] == of_nodes

    words = ["train", "--resume", str(run), "--device", "cpu"]
    alone = Forked(MAIN, words, tmp_path / "alone.txt")
    run_until_checkpoint(run, [alone], after=state["step"])
    after, _ = RunDir.open(run).checkpoints.load()
    assert (after["processes"], after["step"] > state["step"]) == (1, True)


def run_until_checkpoint(run, processes, after):
    """Ask `processes` to stop when there is a checkpoint of a step after `after`; it is written in whole."""
    wait_for_checkpoint(run, processes, after)
    for process in processes:
        process.end(signal.SIGTERM)
    assert {process.wait(300) for process in processes} == {128 + signal.SIGTERM}


def kill_node(agent):
    """Kill an agent and the processes it has started."""
    file = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    workers = map(int, file.read_text().split()) if agent.poll() is None else ()
    for pid in (*workers, agent.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def said(process):
    """Return what a process said that has ended."""
    return process.said() if isinstance(process, Forked) else process.communicate()[1]


def wait_for_checkpoint(run: Path, started, after=0):
    """Return when there is a checkpoint of a step after `after`."""
    patience = time.monotonic() + 300
    while all(int(found.name.split("-")[1]) <= after for found in run.glob("checkpoints/step-*")):
        assert all(one.poll() is None for one in started), [said(one) for one in started]
        assert time.monotonic() < patience, "no checkpoint in five minutes"
        time.sleep(0.1)
