"""The work of a Dask worker for `cluster.py`: packing one video as a part of a pack."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from threading import Lock, Timer

from vglann_fast import __version__
from vglann_fast.clips.cut import PackOptions
from vglann_fast.clips.decode import DecodeLimits, Decoder
from vglann_fast.clips.parts import Part
from vglann_fast.clips.sources import Source
from vglann_fast.clips.writer import ClipWriter, decode_job, finder_of
from vglann_fast.errors import VglannError
from vglann_fast.run.os_errors import described

TOKEN_FILE = "token"
IDLE_SECONDS = 60  # after which a decoder ends

# Decoders that wait for the next video, since starting one takes longer than decoding a short video.
_idle: list[tuple[Decoder, Timer]] = []
_lock = Lock()


@dataclass(frozen=True)
class Job:
    """The arguments that all tasks have in common.

    folder: shared by all workers; its file `TOKEN_FILE` holds `token`. whole: part 1 of the pack that all tasks make.
    """

    folder: Path
    token: str
    versions: dict[str, str]
    options: PackOptions
    limits: DecodeLimits
    whole: Part


def versions(options: PackOptions) -> dict[str, str]:
    """Return the versions on which the content of a clip folder may depend."""
    names = ["distributed", "numpy", "av", "cv2"]
    if options.shots.startswith("transnetv2"):
        names.append("torch")
    python = ".".join(platform.python_version_tuple()[:2])
    found = {"Python": python, "vglann-fast": __version__}
    for name in names:
        try:
            found[name] = str(import_module(name).__version__)
        except ImportError:
            found[name] = "none"
    return found


def check_worker(job: Job) -> None:
    """Raise `VglannError` if this process cannot do the job as the process that gave it would."""
    here = versions(job.options)
    differing = [
        f"{name} {here[name]}, not {wanted}" for name, wanted in job.versions.items() if here[name] != wanted
    ]
    if differing:
        raise VglannError(f"has {'; '.join(differing)}; install the same on all machines")
    try:
        token = (job.folder / TOKEN_FILE).read_text()
    except OSError:
        token = ""
    if token != job.token:
        raise VglannError(
            f"does not see {job.folder.parent.parent}; choose an --out in a folder that all workers share"
        )


def pack_video(job: Job, number: int, source: Source, there: bool) -> str:
    """Pack a video as part `number` of the job, counted from 0, on a worker; return the name of the part's folder.

    there: whether the process that gave the job has seen the video's file.
    """
    from distributed import get_worker

    worker = get_worker()
    folder = job.folder / f"{number}-{token_hex(4)}"
    try:
        check_worker(job)
        if there and not os.path.exists(source.path):
            raise VglannError(f"does not see {source.path}; give videos in a folder that all workers share")
        folder.mkdir()
        with (
            TemporaryDirectory(dir=worker.local_directory, ignore_cleanup_errors=True) as scratch,
            closing(ClipWriter(folder, job.options)) as writer,
            _decoder(job.limits) as decoder,
        ):
            video = decoder.decode(decode_job(source, job.options), Path(scratch) / "video")
            writer.add_video(source, video, finder_of(job.options))
            writer.finish(replace(job.whole, number=number + 1))
    except (VglannError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        said = described(error, error.filename) if isinstance(error, OSError) else error
        raise VglannError(f"worker {worker.address}: {said}") from error
    return folder.name


@contextmanager
def _decoder(limits: DecodeLimits) -> Iterator[Decoder]:
    """Lend a decoder of this worker for the block. One that fails, or that nobody needs for a while, is ended."""
    decoder = _waiting(limits) or Decoder(limits)
    try:
        yield decoder
    except BaseException:
        decoder.close()
        raise
    timer = Timer(IDLE_SECONDS, lambda: _end(decoder))
    timer.daemon = True
    with _lock:
        _idle.append((decoder, timer))
    timer.start()


def _waiting(limits: DecodeLimits) -> Decoder | None:
    """Take a decoder with these limits from those that wait."""
    with _lock:
        for entry in _idle:
            if entry[0].limits == limits:
                _idle.remove(entry)
                entry[1].cancel()
                return entry[0]
    return None


def _end(decoder: Decoder) -> None:
    """End a decoder if it still waits."""
    with _lock:
        entries = [entry for entry in _idle if entry[0] is decoder]
        for entry in entries:
            _idle.remove(entry)
    if entries:
        decoder.close()
