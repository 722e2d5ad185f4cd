"""Count the processors this process may use, and let its threads sleep while they wait. Loads no PyTorch.

OpenMP's threads spin at each barrier by default. Where another job holds a processor, a spinning thread burns the
time slice that the other thread waits for: on two processors with busy neighbors a mapping took 275 s so, and 16 s
when its threads slept instead.
"""

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

PROC, CGROUPS, PROCESSORS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/cpuinfo")
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


def be_a_good_guest(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the threads of OpenMP and BLAS sleep while they wait, and take no more threads than a quota grants.

    Writes to the environment what the user has not: it counts only if PyTorch and NumPy are not loaded yet.
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment.setdefault(*OPENBLAS)
    if available() < allowed():
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
