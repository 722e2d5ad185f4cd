"""`clips pack` into folders that people have: what is theirs stays, and of two packs neither is lost."""

import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")

from decoding import pictures
from video_files import write_video

from vglann_fast.clips import writer as writer_module
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pack import pack
from vglann_fast.clips.sheet import show
from vglann_fast.errors import VglannError

OPTIONS = {"frames": 4, "size": 32, "workers": 1}


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mkv", pictures(16))
    return folder


def meanwhile(monkeypatch, action):
    """Do something once the decoding is over."""
    check = writer_module._check_enough
    monkeypatch.setattr(
        writer_module, "_check_enough", lambda *args: (monkeypatch.undo(), action(), check(*args))
    )


def test_overwriting_keeps_what_is_the_users(videos, tmp_path):
    out = tmp_path / "clips"
    pack(videos, out, **OPTIONS)
    show(out, out / "sheet.png")
    (out / "thesis.txt").write_text("a thesis")
    (out / "notes").mkdir()
    pack(videos, out, **OPTIONS | {"frames": 8}, overwrite=True)
    assert len(ClipSet.open(out)) == 2
    assert (out / "thesis.txt").read_text() == "a thesis"
    assert (out / "notes").is_dir()
    assert not (out / "sheet.png").exists()  # it showed the older clips


def test_a_file_that_came_meanwhile_is_not_lost(videos, tmp_path, monkeypatch):
    out = tmp_path / "clips"

    def write_a_thesis():
        out.mkdir()
        (out / "thesis.txt").write_text("a thesis")

    meanwhile(monkeypatch, write_a_thesis)
    with pytest.raises(VglannError, match=r"thesis\.txt .*kept as"):
        pack(videos, out, **OPTIONS)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    (kept,) = tmp_path.glob("vglann-kept-*")
    assert len(ClipSet.open(kept)) == 4


@pytest.mark.parametrize("there", [False, True])
def test_of_two_packs_into_one_folder_neither_is_lost(videos, tmp_path, monkeypatch, there):
    out = tmp_path / "clips"
    if there:
        out.mkdir()
    meanwhile(monkeypatch, lambda: pack(videos, out, **OPTIONS | {"frames": 8}))
    with pytest.raises(VglannError, match=r"index\.json.*kept as"):
        pack(videos, out, **OPTIONS)
    assert len(ClipSet.open(out)) == 2
    (kept,) = tmp_path.rglob("vglann-kept-*")
    assert len(ClipSet.open(kept)) == 4


def test_what_a_killed_pack_left_in_a_folder_goes_though_its_clips_are_reused(videos, tmp_path):
    out = tmp_path / "clips"
    pack(videos, out, **OPTIONS)
    for name in (".tmp-vglann-12345678/old", ".tmp-of-another-program"):
        (out / name).mkdir(parents=True)
    assert pack(videos, out, **OPTIONS).reused
    assert [path.name for path in out.glob(".tmp*")] == [".tmp-of-another-program"]


@pytest.mark.parametrize("name", ["lost+found", ".DS_Store"])
def test_what_the_system_puts_there_is_not_in_the_way(videos, tmp_path, name):
    out = tmp_path / "clips"
    (out / name).mkdir(parents=True)
    pack(videos, out, **OPTIONS)
    assert len(ClipSet.open(out)) == 4
    assert pack(videos, out, **OPTIONS).reused
