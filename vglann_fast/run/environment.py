"""Where a run was made, versions and hardware; and where a user's cache is."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vglann_fast import __version__
from vglann_fast.errors import VglannError


def environment() -> dict[str, Any]:
    """Versions and hardware, for environment.json."""
    import torch
    from vglann_kernels.impl import OPS, requested

    found: dict[str, Any] = {"vglann-fast": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "triton", "faiss-cpu", "faiss-gpu-cu13-cuvs", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["platform"] = platform.platform()
    found["cpu_threads"] = torch.get_num_threads()
    found["processes"] = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun says
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["cuda"] = torch.version.cuda
    try:
        found["kernels"] = ",".join(f"{op}={requested(op)[0]}" for op in OPS)
    except ValueError:  # VGLANN_KERNELS is wrong, which is said where it matters
        found["kernels"] = None
    found["command"] = " ".join(sys.argv)
    found["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    return found


def default_cache() -> Path:
    """`vglann-fast` in $XDG_CACHE_HOME, or in ~/.cache. Raises `VglannError` for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vglann-fast"
    except RuntimeError as error:
        raise VglannError(
            "no home folder for our cache; set XDG_CACHE_HOME to a folder of your own"
        ) from error
