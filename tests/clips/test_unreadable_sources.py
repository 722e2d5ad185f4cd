"""Sources that cannot be read now: an error, never other clips than there would be."""

import errno
import os
import shutil

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from failing_calls import error, fail_where  # noqa: E402

from vglann_fast.clips.sources import find_sources  # noqa: E402
from vglann_fast.errors import UnreadableError  # noqa: E402


@pytest.fixture
def strips(tmp_path):
    folder = tmp_path / "strips"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        assert cv2.imwrite(str(folder / name), np.zeros((5 * 128, 128, 3), np.uint8))
    return folder


@pytest.mark.parametrize("name", ["EBUSY", "EACCES", "EIO", "ESTALE"])
def test_a_strip_that_cannot_be_read_does_not_make_its_folder_a_video(strips, monkeypatch, name):
    assert [source.strip for source in find_sources(strips)] == [True, True]
    fail_where(monkeypatch, "open", getattr(errno, name), lambda path, *_: str(path).endswith("a.jpg"))
    with pytest.raises(UnreadableError, match=r"a\.jpg"):
        find_sources(strips)


def test_an_image_that_is_no_picture_still_makes_its_folder_a_video(strips):
    (strips / "a.jpg").write_bytes(b"")
    assert [source.strip for source in find_sources(strips)] == [False]


class Entry:
    """An entry of a folder whose link leads to where the system does not look."""

    def __init__(self, entry):
        self.name, self.path = entry.name, entry.path

    def __fspath__(self):
        return self.path

    def is_dir(self):
        raise error(errno.EACCES, self.path)


def test_a_linked_folder_that_cannot_be_looked_into_is_not_left_out(strips, tmp_path, monkeypatch):
    top = tmp_path / "top"
    top.mkdir()
    shutil.copy(strips / "a.jpg", top)
    (top / "nowhere").symlink_to("missing")
    (top / "loop").symlink_to("loop")
    assert [source.path.name for source in find_sources(top)] == ["a.jpg"]
    (top / "linked").symlink_to(strips)
    assert [source.path.name for source in find_sources(top)] == ["a.jpg", "a.jpg", "b.jpg"]
    listed = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: [Entry(e) if e.name == "linked" else e for e in listed(path)]
    )
    with pytest.raises(UnreadableError, match="linked"):
        find_sources(top)
