"""Destinations: wherever the user points, and whatever the file system there cannot do."""

import errno
import os
import stat

import pytest
from destination import MARKER, held, strays, whole, write
from failing_calls import error, fail_where, without_renaming_folders

from vglann_fast.errors import VglannError
from vglann_fast.run import temporary
from vglann_fast.run.destinations import atomic_dir, atomic_file, content_of, remove_dir

# ---- what the user names


def test_an_older_folder_is_replaced_and_what_is_not_ours_stays(tmp_path):
    out = tmp_path / "out"
    write(out, "old", parts=3)
    (out / "thesis.txt").write_text("a thesis")
    write(out, "new")
    assert held(out) == {**whole("new"), "thesis.txt": "a thesis"}
    assert held(tmp_path).keys() == {"out"}


def test_an_empty_folder_is_filled_where_it_is(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    before = out.stat()
    write(out, "new")
    assert held(out) == whole("new")
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "scratch" / "clips").mkdir(parents=True)
    for name, target in (("there", "scratch/clips"), ("dangling", "scratch/deep/new")):
        link = tmp_path / name
        link.symlink_to(target)
        for word in ("old", "new"):
            write(link, word)
        assert link.is_symlink()
        assert held(tmp_path / target) == whole("new")
    assert not strays(tmp_path)


@pytest.mark.parametrize("name", ["out/", "./out", "deep/../out", "out/."])
def test_spellings_of_one_folder(tmp_path, monkeypatch, name):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    for word in ("old", "new"):
        write(name, word)
    assert held(tmp_path / "out") == whole("new")


@pytest.mark.parametrize("name", [".", ""])
def test_the_current_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(name, "new")
    assert held(tmp_path) == whole("new")


