"""The clips of a training, batch by batch, as the loss reads them: rows of a uint8 table on the device.

Three ways to keep them, one class each: `Resident` (all on the device), `Pinned` (copied there one batch ahead
through pinned memory, by a thread and on a stream of its own) and `Mapped` (read from the mapped files when
needed). The order is a function of seed, epoch and share alone; nothing else about the data is random.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.runtime.memory import free_memory

CHUNK = 256  # clips copied to the device at a time
HEADROOM = 0.5  # share of the free memory that resident clips may take, and then kept features


@dataclass(frozen=True)
class Batch:
    """Clips of one batch: rows `at` [B] of `clips` [n, 3, T, H, W] uint8, whose latents are `rows` [B].

    `at` and `rows` are int64 on the device of `clips`.
    """

    clips: Tensor
    at: Tensor
    rows: Tensor


class ClipSource(Protocol):
    """A source of batches. Rows are numbered as in this process's share of the clips."""

    name: str

    def batch(self, rows: np.ndarray, following: np.ndarray | None = None) -> Batch:
        """The batch of `rows`; `following` are the rows that will be asked for next."""

    def close(self) -> None:
        """Release threads and memory."""


class Resident:
    """All clips of this process's share on the device."""

    name = "resident"

    def __init__(self, clips: ClipSet, own: np.ndarray, device: torch.device) -> None:
        self.table = torch.empty(clip_shape(clips, len(own)), dtype=torch.uint8, device=device)
        for first in range(0, len(own), CHUNK):
            self.table[first : first + CHUNK].copy_(torch.from_numpy(clips.read(own[first : first + CHUNK])))

    def batch(self, rows: np.ndarray, following: np.ndarray | None = None) -> Batch:
        """No clip moves: the rows of the table are the rows of the share."""
        at = to_device(rows, self.table.device)
        return Batch(self.table, at, at)

    def close(self) -> None:
        """Nothing to release."""


class Mapped:
    """Read from the mapped files and copied to the device when asked for."""

    name = "mmap"

    def __init__(self, clips: ClipSet, own: np.ndarray, device: torch.device) -> None:
        self.clips, self.own, self.device = clips, own, device

    def batch(self, rows: np.ndarray, following: np.ndarray | None = None) -> Batch:
        """A table of exactly these clips."""
        table = torch.from_numpy(self.clips.read(self.own[rows])).to(self.device)
        return Batch(table, torch.arange(len(rows), device=self.device), to_device(rows, self.device))

    def close(self) -> None:
        """Nothing to release."""


class Pinned:
    """Read by a thread while the step before runs, and copied to the device on a stream of its own.

    Two slots take turns. A slot is read by step k and filled for step k + 2: the fill waits, on its stream, for
    the event recorded after step k was queued. A CPU has no streams and the copy is a plain one.
    """

    name = "pinned"

    def __init__(self, clips: ClipSet, own: np.ndarray, device: torch.device, batch_size: int) -> None:
        self.clips, self.own, self.device = clips, own, device
        gpu = device.type == "cuda"
        shape = clip_shape(clips, batch_size)
        self._host = [torch.empty(shape, dtype=torch.uint8, pin_memory=gpu) for _ in range(2)]
        self._table = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if gpu else None
        self._filled: list[torch.cuda.Event | None] = [None, None]
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._at = torch.arange(batch_size, device=device)
        self._thread = ThreadPoolExecutor(1, "clips")
        self._coming: tuple[np.ndarray, Future[None]] | None = None
        self._slot = 0

    def batch(self, rows: np.ndarray, following: np.ndarray | None = None) -> Batch:
        """The clips of `rows`, which are there already if they were announced as `following` before."""
        if self._coming is not None and np.array_equal(self._coming[0], rows):
            self._coming[1].result()
        else:  # the first batch, or not the one announced
            if self._coming is not None:
                self._coming[1].result()
            self._fill(self._slot, rows)
        slot = self._slot
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._filled[slot])  # type: ignore[arg-type]
            # The step before was queued on this stream already: its slot is free once the stream gets here.
            self._read[1 - slot] = current.record_event()
        self._slot = 1 - slot
        self._coming = None
        if following is not None:
            self._coming = (following, self._thread.submit(self._fill, self._slot, following))
        return Batch(self._table[slot], self._at, to_device(rows, self.device))

    def _fill(self, slot: int, rows: np.ndarray) -> None:
        filled = self._filled[slot]
        if filled is not None:
            filled.synchronize()  # the copy out of the host buffer must be over before it is written again
        self._host[slot].copy_(torch.from_numpy(self.clips.read(self.own[rows])))
        if self._stream is None:
            self._table[slot].copy_(self._host[slot])
            return
        with torch.cuda.stream(self._stream):
            read = self._read[slot]
            if read is not None:
                self._stream.wait_event(read)
            self._table[slot].copy_(self._host[slot], non_blocking=True)
            self._filled[slot] = self._stream.record_event()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def open_source(
    kind: str, clips: ClipSet, own: np.ndarray, device: torch.device, batch_size: int, measured: str = ""
) -> ClipSource:
    """The source `kind` ("auto", "resident", "pinned", "mmap") over the clips `own` of the set.

    measured: the fastest kind on this machine, or "": what "auto" takes if it can.

    Raises `VglannError` when resident clips do not fit or without a GPU to pin memory for.
    """
    if kind == "pinned" and device.type != "cuda":
        raise VglannError(f"--data pinned: needs a GPU, the device is {device}; use --data mmap")
    needed, room = math.prod(clip_shape(clips, len(own))), int(HEADROOM * free_memory(device))
    if kind == "auto":
        kind = "mmap" if device.type != "cuda" else "resident" if needed <= room else "pinned"
        if measured and (measured != "resident" or needed <= room):
            kind = measured
    if kind == "mmap":
        return Mapped(clips, own, device)
    if kind == "pinned":
        return Pinned(clips, own, device, batch_size)
    if needed > room:
        raise VglannError(
            f"--data resident: the clips take {needed / 1e9:.2f} GB and {device} has {room / 1e9:.2f} GB for "
            f"them; use --data {'pinned' if device.type == 'cuda' else 'mmap'}"
        )
    return Resident(clips, own, device)


def clip_shape(clips: ClipSet, count: int) -> tuple[int, int, int, int, int]:
    """[count, 3, T, H, W] of clips of this set."""
    return (count, 3, clips.frames, clips.size, clips.size)


def to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Row numbers as an int64 tensor, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(rows, np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def clip_order(seed: int, epoch: int, count: int, share: int = 0) -> np.ndarray:
    """The order of a share's clips in an epoch: a permutation [count], int64, of its arguments alone."""
    return np.random.default_rng((seed, epoch, share)).permutation(count)


def batches_of(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Consecutive rows of `order`, `batch_size` at a time; what is left over is left out."""
    for first in range(0, len(order) - batch_size + 1, batch_size):
        yield order[first : first + batch_size]
