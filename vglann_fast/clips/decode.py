"""One video file (or folder of frames) -> small RGB frames, in a process that may be killed.

Foreign video is hostile: files hang, crash the decoder or declare frames of gigabytes. So every file is
decoded in a child process (`decode_child.py`) with a memory limit, and the parent kills it when its time is up.
A file that cannot be used comes back as a reason, in words; it never takes the program with it.

Frames are cropped and area-resized one by one as they are decoded; full-size frames are never kept. What
comes back lies in temporary files, mapped, not read:

    tiles       uint8 (frames, tiles, size, size, 3)  RGB, the square crops clips are made of
    thumbnails  uint8 (frames, 27, 48, 3)             RGB, the whole frame squeezed, to find the shots in;
                                                       none of a strip, which is one shot

and, where clips are to be stabilized, in place of the tiles, which can only be cut afterwards,

    tiles       uint8 (frames, 1, h, w, 3)            RGB, the whole frame, its tiles twice as large as clips
    motions     float64 (frames, 12)                  of the camera, see `stabilize.py`

Frames are taken as stored, one after the other: timestamps are not looked at, so a variable frame rate stays.
A file that was cut off is rejected (`truncation.py`). Cover art is not video. The display matrix (rotation,
mirroring; EXIF of images too) and the pixel aspect ratio are applied: a tile is square on the screen. Colors are
converted by the matrix and range the file declares (BT.601 limited where it declares none), 10 and more bits are
scaled to 8, HDR is not tone-mapped, and transparency is laid over white, as a browser shows it.

The child reads one JSON job a line on stdin and answers one JSON line each on stdout. It raises no limit that it
finds. Where the machine or its limits keep it from working, that is an error, and no video is rejected for it.
"""

import dataclasses
import json
import math
import mmap
import os
import select
import signal
import subprocess
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vglann_fast.clips.child_command import child_command
from vglann_fast.clips.numbers import real, switch, whole
from vglann_fast.errors import UnreadableError, VglannError

THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH = 27, 48
# A child is replaced after this many files, so that a decoder that leaks cannot eat the machine.
_FILES_PER_CHILD = 200
READY = b"the decoder is ready\n"


@dataclass(frozen=True)
class DecodeLimits:
    """Limits for decoding one file. Over `seconds` or `memory_mb` or `max_pixels` the file is rejected.

    Of a file with more than `max_frames` frames the rest is left out; the default is an hour at 30 frames a
    second. `memory_mb` is in MiB and counts what decoding adds to an idle child.
    Raises `VglannError` for a value that is not above 0.
    """

    seconds: float = 1800.0
    memory_mb: int = 2048
    max_frames: int = 108_000
    max_pixels: int = 8192 * 4320

    def __post_init__(self) -> None:
        expected = "above 0 and below 2**31"
        seconds = real("seconds", self.seconds, expected, 1e-9, 2**31)
        object.__setattr__(self, "seconds", seconds)
        for name in ("memory_mb", "max_frames", "max_pixels"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1, 2**31))


@dataclass(frozen=True)
class DecodeJob:
    """A source to decode: a video file, a folder of images named in frame order, or a strip (`strips.py`).

    Frames `first_frame`..`last_frame` are kept, both included; None means to the end. `tiles` is the number
    of tile rows, see `tile_boxes`; `size` the side of a tile in pixels. `stabilize` asks for what stabilized
    clips are made from.
    """

    path: Path
    frame_files: tuple[str, ...] = ()
    first_frame: int = 0
    last_frame: int | None = None
    tiles: int = 1
    size: int = 64
    strip: bool = False
    stabilize: bool = False

    def __post_init__(self) -> None:
        for name, least in (("first_frame", 0), ("last_frame", 0), ("tiles", 1), ("size", 1)):
            value = getattr(self, name)
            if not (value is None and name == "last_frame"):
                object.__setattr__(self, name, whole(name, value, least))
        for name in ("strip", "stabilize"):
            object.__setattr__(self, name, switch(name, getattr(self, name)))


