"""Where a run was made: versions and hardware."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from vglann_fast import __version__


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
