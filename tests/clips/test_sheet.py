"""sheet.py: the layout of contact sheets, and pictures that come back as they were."""

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from vglann_fast.clips.sheet import contact_sheet, write_png  # noqa: E402


def test_rows_are_videos_and_columns_evenly_spaced_frames():
    videos = np.random.default_rng(0).integers(0, 255, (2, 3, 15, 5, 7), np.uint8)
    sheet = contact_sheet(videos)
    assert sheet.shape == (2 * 7 - 2, 8 * 9 - 2, 3)
    for row in range(2):
        for column in range(8):
            cell = sheet[7 * row : 7 * row + 5, 9 * column : 9 * column + 7]
            np.testing.assert_array_equal(cell, videos[row, :, 2 * column].transpose(1, 2, 0))
    assert (sheet[5:7] == 255).all()
    assert (sheet[:, 7:9] == 255).all()


def test_short_videos_show_all_frames():
    videos = np.arange(3, dtype=np.uint8).reshape(1, 1, 3, 1, 1).repeat(3, axis=1)
    assert contact_sheet(videos)[0, ::3, 0].tolist() == [0, 1, 2]
    assert contact_sheet(videos, frames=1).shape == (1, 1, 3)


@pytest.mark.parametrize(
    "videos",
    [np.zeros((1, 3, 4, 8, 8)), np.zeros((3, 4, 8, 8), np.uint8), np.zeros((0, 3, 4, 8, 8), np.uint8)],
)
def test_other_arrays_are_refused(videos):
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet(videos)


def test_png_keeps_the_colors(tmp_path):
    image = np.random.default_rng(1).integers(0, 255, (9, 12, 3), np.uint8)
    write_png(tmp_path / "new" / "a.png", image)
    read = cv2.imread(str(tmp_path / "new" / "a.png"))[..., ::-1]  # OpenCV reads BGR
    np.testing.assert_array_equal(read, image)
