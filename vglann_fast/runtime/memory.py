"""Memory of this process and its device: the peak, and how much is free."""

import os
import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

from vglann_fast.run.environment import launched

PROC = Path("/proc/self")


def forget_peak(device: torch.device) -> None:
    """From here on `peak_memory` is of what follows, not of what this process did before.

    Where Linux does not let a process forget (its /proc is not writable), the peak of its life stays: an upper bound.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (PROC / "clear_refs").write_text("5")  # proc(5): the high-water mark becomes what is held now


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since `forget_peak`; on a CPU the most the whole process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    mark = re.search(r"VmHWM:\s*(\d+) kB", _proc("status"))
    # Not every container has it, or a /proc. ru_maxrss would count what ran before in this process, too, up to exec.
    return 1024 * (int(mark[1]) if mark else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def free_beside_a_step(device: torch.device) -> int:
    """Bytes of `device` that a training step leaves free, once one was taken after `forget_peak`.

    What a step took PyTorch keeps for the next one on a GPU. On a CPU it gives that back, so it is subtracted; and
    the processes that torchrun started on this host share its memory.
    """
    free = free_memory(device)
    if device.type == "cuda":
        return free
    # Without a /proc nothing is known to be held already, so the answer is too small rather than too large.
    pages = _proc("statm").split()[1:2] or ["0"]
    held = int(pages[0]) * os.sysconf("SC_PAGE_SIZE")
    return free // launched().local_size - (peak_memory(device) - held)


def free_memory(device: torch.device) -> int:
    """Bytes that could still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _proc(name: str) -> str:
    """Return what Linux says of this process, see proc(5); "" without a /proc."""
    try:
        return (PROC / name).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
