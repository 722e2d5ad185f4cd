"""Count the processors this process may use, and let its threads sleep while they wait. Loads no PyTorch.

OpenMP's threads spin at each barrier by default. Where another job holds a processor, a spinning thread burns the
time slice that the other thread waits for: on two processors with three busy neighbors a mapping took 87 s so, and
31 s when its threads slept instead. On an idle machine sleeping makes the same mapping 1.38 times slower. So threads
sleep only where others are busy when the program starts.
"""

import os
import re
import statistics
import time
from collections.abc import MutableMapping
from pathlib import Path

PROC, CGROUPS, PROCESSORS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/cpuinfo")
LOAD, LOOKS, PAUSE = Path("/proc/loadavg"), 3, 0.01  # seconds from one look at the load to the next
# As Linux calls the units in PROCESSORS: of x86, then of ARM.
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
# Each says how OpenMP's threads wait: the name in the standard, then the names in GNU's and Intel's libraries.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# OpenBLAS' threads sleep after 2 to the power of this many processor cycles; 4 is the least it takes.
OPENBLAS = ("OPENBLAS_THREAD_TIMEOUT", "4")


def allowed() -> int:
    """Return how many processors this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota() -> float | None:
    """Return how many processors' time the control groups of this process grant it, or None without a limit.

    The least of the group and all groups above it. A container sees the processors of its host, and a quota is the
    only sign that it was given fewer.
    """
    found = []
    for group, file in _groups():
        # Inside a container the path of the group may be the host's, and the group itself is mounted at the top.
        folder = (CGROUPS / file).joinpath(*group) if group else CGROUPS / file
        while folder == CGROUPS / file or CGROUPS / file in folder.parents:
            if (processors := _granted(folder)) is not None:
                found.append(processors)
            folder = folder.parent
    return min(found, default=None)


def available() -> int:
    """Return how many processors this process can keep busy: `allowed()`, or less by a `quota()`; at least 1."""
    limit = quota()
    return allowed() if limit is None else max(1, min(allowed(), round(limit)))


def bfloat16_units() -> bool | None:
    """Return whether the processors multiply bfloat16 (AVX-512 BF16, AMX, or ARM's); None if that cannot be known."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)", PROCESSORS.read_text(), flags=re.MULTILINE)
    except OSError:  # no Linux
        return None
    return bool(BFLOAT16 & set(flags[1].split())) if flags else None


def others_are_busy() -> bool:
    """Return True if another process is running right now, on any processor; False if that cannot be known.

    The median of a few looks, since short work of the system is always going on.
    """
    running = []
    for _ in range(LOOKS):
        try:
            # proc(5): the fourth field is "runnable/all", and this process is running.
            running.append(int(LOAD.read_text().split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return False
        time.sleep(PAUSE)
    return statistics.median(running) >= 1


def be_a_good_guest(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the threads of OpenMP and BLAS sleep while they wait where others are busy, and keep within a quota.

    Where a quota counts the time of threads, spinning uses it up, so they sleep there, too. Writes to the environment
    what the user has not: it counts only if PyTorch and NumPy are not loaded yet.
    """
    limited = available() < allowed()
    if limited or others_are_busy():
        if not any(name in environment for name in WAITING):
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault(*OPENBLAS)
    if limited:
        environment.setdefault("OMP_NUM_THREADS", str(available()))


def _groups() -> list[tuple[tuple[str, ...], str]]:
    """Return (parts of the path, hierarchy's folder) of the control groups that limit processors."""
    try:
        lines = PROC.read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one hierarchy without a name, version 1 one for each controller.
        if not controllers:
            groups.append((Path(path).parts[1:], ""))
        elif "cpu" in controllers.split(","):
            groups.append((Path(path).parts[1:], "cpu"))
    return groups


def _granted(folder: Path) -> float | None:
    """Return the processors that one group grants, or None."""
    try:
        if (folder / "cpu.max").is_file():
            time, period = (folder / "cpu.max").read_text().split()
        else:
            time, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        granted = float(time) / float(period)
    # "max", a missing file and a file of another form set no limit.
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return granted if granted > 0 else None
