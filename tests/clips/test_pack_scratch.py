"""Temporary files go though FUSE and NFS rename, and do not remove, what is still mapped."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("cv2")

from decoding import pictures  # noqa: E402
from video_files import write_video  # noqa: E402

from vglann_fast.clips import decode as decode_module  # noqa: E402
from vglann_fast.clips import writer as writer_module  # noqa: E402
from vglann_fast.clips.cut import PackOptions, cut  # noqa: E402
from vglann_fast.clips.dataset import ClipSet  # noqa: E402
from vglann_fast.clips.decode import DecodedVideo, DecodeJob, DecodeLimits, decode_all  # noqa: E402
from vglann_fast.clips.pack import pack  # noqa: E402
from vglann_fast.clips.shots import find_shots  # noqa: E402
from vglann_fast.clips.sources import Source  # noqa: E402
from vglann_fast.clips.writer import ClipWriter  # noqa: E402

MAPS = Path("/proc/self/maps")
OPTIONS = {"frames": 4, "size": 32, "workers": 1}


@pytest.fixture
def renamed(monkeypatch):
    """Files that were still mapped when they were removed, and were renamed as NFS and FUSE do."""
    if not MAPS.exists():
        pytest.skip("needs /proc to see what is mapped")
    hidden = []
    remove = os.unlink

    def unlink(path, *args, dir_fd=None, **kwargs):
        name = os.fspath(path) if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}") + f"/{path}"
        if not os.path.lexists(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        name = os.path.realpath(os.path.dirname(name)) + f"/{os.path.basename(name)}"
        if f" {name}\n" in MAPS.read_text():
            hidden.append(name)
            os.rename(name, f"{os.path.dirname(name)}/.nfs{len(hidden):08d}")
        else:
            remove(name)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: _unlink(unlink, self, missing_ok))
    return hidden


def _unlink(unlink, path, missing_ok):
    try:
        unlink(path)
    except FileNotFoundError:
        if not missing_ok:
            raise


def videos(folder, count=3):
    folder.mkdir()
    for number in range(count):
        write_video(folder / f"{number}.mkv", pictures(12 + number))
    return folder


def test_the_stand_in_renames_what_is_mapped(tmp_path, renamed):
    (tmp_path / "a").write_bytes(bytes(100))
    mapped = np.memmap(tmp_path / "a", np.uint8, "r")
    (tmp_path / "a").unlink()
    assert [Path(name).name for name in renamed] == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == [".nfs00000001"]
    assert mapped.sum() == 0


def test_nothing_is_mapped_when_files_are_removed(tmp_path, renamed):
    pack(videos(tmp_path / "videos"), tmp_path / "clips", **OPTIONS)
    assert renamed == []
    assert not (tmp_path / "clips" / "scratch").exists()


needs_smaps = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="needs /proc to see what is in memory"
)


def mapped_file(file, shape):
    """A mapped file of zeros, all of which is in memory."""
    np.zeros(shape, np.uint8).tofile(file)
    array = np.memmap(file, np.uint8, "r", shape=shape)
    assert array.sum() == 0
    assert resident(file) >= array.nbytes // 1024
    return array


def resident(file):
    """KiB of a mapped file that are in memory."""
    _, found = Path("/proc/self/smaps").read_text().split(str(file))
    return int(found.split("Rss:")[1].split()[0])


@needs_smaps
def test_frames_that_were_cut_do_not_stay_in_memory(tmp_path):
    """An hour of video is gigabytes of mapped frames, and Dask ends a worker that has as much in memory."""
    file = tmp_path / "a.tiles"
    tiles = mapped_file(file, (400, 1, 64, 64, 3))
    video = DecodedVideo("0" * 64, False, [[0, 0, 64, 64]], (64, 64), tiles, tiles, None, (file,))
    for _ in cut(video, [(0, 400)], 0, PackOptions(frames=4, size=64)):
        assert resident(file) < tiles.nbytes // 4096
    video.discard()


@needs_smaps
def test_thumbnails_do_not_stay_in_memory_once_the_shots_are_found(tmp_path, monkeypatch):
    file, kept = tmp_path / "a.thumbnails", []
    thumbnails = mapped_file(file, (400, 27, 48, 3))
    tiles = np.zeros((400, 1, 64, 64, 3), np.uint8)
    video = DecodedVideo("0" * 64, False, [[0, 0, 64, 64]], (64, 64), tiles, thumbnails, None, (file,))

    def cut(*_, **__):
        kept.append(resident(file))
        return ()

    monkeypatch.setattr(writer_module, "cut", cut)
    writer = ClipWriter(tmp_path, PackOptions(size=64))
    writer.add_video(Source(Path("a.mkv")), video, find_shots)
    assert kept[0] < thumbnails.nbytes // 4096


def test_a_pack_that_fails_removes_its_files_too(tmp_path, renamed, monkeypatch):
    def full(*_):
        raise OSError(errno.EIO, "Input/output error")

    folder = videos(tmp_path / "videos")
    monkeypatch.setattr(writer_module._Shards, "write", full)
    with pytest.raises(Exception, match="disk"):
        pack(folder, tmp_path / "clips", **OPTIONS)
    assert renamed == []
    assert [file.name for file in tmp_path.iterdir()] == ["videos"]


def test_results_that_nobody_took_are_removed(tmp_path, renamed):
    files = [DecodeJob(file) for file in sorted(videos(tmp_path / "videos", 4).iterdir())]
    (tmp_path / "scratch").mkdir()
    results = decode_all(files, tmp_path / "scratch", DecodeLimits(), 2)
    next(results).discard()
    results.close()
    assert renamed == []
    assert not list((tmp_path / "scratch").glob("*.tiles"))


def test_files_of_a_child_whose_pipe_was_closed_in_the_middle_are_removed(tmp_path, monkeypatch):
    """The thread that waits for the child then sees an error of the pipe, not an answer."""

    def closed(_, request):
        for file in request["outputs"]:
            Path(file).touch()
        raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(decode_module.Decoder, "_ask", closed)
    (tmp_path / "scratch").mkdir()
    results = decode_all([DecodeJob(tmp_path / "a.mkv")], tmp_path / "scratch", DecodeLimits(), 1)
    with pytest.raises(ValueError, match="closed file"):
        next(results)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_scratch_folder_that_stays_does_not_lose_the_clips(tmp_path, monkeypatch):
    """Another process, a virus scanner say, has a file of it open."""
    real = shutil.rmtree

    def busy(path, ignore_errors=False, **kwargs):
        if Path(path).name != "scratch":
            real(path, ignore_errors=ignore_errors, **kwargs)
        elif not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    def not_empty(path, **_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    monkeypatch.setattr(os, "rmdir", not_empty)
    pack(videos(tmp_path / "videos", 1), tmp_path / "clips", **OPTIONS)
    assert len(ClipSet.open(tmp_path / "clips")) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
@pytest.mark.skipif(
    not (shutil.which("ntfs-3g") and shutil.which("mkfs.ntfs") and Path("/dev/fuse").exists()),
    reason="needs ntfs-3g, a file system in FUSE",
)
def test_packing_on_fuse(tmp_path):
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(2**26)
    subprocess.run(["mkfs.ntfs", "-F", "-Q", image], check=True, capture_output=True)
    if subprocess.run(["ntfs-3g", image, mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        pack(videos(tmp_path / "videos"), mount / "clips", **OPTIONS)
        assert len(ClipSet.open(mount / "clips")) == 9
        assert [entry.name for entry in mount.iterdir()] == ["clips"]
    finally:
        # Lazily, so that a file which is still open does not keep the mount.
        subprocess.run(["umount", "-l", mount], check=True)
