"""Faults, a few of each: what is done in full by `make faults`; and each thing that was lost in it once."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.train import train
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.write import _save_array


def begun(path):
    return RunDir.new(path, {}).begin()


def save(run, step, keep=2):
    return run.checkpoints.save(step, {"part": {"x": torch.full((2,), float(step))}}, {"ids": []}, keep)


def checkpoints(run):
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run.path / "checkpoints").iterdir())


def tear(checkpoint):
    file = checkpoint / "part.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("keep", [1, 2])
def test_a_torn_checkpoint_does_not_outlive_the_whole_ones_after_it(tmp_path, keep):
    """After resuming from an older checkpoint, new checkpoints have lower numbers than the truncated one."""
    run = begun(tmp_path / "run")
    save(run, 10)
    tear(save(run, 20))
    assert run.checkpoints.load()[0]["step"] == 10
    assert "step-00000020 is damaged" in run.warnings[0]
    save(run, 12, keep)
    state, parts = run.checkpoints.load()
    assert state["step"] == 12
    assert parts["part"]["x"].tolist() == [12, 12]
    assert checkpoints(run) == [*[10, 12][-keep:], 20]  # perhaps it could only not be read just then
    run.checkpoints.load()
    save(run, 22, keep)
    assert checkpoints(run) == [12, 22][-keep:]


def test_a_line_after_a_torn_one_is_not_lost(tmp_path):
    run = begun(tmp_path / "run")
    for name in ("history.jsonl", "metrics.jsonl"):
        (run.path / name).write_text(
            '{"stage": "glo", "step": 1, "verb": "map", "opt'
        )  # as a full disk leaves it
    run.logs.remember("sample", {"n": 3})
    run.logs.add({"stage": "glo", "step": 2})
    assert [line["verb"] for line in run.logs.history()] == ["sample"]
    assert [row["step"] for row in run.logs.metrics("glo")] == [2]


def test_a_training_killed_before_it_began_can_be_started_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", "environment.json", ".tmp-vglann-abc"):
        (folder / name).touch()
    assert begun(folder)
    with pytest.raises(VglannError, match="is there already"):
        RunDir.new(folder, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(VglannError, match="is there already"):
        RunDir.new(tmp_path / "other", {})


def test_what_killed_processes_left_is_removed_by_the_next_holder_of_the_lock(tmp_path):
    run = begun(tmp_path / "run")
    save(run, 1)
    left = run.path / "checkpoints" / ".tmp-vglann-abc"
    left.mkdir()
    (left / "generator.safetensors").write_bytes(b"half")
    (run.path / ".tmp-vglann-def").mkdir()
    with run.locked():
        assert not list(run.path.rglob(".tmp-*"))
    assert run.checkpoints.load()[0]["step"] == 1


def test_a_training_killed_before_its_first_checkpoint_logs_no_step_twice(tmp_path):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(4))
    run = new_run(tmp_path / "run", clips, tiny_options(batch_size=2, epochs=1))
    for step in (1, 2):
        run.logs.add({"stage": "glo", "step": step})
    train(ClipSet.open(clips, "train"), RunDir.open(run.path), resume=True, log_every=1)
    assert [row["step"] for row in run.logs.metrics("glo")] == [1, 2]


def test_what_the_system_forbids_anywhere_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "options.json"))

    monkeypatch.setattr(RunDir, "open", refuse)
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}/options.json: permission denied" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_an_array_has_its_number(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, :, ::2]
    with pytest.raises(OSError) as caught:
        _save_array(Path("/dev/full"), array)
    assert caught.value.errno == errno.ENOSPC
    _save_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", np.ascontiguousarray(array))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


WRITE = """
import os, signal, sys
from vglann_fast.run.destinations import atomic_dir
from vglann_fast.cli import main
from vglann_fast.diagnostics import doctor
def killed(as_json):
    with atomic_dir(sys.argv[1] + "/media") as folder:
        (folder / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
doctor.doctor = killed
sys.exit(main.main(["doctor"]))
"""


def test_sigterm_ends_any_command_in_order(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


CONNECT = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
for host in ("192.0.2.1", "2001:db8::1", "example.org"):
    try:
        socket.create_connection((host, 80), timeout=5)
    except ConnectionRefusedError as error:
        assert "no network in tests" in str(error)
    else:
        sys.exit(host)
"""


def test_no_test_has_a_network():
    """192.0.2.1 and 2001:db8::1 are kept for documentation; nobody answers there."""
    exec(CONNECT)
    assert subprocess.run([sys.executable, "-c", CONNECT], check=False).returncode == 0


SHORT = ["kills", "operations", "full_disk", "permissions"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A hundredth of `make faults`."""
    folder = tmp_path_factory.mktemp("faults")
    words = ["--share", "0.01", "--json", folder / "faults.json", "--markdown", folder / "faults.md", *SHORT]
    command = [sys.executable, "-m", "faults.report", *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    return done, json.loads((folder / "faults.json").read_text()), (folder / "faults.md").read_text()


def test_nothing_is_lost(short):
    done, record, page = short
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [
        case
        for part in record["parts"].values()
        for case in part["cases"]
        if case["tried"] or os.geteuid() == 0
    ]
    assert len(cases) >= 5
    assert sum(case["tried"] for case in cases) >= 12
    for case in cases:
        assert case["tried"] == case["survived"] > 0, case
        assert f"| {case['name']} | {case['tried']} | {case['survived']} | 0 |" in page