@dataclass
class DecodedVideo:
    """A decoded source; see the top of this file for the arrays.

    boxes: per tile [x, y, width, height] in pixels of the upright frame, which has `frame_size`, (width,
    height). truncated: it has frames beyond `max_frames`, which were left out. motions: None where not asked for.
    """

    sha256: str
    truncated: bool
    boxes: list[list[int]]
    frame_size: tuple[int, int]
    tiles: np.ndarray
    thumbnails: np.ndarray
    motions: np.ndarray | None
    files: tuple[Path, ...]

    def release(self) -> None:
        """Take tiles and thumbnails out of this process's memory; they are read again from their files where used.

        What is mapped counts as memory of the process. An hour of video is gigabytes, for which Dask ends workers.
        """
        for array in (self.tiles, self.thumbnails):
            if isinstance(array.base, mmap.mmap):
                array.base.madvise(mmap.MADV_DONTNEED)

    def discard(self) -> None:
        """Let go of the arrays, which are empty after, then remove the temporary files.

        The other order would leave files behind on FUSE and NFS, where a file that is still mapped is not removed
        but renamed.
        """
        self.tiles = self.thumbnails = np.empty((0, 0, 0, 0, 3), np.uint8)
        self.motions = None
        for file in self.files:
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Rejected:
    """`reason` is one line, without a path. `sha256` is empty if the file could not even be read."""

    reason: str
    sha256: str = ""


