"""Destinations: nothing is lost to others who write there, to any error of any call, or to a kill."""

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from destination import MARKER, OTHERS, held, strays, whole, write
from failing_calls import CALLS, ERRORS, fail_once, fail_where, without_renaming_folders

from vglann_fast.errors import VglannError
from vglann_fast.run import temporary
from vglann_fast.run.destinations import atomic_dir, content_of, remove_dir
from vglann_fast.run.temporary import remove_strays, temporary_folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Neither for the disk nor for the garbage of a process that has loaded PyTorch: half a second each time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(gc, "collect", lambda: None)


# ---- what comes there meanwhile


def kept(caught, folder):
    """The folder that the message says the new files are in."""
    (found,) = [entry for entry in folder.rglob("vglann-kept-*") if str(entry) in str(caught.value)]
    return found


@pytest.mark.parametrize("there", [False, True])
def test_files_that_came_meanwhile_stay_and_the_new_ones_are_kept(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(VglannError, match=r"thesis\.txt came") as caught, atomic_dir(out, MARKER) as folder:
        (folder / MARKER).write_text("new")
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("a thesis")
    assert (out / "thesis.txt").read_text() == "a thesis"
    assert held(kept(caught, tmp_path)) == {MARKER: "new"}
    assert not (out / MARKER).exists()
    assert not strays(tmp_path)
    remove_strays(tmp_path)
    assert kept(caught, tmp_path)


@pytest.mark.parametrize("before", ["nothing", "empty", "older"])
def test_of_two_that_write_one_folder_neither_is_lost(tmp_path, before):
    out = tmp_path / "out"
    if before == "older":
        write(out, "old", parts=3)
    elif before == "empty":
        out.mkdir()
    with pytest.raises(VglannError, match="came") as caught, atomic_dir(out, MARKER, OTHERS) as folder:
        (folder / MARKER).write_text("second")
        write(out, "first")
    assert {name: word for name, word in held(out).items() if "kept" not in name} == whole("first")
    assert held(kept(caught, tmp_path)) == {MARKER: "second"}


def test_a_file_of_ours_that_was_changed_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(VglannError, match="part-1 came"), atomic_dir(out, MARKER, OTHERS) as folder:
        (folder / MARKER).write_text("new")
        (out / "part-1").write_text("better")
    assert {**whole("old"), "part-1": "better"}.items() <= held(out).items()


def test_a_file_in_place_of_the_folder_stays(tmp_path):
    with pytest.raises(VglannError) as caught, atomic_dir(tmp_path / "out") as folder:
        (folder / MARKER).write_text("new")
        (tmp_path / "out").write_text("a thesis")
    assert (tmp_path / "out").read_text() == "a thesis"
    assert held(kept(caught, tmp_path)) == {MARKER: "new"}


def test_a_folder_that_is_removed_meanwhile_is_one_line(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(VglannError, match="choose another"), atomic_dir(tmp_path / "out") as folder:
        (folder / MARKER).write_text("new")
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


# ---- every call, every error


@pytest.mark.parametrize("before", ["nothing", "empty", "older"])
@pytest.mark.parametrize("call", CALLS)
def test_any_error_of_any_call_is_one_line_and_loses_nothing(in_memory, before, call):
    """Each call fails in turn, once: then either all is done, or the older files are there as they were."""
    for name in ERRORS:
        (in_memory / name).mkdir()
        each_call_fails(in_memory / name, before, call, getattr(errno, name))


def each_call_fails(folder, before, call, number):
    turn = 0
    while True:
        turn += 1
        place = folder / f"turn-{turn}"
        out = place / "out"
        place.mkdir()
        if before != "nothing":
            out.mkdir()
            (out / "lost+found").mkdir()
        if before == "older":
            write(out, "old", parts=3)
            (out / "thesis.txt").write_text("a thesis")
        was = held(out) if out.exists() else {}
        with pytest.MonkeyPatch.context() as patch:
            failed = fail_once(patch, call, number, turn, place)
            try:
                write(out, "new")
                said = None
            except VglannError as caught:
                said = str(caught)
        done = {name: was[name] for name in set(was) - set(whole("old", 3))} | whole("new")
        there = (
            {name: state for name, state in held(out).items() if "kept" not in name} if out.exists() else {}
        )
        if said is None:
            assert there == done
        else:
            assert "\n" not in said
            assert str(place) in said
            assert there in (was, done)  # done, if only flushing it failed
        for kept in place.rglob("vglann-kept-*"):
            assert str(kept) in said
            assert held(kept) == whole("new")
        # What could not be removed is removed by the next one who writes there.
        write(out, "newer")
        assert not strays(place)
        if not failed:
            assert said is None
            return
        assert turn < 40


@pytest.mark.parametrize("stays", ["in the folder", "in the temporary folder", "in both"])
def test_a_folder_in_it_that_cannot_be_removed_loses_no_files(tmp_path, monkeypatch, stays):
    """Its files are moved one by one, then NFS or FUSE keep something in it, also while all is moved back."""

    def write_media(word):
        with atomic_dir(tmp_path / "out", MARKER, ["media"]) as folder:
            (folder / MARKER).write_text(word)
            (folder / "media" / "deep").mkdir(parents=True)
            (folder / "media" / "a.bin").write_text(word)
            (folder / "media" / "deep" / "b.bin").write_text(word)

    def stays_there(path, **_):
        path = os.fspath(path)
        where = "in the temporary folder" if ".tmp-" in path else "in the folder"
        return "/media" in path and stays in (where, "in both")

    def files(folder):
        found = {
            str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()
        }
        return {name: word for name, word in found.items() if "kept" not in name}

    write_media("old")
    before = files(tmp_path / "out")
    without_renaming_folders(monkeypatch)
    fail_where(monkeypatch, "rmdir", errno.ENOTEMPTY, stays_there)
    with pytest.raises(VglannError) as caught:
        write_media("new")
    assert len(before) == 3
    assert files(tmp_path / "out") == before
    assert files(kept(caught, tmp_path)) == dict.fromkeys(before, "new")


# ---- killed


def killed_at(change, function, *arguments):
    """Run a function in a process that is killed right before its `change`-th change of files; False if it ended."""
    process = os.fork()
    if process == 0:
        left = [change]

        def fatal(event, of):
            opened = event == "open" and isinstance(of[2], int) and of[2] & (os.O_WRONLY | os.O_RDWR)
            if opened or event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(fatal)
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("before", ["nothing", "empty", "older"])
def test_killed_at_any_change_the_folder_is_whole_or_has_no_marker(in_memory, before):
    """Never does it hold old and new files under a marker, and the next one who writes there finds no obstacle."""
    change = 0
    while True:
        change += 1
        place = in_memory / f"change-{change}"
        out = place / "out"
        place.mkdir()
        if before == "empty":
            out.mkdir()
        elif before == "older":
            write(out, "old", parts=3)
        killed = killed_at(change, write, out, "new")
        there = {name: word for name, word in held(out).items() if ".tmp" not in name} if out.exists() else {}
        if MARKER in there:
            assert there in (whole("old", 3), whole("new"))
        else:
            assert len(set(there.values())) <= 1
            assert content_of(out, MARKER, OTHERS) == []
        write(out, "newer")
        assert held(out) == whole("newer")
        assert not strays(place)
        if not killed:
            return
        assert change < 60


def test_killed_while_a_folder_is_removed_it_has_no_marker(tmp_path, monkeypatch):
    without_renaming_folders(monkeypatch)
    for change in range(1, 20):
        write(tmp_path / "out", "old")
        if not killed_at(change, remove_dir, tmp_path / "out", MARKER):
            break
        there = held(tmp_path / "out") if (tmp_path / "out").exists() else {}
        assert MARKER not in there or there == whole("old")
    assert not (tmp_path / "out").exists()


# ---- strays


def test_what_a_living_process_writes_is_not_a_stray(tmp_path):
    with temporary_folder(tmp_path) as folder:
        remove_strays(tmp_path)
        with temporary_folder(tmp_path):
            assert folder.is_dir()


def test_what_a_dead_process_left_goes_and_what_others_left_stays(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from vglann_fast.run.temporary import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1])) as folder: (folder / 'half').touch(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    (left,) = strays(tmp_path)
    (tmp_path / ".tmp-of-another-program").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / f"{left.name}-link").symlink_to("target")
    write(tmp_path / "out", "new")
    assert held(tmp_path).keys() == {".tmp-of-another-program", "target", f"{left.name}-link", "out"}
    assert held(tmp_path)["target"] == []


def test_a_folder_that_another_program_takes_while_a_stray_is_removed_stays(tmp_path, monkeypatch):
    """The lock is in the folder, so once it is removed another program may make and lock one of its own there."""
    stray = tmp_path / ".tmp-vglann-12345678"
    stray.mkdir()
    monkeypatch.setattr(temporary.secrets, "token_hex", lambda _: "12345678")
    rmtree, begun = shutil.rmtree, []

    def removed_and_taken(folder, **options):
        rmtree(folder, **options)
        if not begun:
            begun.append(temporary_folder(tmp_path / "."))
            begun[0].__enter__()

    monkeypatch.setattr(temporary.shutil, "rmtree", removed_and_taken)
    remove_strays(tmp_path)
    assert stray.is_dir()
    begun[0].__exit__(None, None, None)
    assert not strays(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL])
def test_without_locks_everything_works_but_nothing_is_taken_for_a_stray(tmp_path, monkeypatch, number):
    (tmp_path / ".tmp-vglann-12345678").mkdir()
    fail_where(monkeypatch, "flock", number, lambda *_: True)
    write(tmp_path / "out", "new")
    assert held(tmp_path / "out") == whole("new")
    assert [stray.name for stray in strays(tmp_path)] == [".tmp-vglann-12345678"]
