"""`vf.Videos`: an array that shows itself, and stays an array."""

import base64
import io
import pickle
import re

import av
import numpy as np
import pytest

import vglann_fast as vf
from vglann_fast.experiments.moving_squares import moving_squares


@pytest.fixture
def videos():
    return vf.Videos(moving_squares(5))


def test_slices_are_videos_and_everything_else_is_a_plain_array(videos):
    for kept in (videos[:2], videos[[0, 3]], videos[:, :, ::2], videos[..., 4:20]):
        assert isinstance(kept, vf.Videos)
    for plain in (videos[0], videos[0, 0, 0], videos[:, :1], videos / 255, videos == videos, *videos):
        assert type(plain) is np.ndarray
    assert isinstance(videos[0, 0, 0, 0, 0], np.uint8)
    assert videos.mean() == np.asarray(videos).mean()


def test_videos_are_pickled_as_what_they_are(videos):
    copied = pickle.loads(pickle.dumps(videos))
    assert isinstance(copied, vf.Videos)
    assert np.array_equal(copied, videos)


def test_a_page_plays_the_first_videos_and_counts_all(videos):
    page = vf.Videos(np.concatenate([videos] * 4))._repr_html_()
    assert "20 videos" in page
    data = base64.b64decode(re.search(r'src="data:image/gif;base64,([^"]+)"', page).group(1))
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 16
    assert frames[0].shape[0] < 5 * 32 + 20  # a grid of 16 videos, not of 20
    error = np.abs(frames[3][:32, :32].astype(int) - videos[0, :, 3].transpose(1, 2, 0).astype(int))
    assert error.mean() < 16  # 256 colors


def test_what_is_not_videos_shows_its_numbers(videos):
    assert videos.astype(np.float32)._repr_html_() is None
    assert videos[:0]._repr_html_() is None


@pytest.mark.parametrize("name", ["a.gif", "b.MP4"])
def test_videos_are_saved_side_by_side(videos, tmp_path, name):
    path = videos.save(tmp_path / "folder" / name)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 16
    assert frames[0].shape == (66, 100, 3)  # two rows of three videos with gaps


def test_another_shape_or_suffix_is_refused(videos, tmp_path):
    for wrong in (videos[0], videos / 255, np.zeros((2, 1, 16, 32, 32), np.uint8)):
        with pytest.raises(vf.VglannError, match="uint8"):
            vf.Videos(wrong)
    with pytest.raises(vf.VglannError, match=r"\.gif or \.mp4"):
        videos.save(tmp_path / "videos.avi")
    assert not list(tmp_path.iterdir())
