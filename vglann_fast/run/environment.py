"""Versions and hardware a run was made with, this process's place in a job, and the user's cache folder."""

import os
import platform
import pwd
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from vglann_fast import __version__
from vglann_fast.errors import VglannError


def environment() -> dict[str, Any]:
    """Versions and hardware, for environment.json."""
    import torch
    from vglann_kernels.impl import OPS, requested

    found: dict[str, Any] = {"vglann-fast": __version__, "python": platform.python_version()}
    # With the build, such as 2.13.0+cu130, which the name of a wheel leaves out.
    found["torch"] = str(torch.__version__)
    for package in ("numpy", "triton", "faiss-cpu", "faiss-gpu-cu13-cuvs", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["platform"] = platform.platform()
    found["cpu_threads"] = torch.get_num_threads()
    try:
        found["processes"] = job_size()
    except VglannError:  # said where it matters
        found["processes"] = None
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["cuda"] = torch.version.cuda
    try:
        found["kernels"] = ",".join(f"{op}={requested(op)[0]}" for op in OPS)
    except ValueError:  # VGLANN_KERNELS is wrong, which is said where it matters
        found["kernels"] = None
    # A program that embeds Python may have no arguments, or any objects among them.
    found["command"] = " ".join(map(str, getattr(sys, "argv", ())))
    found["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    return found


class Launch(NamedTuple):
    """A process's place among the `size` processes of its job, and among those on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def job_size() -> int:
    """Return the number of processes of this job, from WORLD_SIZE. Raises `VglannError` where it is not one."""
    return _number("WORLD_SIZE", "1", 1, 2**31)


def launched() -> Launch:
    """Return this process's place in the job that `torchrun` started, or the place of a single process.

    Job operators set some of torchrun's variables for any command, and scripts leave single ones behind. An empty
    variable counts as unset, and without a WORLD_SIZE above 1 the others do not count.
    Raises `VglannError` for a variable that is missing or impossible.
    """
    size = job_size()
    if size == 1:
        return Launch()
    return Launch(
        _number("RANK", "", 0, size),
        size,
        _number("LOCAL_RANK", "0", 0, size),
        _number("LOCAL_WORLD_SIZE", "1", 1, size + 1),
    )


def _number(variable: str, default: str, least: int, end: int) -> int:
    """Return a variable of the environment as a number from `least` and below `end`."""
    value = os.environ.get(variable, "").strip() or default
    if value.isdecimal() and least <= int(value) < end:
        return int(value)
    said = f"{variable}={value}" if value else f"{variable} is not set"
    raise VglannError(
        f"{said}: several processes are started by torchrun, which sets it; for one process unset WORLD_SIZE"
    )


def home() -> Path:
    """Return the user's home folder. Raises `VglannError` for a user without one."""
    try:
        # An empty HOME counts as unset; the root folder is nobody's home.
        folder = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError as error:
        raise VglannError("this user has no home folder; set HOME") from error
    if not folder.is_absolute():
        raise VglannError(f"HOME={folder} is not an absolute path; set HOME to one")
    return folder


def default_cache() -> Path:
    """Return `vglann-fast` in $XDG_CACHE_HOME, or in ~/.cache. Raises `VglannError` for a user without a home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():  # others do not count, says the XDG specification
        return folder / "vglann-fast"
    try:
        return home() / ".cache" / "vglann-fast"
    except VglannError as error:
        raise VglannError(f"{error}, or XDG_CACHE_HOME, to a folder of your own for the cache") from error
