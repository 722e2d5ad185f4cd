"""Find the videos that a pack is made of: files, folders of videos, of frames, of strips, and their windows.

A `sources.json` beside video files says which frames of a file may be used (credits and titles are not video
one wants to learn), and where the file is from:

    {"format": "vglann-sources", "version": 1,
     "sources": [{"file": "film.mp4", "first_frame": 240, "last_frame": 11600, "credit": "...", ...}]}

A text file NAME.txt given in place of a folder lists strips (`strips.py`), one path a line, relative to the
list; it is how the paper's data set comes. A folder whose first image is a strip is a folder of strips.

`first_frame` and `last_frame` are both included and optional; files not listed are used whole. `fetch.py`
writes such a file; anyone may write one by hand.
"""

import codecs
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vglann_fast.clips.strips import is_strip
from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.run.files import open_regular

SOURCES_FILE = "sources.json"
# fmt: off
VIDEO_EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".wmv", ".flv",
    ".ogv", ".3gp", ".y4m", ".gif",
)
# fmt: on
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LIST_EXTENSION = ".txt"


@dataclass(frozen=True)
class Source:
    """A video file, a folder of frames (`frame_files`: the names in frame order), or a strip."""

    path: Path
    frame_files: tuple[str, ...] = ()
    first_frame: int = 0
    last_frame: int | None = None
    credit: str = ""
    strip: bool = False

    @property
    def name(self) -> str:
        """The name of the file or folder, without the way to it; the same in every locale."""
        return os.fsencode(self.path.absolute().name).decode("utf-8", "surrogateescape")


def find_sources(paths: str | Path | Iterable[str | Path]) -> list[Source]:
    """All videos under the given files and folders, in the order given, folders in natural order of names.

    A file is taken whatever its extension. A folder is searched for files with a video extension, in its
    subfolders too (symbolic links are followed, each real folder once); a folder that has images and no videos
    directly inside is one video, a frame per image, or, if the first of them is a strip, a video per image.
    Hidden files are left out. A text file is a list of strips.
    Raises `VglannError` if a path does not exist or nothing is found.
    """
    sources: list[Source] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            found = _in_folder(path)
            if not found:
                known = " ".join(VIDEO_EXTENSIONS)
                raise VglannError(f"{path}: no videos in this folder (known: {known})")
            sources += found
        elif path.suffix.lower() == LIST_EXTENSION and path.is_file():
            sources += _in_list(path)
        elif path.exists():
            source = _windowed(path, _windows(path.parent))
            sources.append(replace(source, strip=is_strip(path)))
        else:
            raise VglannError(f"{path}: no such file or folder")
    if not sources:
        raise VglannError("no video files or folders given")
    return sources


def content_sha256(path: Path, frame_files: tuple[str, ...] = ()) -> str:
    """sha256 of a video file; of a folder of frames, of the frames' sha256 in order. Names do not enter.

    Raises OSError if a file cannot be read, ValueError with the reason if it is not a file or empty.
    """
    digests = []
    for file in [path / name for name in frame_files] or [path]:
        if not file.is_file():  # to read a pipe would block for ever
            raise ValueError("is not a regular file" if file.exists() else "does not exist")
        if file.stat().st_size == 0:
            raise ValueError("is an empty file")
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256"))
    if not frame_files:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _in_folder(top: Path) -> list[Source]:
    sources: list[Source] = []
    waiting, seen = [top], set()
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue  # a loop of symbolic links
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: natural_key(entry.name))
        except OSError as error:
            raise VglannError(f"{folder}: cannot be listed ({error.strerror})") from error
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        folders = {entry.name: Path(entry) for entry in entries if _is_folder(entry)}
        waiting += reversed(folders.values())
        names = [entry.name for entry in entries if entry.name not in folders]
        videos = [name for name in names if Path(name).suffix.lower() in VIDEO_EXTENSIONS]
        images = [name for name in names if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
        if videos:
            windows = _windows(folder)
            sources += [_windowed(folder / name, windows) for name in videos]
        elif images and is_strip(folder / images[0]):
            sources += [Source(folder / name, strip=True) for name in images]
        elif len(images) > 1:  # a single one is a poster
            sources.append(Source(folder.absolute(), tuple(images)))
    return sources


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder, also at the end of a link.

    Raises `UnreadableError` where the system does not say: what is in a folder must not be left out without a word.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise UnreadableError(
            f"{entry.path}: cannot be read ({error.strerror}); see to its permissions, or remove the link"
        ) from error


def _in_list(path: Path) -> list[Source]:
    """The strips a text file names, one path a line, relative to the file's folder; blank lines do not count.

    A line is a name as it stands, of whatever bytes; if no file has that name, without the white space around it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VglannError(f"{path}: cannot be read as a list of files ({error.strerror})") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise VglannError(f"{path}: is text in UTF-16; save the list as UTF-8")
    # A mark of byte order is what Notepad and Excel begin UTF-8 with.
    lines = [os.fsdecode(line) for line in data.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    names = [line if (path.parent / line).is_file() else line.strip(" \t\v\f") for line in lines]
    if not any((path.parent / name).is_file() for name in names[:100]):
        first = f"; the first is {names[0][:100]!r}" if names else ""
        raise VglannError(
            f"{path}: lists no files that are there, paths count from the list's folder{first}; move the list"
        )
    return [Source(path.parent / name, strip=True) for name in names]


def _windowed(path: Path, windows: dict[str, dict]) -> Source:
    return Source(path, **windows.get(path.name, {}))


def _windows(folder: Path) -> dict[str, dict]:
    """File name -> the first_frame, last_frame and credit of `Source`, from the folder's sources.json."""
    file = folder / SOURCES_FILE
    if not file.is_file():
        return {}
    try:
        with open_regular(file) as stream:
            content = json.load(stream)
        if content["format"] != "vglann-sources" or content["version"] != 1:
            raise ValueError("not version 1 of vglann-sources")
        windows = {}
        for entry in content["sources"]:
            first, last = entry.get("first_frame") or 0, entry.get("last_frame")
            if type(first) is not int or first < 0 or type(last) not in (int, type(None)):
                raise ValueError(f"bad frames of {entry['file']!r}")
            if last is not None and last < first:
                raise ValueError(f"no frames of {entry['file']!r}")
            # JSON is UTF-8; names of files are bytes, which the locale's encoding makes text.
            file_name = os.fsdecode(entry["file"].encode("utf-8", "surrogateescape"))
            windows[file_name] = {
                "first_frame": first,
                "last_frame": last,
                "credit": str(entry.get("credit", "")),
            }
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, RecursionError) as error:
        raise VglannError(f"{file}: not a valid list of sources ({error}); mend or remove it") from error
    return windows