def test_a_relative_path_counts_from_where_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_dir("out") as folder, atomic_file("file") as file:
        (folder / MARKER).write_text("new")
        file.write_text("new")
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
    assert held(tmp_path) == {"out": [MARKER], "file": "new", "elsewhere": []}


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("x" * 256, "shorter"),
        ("x" * 256 + "/out", "folder"),
        ("/".join(["x" * 200] * 30), "folder"),
        ("loop", "link"),
        ("loop/out", "folder"),
        ("file", "choose another"),
        ("file/out", "choose another"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_one_line(tmp_path, name, remedy):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(VglannError, match=remedy), atomic_dir(tmp_path / name):
        pytest.fail("the work has begun")
    if name != "file":
        with (
            pytest.raises(VglannError),
            atomic_file(tmp_path / name / "x" if "/" in name else tmp_path / name),
        ):
            pytest.fail("the work has begun") if "/" in name else None
    assert sorted(tmp_path.iterdir()) == before


def test_what_the_system_puts_into_a_folder_does_not_count(tmp_path):
    for name in ("lost+found", ".DS_Store", ".nfs000000000000001"):
        (tmp_path / name).mkdir()
    assert content_of(tmp_path) == []
    assert content_of(tmp_path / "nowhere") == []
    write(tmp_path, "new")
    assert len(content_of(tmp_path)) == 3


def test_folders_above_it_that_were_made_go_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a" / "b" / "file"):
        raise RuntimeError
    assert not held(tmp_path)


# ---- permissions


def test_setgid_and_umask_hold_for_what_is_written(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o002)
    try:
        for _ in range(2):
            write(shared / "out", "new")
        with atomic_file(shared / "file") as file:
            file.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((shared / "out").stat().st_mode) == 0o2775
    for file in (shared / "out" / MARKER, shared / "file"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o664


def test_chmod_is_not_needed(tmp_path, monkeypatch):
    for call in ("chmod", "fchmod", "lchmod"):
        if hasattr(os, call):
            fail_where(monkeypatch, call, errno.EPERM, lambda *_: True)
    for word in ("old", "new"):
        write(tmp_path / "out", word)
    with atomic_file(tmp_path / "file") as file:
        file.write_text("new")
    assert held(tmp_path / "out") == whole("new")


@pytest.mark.parametrize("call", ["mkdir", "rename", "replace", "rmdir"])
def test_the_folder_above_one_that_is_there_need_not_be_writable(tmp_path, monkeypatch, call):
    out = tmp_path / "out"
    out.mkdir()
    for word in ("old", "new"):
        refused = fail_where(
            monkeypatch, call, errno.EACCES, lambda path, *_: os.path.dirname(path) == str(tmp_path)
        )
        write(out, word)
        assert not refused
    assert held(out) == whole("new")


# ---- what a file system cannot do


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS", "EACCES", "EPERM", "EBADF"])
def test_flushing_is_left_out_where_there_is_none(tmp_path, monkeypatch, name):
    failed = fail_where(monkeypatch, "fsync", getattr(errno, name), lambda _: True)
    write(tmp_path / "out", "new")
    with atomic_file(tmp_path / "file") as file:
        file.write_text("new")
    assert failed
    assert held(tmp_path) == {"out": sorted(whole("new")), "file": "new"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_flushing_that_fails_is_an_error(tmp_path, monkeypatch, number):
    write(tmp_path / "out", "old")
    fail_where(monkeypatch, "fsync", number, lambda _: True)
    with pytest.raises(VglannError, match=r"out: .*disk"):
        write(tmp_path / "out", "new")
    assert held(tmp_path / "out") == whole("old")
    assert held(tmp_path).keys() == {"out"}


def test_folders_that_cannot_be_renamed(tmp_path, monkeypatch):
    """In a lower layer of an overlay, and on object stores: the files are moved one by one."""
    failed = without_renaming_folders(monkeypatch)
    for word in ("old", "new"):
        write(tmp_path / "out", word)
    assert held(tmp_path / "out") == whole("new")
    remove_dir(tmp_path / "out", MARKER)
    assert not held(tmp_path)
    assert any(failed)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.ENOTSUP])
def test_files_that_cannot_be_renamed_either_are_copied(tmp_path, monkeypatch, number):
    for call in ("rename", "replace"):
        fail_where(monkeypatch, call, number, lambda *_: True)
    for word in ("old", "new"):
        write(tmp_path / "out", word)
        with atomic_file(tmp_path / "file") as file:
            file.write_text(word)
    assert held(tmp_path / "out") == whole("new")
    assert held(tmp_path) == {"out": sorted(whole("new")), "file": "new"}


def test_a_folder_that_is_a_mount_point_stays_where_it_is(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for call in ("rename", "replace", "rmdir"):
        fail_where(monkeypatch, call, errno.EBUSY, lambda *paths: str(out) in map(str, paths))
    for word in ("old", "new"):
        write(out, word)
    assert held(out) == whole("new")


def test_a_file_that_is_a_mount_point_is_written_in_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    fail_where(monkeypatch, "replace", errno.EBUSY, lambda *_: True)
    with atomic_file(tmp_path / "file") as file:
        file.write_text("new")
    assert held(tmp_path) == {"file": "new"}


def test_a_link_in_place_of_a_file_is_never_written_through(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("a thesis")
    (tmp_path / "file").symlink_to("thesis.txt")
    with monkeypatch.context() as patch:
        fail_where(patch, "replace", errno.EBUSY, lambda *_: True)
        with pytest.raises(VglannError), atomic_file(tmp_path / "file") as file:
            file.write_text("new")
    with atomic_file(tmp_path / "file") as file:
        file.write_text("new")
    assert held(tmp_path) == {"thesis.txt": "a thesis", "file": "new"}
    assert not (tmp_path / "file").is_symlink()


def test_files_that_vanish_only_once_they_are_closed_keep_no_folder(tmp_path, monkeypatch):
    """NFS and FUSE give such a file another name, so that its folder is not empty for a moment."""
    rmdir, left = os.rmdir, [2]

    def busy(path, **options):
        if left[0]:
            left[0] -= 1
            raise error(errno.ENOTEMPTY, path)
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    write(tmp_path / "out", "new")
    assert held(tmp_path).keys() == {"out"}
    assert left == [0]


def test_scratch_files_that_stay_are_not_part_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary.shutil, "rmtree", lambda *_, **__: None)
    with atomic_dir(tmp_path / "out", MARKER) as folder:
        folder.with_name("scratch").mkdir()
        (folder / MARKER).write_text("new")
    assert held(tmp_path / "out") == {MARKER: "new"}
