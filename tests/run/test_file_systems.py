"""Destinations on real file systems, mounted for the test. What they cannot do is made up in test_destinations.py."""

import os
import shutil

import pytest
import torch
from destination import MARKER, held, strays, whole, write
from mounts import can_mount, immutable, mount, mounted, overlay, read_only, tmpfs

from vglann_fast.errors import VglannError
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.folder import RunDir

needs_mounts = pytest.mark.skipif(not can_mount(), reason="mounting needs root and the right to mount")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@needs_mounts
def test_a_mount_point_is_filled(tmp_path):
    with tmpfs(tmp_path / "out") as out:
        for word in ("old", "new"):
            write(out, word)
        assert held(out) == whole("new")
        assert out.is_mount()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@needs_mounts
def test_a_file_that_is_a_mount_point_is_written(tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    for each in (file, other):
        each.write_text("old")
    with mounted(file, "mount", "--bind", other), atomic_file(file) as temporary:
        temporary.write_text("new")
    assert held(tmp_path) == {"file": "old", "other": "new"}


@needs_mounts
def test_folders_of_an_image_are_replaced_pruned_and_kept_beside(tmp_path):
    """A lower layer of an overlay: its files can be renamed, its folders cannot."""
    lower = tmp_path / "lower"
    write(lower / "clips", "old", parts=3)
    (lower / "clips" / "thesis.txt").write_text("a thesis")
    run = RunDir.new(lower / "run", {}).begin()
    for step in (1, 2):
        run.checkpoints.save(step, {"part": {"x": torch.ones(1)}}, {"ids": []})
    with overlay(tmp_path / "image", lower) as image:
        with pytest.raises(OSError, match="cross-device"):
            (image / "clips").rename(image / "moved")
        write(image / "clips", "new")
        assert held(image / "clips") == {**whole("new"), "thesis.txt": "a thesis"}
        run = RunDir(image / "run", {})
        run.checkpoints.save(3, {"part": {"x": torch.ones(1)}}, {"ids": []}, keep=1)
        assert [folder.name for folder in run.checkpoints.folders()] == ["step-00000003"]
        assert run.warnings == []
        assert not strays(image)


@needs_mounts
def test_a_read_only_folder_is_one_line_before_the_work(tmp_path):
    write(tmp_path / "out", "old")
    with read_only(tmp_path / "out") as out:
        with pytest.raises(VglannError, match="read-only"):
            write(out, "new")
        assert held(out) == whole("old")


@needs_mounts
@pytest.mark.parametrize("where", ["folder", "marker"])
def test_what_may_not_be_changed_stays_and_the_new_files_are_kept(tmp_path, where):
    out = tmp_path / "out"
    write(out, "old")
    try:
        with immutable(out if where == "folder" else out / MARKER):
            with pytest.raises(VglannError, match="permission denied") as caught:
                write(out, "new")
            assert whole("old").items() <= held(out).items()
    except OSError as error:
        pytest.skip(f"no immutable files here: {error}")
    kept = list(out.glob("vglann-kept-*"))
    assert [held(folder) for folder in kept] == ([whole("new")] if where == "marker" else [])
    assert all(str(folder) in str(caught.value) for folder in kept)
    assert not strays(tmp_path)


@needs_mounts
@pytest.mark.skipif(not (shutil.which("ntfs-3g") and shutil.which("mkfs.ntfs")), reason="needs ntfs-3g")
def test_a_file_system_in_user_space(tmp_path):
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(2**26)
    mount("mkfs.ntfs", "-F", "-Q", image)
    try:
        with mounted(folder, "ntfs-3g", image):
            for word in ("old", "new"):
                write(folder / "out", word)
            assert held(folder) == {"out": sorted(whole("new"))}
    except OSError as error:
        pytest.skip(f"ntfs-3g cannot mount here: {error}")


@needs_root
def test_an_own_folder_in_one_that_is_not_writable(tmp_path):
    """As of `docker run -u UID -v host:/out`."""
    top, out = tmp_path / "top", tmp_path / "top" / "out"
    out.mkdir(parents=True)
    shutil.chown(out, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o005:
            folder.chmod(folder.stat().st_mode | 0o005)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for word in ("old", "new"):
                write(out, word)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(process, 0)[1] == 0
    assert held(out) == whole("new")
    assert [entry.name for entry in top.iterdir()] == ["out"]
