"""A ClipSet goes to another process as a folder and rows, not as clips."""

import copy
import multiprocessing
import os
import pickle

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("cv2")

from decoding import pictures  # noqa: E402
from video_files import write_video  # noqa: E402

from vglann_fast.clips.dataset import ClipSet  # noqa: E402
from vglann_fast.clips.pack import pack  # noqa: E402
from vglann_fast.errors import VglannError  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    video = write_video(tmp_path / "a.mkv", pictures(32))
    pack(video, tmp_path / "clips", frames=4, size=32, workers=1)
    return tmp_path / "clips"


def test_a_pickle_holds_no_clips_and_reads_them(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = ClipSet.open("clips")
    data = pickle.dumps(clips)
    assert len(data) < 1000 < clips.read().nbytes
    monkeypatch.chdir(os.sep)  # a worker may have another current folder
    for other in (pickle.loads(data), copy.deepcopy(clips)):
        assert (other.ids, other.clips, other.sources) == (clips.ids, clips.clips, clips.sources)
        np.testing.assert_array_equal(other.read(), clips.read())


def test_a_pickle_keeps_the_split(tmp_path):
    video = write_video(tmp_path / "a.mkv", pictures(32))
    pack(video, tmp_path / "clips", frames=4, size=32, workers=1, test_fraction=0.999)
    clips = ClipSet.open(tmp_path / "clips", "test")
    assert pickle.loads(pickle.dumps(clips)).ids == clips.ids


def test_spawned_workers_read_the_clips(folder):
    clips = ClipSet.open(folder)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(ClipSet.read, (clips, [3, 0]))
    np.testing.assert_array_equal(there, clips.read([3, 0]))


def test_a_folder_that_was_packed_again_is_not_taken_for_the_old_one(folder, tmp_path):
    data = pickle.dumps(ClipSet.open(folder))
    pack(tmp_path / "a.mkv", folder, frames=8, size=32, workers=1, overwrite=True)
    with pytest.raises(VglannError, match="packed again"):
        pickle.loads(data)
