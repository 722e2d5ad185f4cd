"""Runs that nobody can resume, of `import-glann` and `replay --out`: whole, or nothing that blocks the next try."""

import errno
import os
import signal
import sys

import pytest
import torch
from destination import held
from failing_calls import fail_once, fail_where, without_renaming_folders

from vglann_fast.errors import VglannError
from vglann_fast.run.folder import RunDir, whole_run

RECORD = {"preset": "demo", "seed": 0, "clips": None, "frames": 16, "size": 64, "train": {}}


def make(path):
    """Make a run as `import-glann` does."""
    with whole_run(path) as folder:
        run = RunDir.new(folder, RECORD).begin()
        run.checkpoints.save(1, {"part": {"x": torch.ones(1)}}, {"ids": []})
        run.logs.add({"stage": "glo", "step": 1})


def is_whole(path):
    run = RunDir.open(path)
    return run.checkpoints.load()[0]["step"] == 1 and run.logs.metrics("glo")


@pytest.mark.parametrize("before", ["nothing", "empty", "killed training"])
def test_a_run_is_made_where_there_is_none(tmp_path, before):
    out = tmp_path / "out"
    if before != "nothing":
        out.mkdir()
    if before == "killed training":
        (out / ".lock").touch()
        (out / "environment.json").write_text("{}")
    make(out)
    assert is_whole(out)
    with pytest.raises(VglannError, match="there already"):
        make(out)


@pytest.mark.parametrize("name", ["thesis.txt", "options.json", "checkpoints"])
def test_what_is_there_stays(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(VglannError, match="there already"):
        make(out)
    assert held(out) == {name: "mine"}


@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_an_error_at_any_flush_leaves_nothing_that_blocks_the_next_try(tmp_path, before):
    for turn in range(1, 40):
        out = tmp_path / str(turn) / "out"
        out.parent.mkdir()
        if before == "empty":
            out.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            failed = fail_once(patch, "fsync", errno.EROFS, turn, out.parent)
            try:
                make(out)
            except VglannError:
                assert failed
        if not out.exists() or not any(out.iterdir()):
            make(out)
        assert is_whole(out)
        if not failed:
            return
    pytest.fail("the flushes do not end")


def killed_at(change, path):
    """Make a run in a process that is killed right before its `change`-th change of files; False if it ended."""
    process = os.fork()
    if process == 0:
        left = [change]

        def fatal(event, of):
            if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(fatal)
        try:
            make(path)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_killed_at_any_change_it_does_not_block_the_next_try(in_memory, before):
    for change in range(1, 80):
        out = in_memory / str(change) / "out"
        out.parent.mkdir()
        if before == "empty":
            out.mkdir()
        killed = killed_at(change, out)
        if not (out / "options.json").exists():
            make(out)
        assert is_whole(out)
        if not killed:
            return
    pytest.fail("the changes do not end")


@pytest.mark.parametrize("nothing_at_all", [False, True])
def test_a_run_is_copied_where_its_folders_cannot_be_renamed(tmp_path, monkeypatch, nothing_at_all):
    if nothing_at_all:
        for call in ("rename", "replace"):
            fail_where(monkeypatch, call, errno.ENOSYS, lambda *_: True)
    else:
        without_renaming_folders(monkeypatch)
    make(tmp_path / "out")
    assert is_whole(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