def tile_boxes(width: int, height: int, tiles: int, pixel_aspect: float = 1.0) -> list[list[int]]:
    """Square boxes of an upright width x height frame, each [x, y, width, height], row by row.

    tiles = 1 is the one center square. tiles = R > 1 is R rows of squares 1/R of the frame height, in as many
    disjoint columns as fit, the grid centered: 1280x720 with R = 2 gives six squares of 360. `pixel_aspect` is
    pixel width over height; boxes are square on the screen. A frame narrower than one square is tiled by its
    width.
    """
    tall = min(height // tiles, int(width * pixel_aspect))
    wide = min(round(tall / pixel_aspect), width)
    if tall < 1 or wide < 1:
        return []
    columns = 1 if tiles == 1 else width // wide
    left, top = (width - columns * wide) // 2, (height - tiles * tall) // 2
    return [[left + c * wide, top + r * tall, wide, tall] for r in range(tiles) for c in range(columns)]


def decode_all(
    jobs: Iterable[DecodeJob], folder: Path, limits: DecodeLimits, workers: int
) -> Generator[DecodedVideo | Rejected, None, None]:
    """Decode the jobs in `workers` child processes; yield a result per job, in the order of the jobs.

    Temporary files go to `folder`; the caller calls `DecodedVideo.discard`. At most workers + 1 results wait,
    so that slow use of them does not fill the disk. The children are dead when the generator is closed.
    Raises OSError when `folder` cannot be written (disk full), `VglannError` where the machine keeps the children
    from working.
    """
    local = threading.local()
    children: list[Decoder] = []

    def decode(number: int, job: DecodeJob) -> DecodedVideo | Rejected:
        if not hasattr(local, "child"):
            local.child = Decoder(limits)
            children.append(local.child)
        return local.child.decode(job, folder / f"{number}")

    pool = ThreadPoolExecutor(workers)
    waiting: list[Future[DecodedVideo | Rejected]] = []
    try:
        for number, job in enumerate(jobs):
            waiting.append(pool.submit(decode, number, job))
            if len(waiting) > workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()
        for child in children:
            child.close()
        pool.shutdown(wait=True)
        for future in waiting:
            if not future.cancelled() and future.exception() is None:
                result = future.result()
                if isinstance(result, DecodedVideo):
                    result.discard()


class _Silent(Exception):
    """A child does not answer; the message says why."""


class _OutOfTime(Exception):
    """A child has used the CPU time that the machine gives a process."""


class _Killed(Exception):
    """The system has killed a child; the video may have nothing to do with that."""


class Decoder:
    """A decoding process, started at the first file, and again after it was killed or has died."""

    def __init__(self, limits: DecodeLimits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._files = 0
        self._closed = False
        # close() comes from the consumer's thread while decode() runs in its own.
        self._lock = threading.RLock()

    def decode(self, job: DecodeJob, stem: Path) -> DecodedVideo | Rejected:
        """Decode a source into temporary files with the name `stem`. Raises as `decode_all`."""
        files = tuple(stem.with_suffix(suffix) for suffix in (".tiles", ".thumbnails", ".motions"))
        result = None
        try:
            result = self._decoded(job, files)
        finally:
            # A child may be killed in the middle, and the wait for its answer then ends with any error of a pipe.
            if not isinstance(result, DecodedVideo):
                for file in files:
                    file.unlink(missing_ok=True)
        return result

    def _decoded(self, job: DecodeJob, files: tuple[Path, ...]) -> DecodedVideo | Rejected:
        request = {
            **dataclasses.asdict(job),
            "path": str(job.path.absolute()),
            "outputs": [str(file.absolute()) for file in files],
            "max_frames": self.limits.max_frames,
            "max_pixels": self.limits.max_pixels,
        }
        try:
            reply = self._ask(request)
        except _Killed:
            raise VglannError(
                f"{job.path}: the process that decodes it was killed (signal 9), as Linux does when memory runs out; "
                "give fewer --workers, free some memory, or leave this video out"
            ) from None
        if "errno" in reply:
            raise OSError(reply["errno"], os.strerror(reply["errno"]), str(files[0].parent))
        if "machine" in reply:
            raise _not_working(reply["machine"])
        if "unreadable" in reply:
            raise UnreadableError(
                f"{job.path}: cannot be read ({reply['unreadable']}); see to its disk, then run the command again"
            )
        if "reason" in reply:
            return Rejected(reply["reason"], reply.get("sha256", ""))
        frames, tile_shape = reply.pop("frames"), reply.pop("tile_shape")
        tiles = np.memmap(files[0], np.uint8, "r", shape=(frames, *tile_shape, 3))
        small = np.empty((0, THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH, 3), np.uint8)
        if not job.strip:
            small = np.memmap(files[1], np.uint8, "r", shape=(frames, *small.shape[1:]))
        motions = np.memmap(files[2], np.float64, "r", shape=(frames, 12)) if job.stabilize else None
        reply["frame_size"] = tuple(reply["frame_size"])
        return DecodedVideo(**reply, tiles=tiles, thumbnails=small, motions=motions, files=files)

    def close(self) -> None:
        """End the process; a file that it decodes in another thread is rejected."""
        with self._lock:
            self._closed = True
            self._kill()

    def _ask(self, request: dict) -> dict:
        with self._lock:
            if self._closed:
                return {"reason": "decoding was stopped"}
            fresh = self._process is None or self._files >= _FILES_PER_CHILD
            process = self._start() if fresh else self._process
        assert process is not None
        assert process.stdin is not None
        try:
            if fresh:
                self._wait_until_ready(process)
            self._files += 1
            data = json.dumps(request).encode() + b"\n"
            try:
                while data:
                    data = data[process.stdin.write(data) :]
            except (BrokenPipeError, ValueError):
                pass  # the child died or was closed; it will not answer
            return json.loads(self._line(process))
        except _Silent as silence:
            self._kill()
            return {"reason": str(silence)}
        except _OutOfTime:
            if self._files < 2:
                raise _not_working("`ulimit -t` leaves it too little time for one video") from None
        self._kill()
        return self._ask(request)  # the files before took the time

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Raise `VglannError` if a child that was started ends by itself: no video has had to do with that."""
        said = b""
        try:
            while (line := self._line(process)) != READY:
                said = line
        except _Silent:
            code = process.poll()
            if self._closed or code in (None, -signal.SIGKILL):
                raise
            why = said.decode(errors="replace").strip() or _exit_words(code)
            raise _not_working(f"it ended while it was starting: {why}") from None

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        """The next line that the child writes. Raises _Silent, _OutOfTime or _Killed where it writes none."""
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN | select.POLLHUP)
        if not poll.poll(min(self.limits.seconds * 1000, 2**31 - 1)):
            raise _Silent(f"decoding took more than {self.limits.seconds:g} s")
        line = process.stdout.readline()
        if line.endswith(b"\n"):
            return line
        code = process.wait()
        if code == -signal.SIGXCPU:
            raise _OutOfTime
        if code == -signal.SIGKILL and not self._closed:
            raise _Killed
        raise _Silent(f"the decoder crashed ({_exit_words(code)})")

    def _start(self) -> subprocess.Popen[bytes]:
        self._kill()
        seconds = math.ceil(self.limits.seconds) + 10
        command = child_command(self.limits.memory_mb, seconds)
        try:
            # Unbuffered, because poll() does not see the lines that a buffer holds.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        except OSError as error:
            raise _not_working(f"it cannot be started: {error.strerror}") from error
        self._process, self._files = process, 0
        return process

    def _kill(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass  # what was still to be flushed to the dead child


def _not_working(why: str) -> VglannError:
    return VglannError(
        f"the process that decodes videos does not work here ({why}); `vglann doctor` looks for what is missing, "
        "`ulimit -a` shows the limits of this shell, and fewer --workers need less"
    )


def _exit_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"
