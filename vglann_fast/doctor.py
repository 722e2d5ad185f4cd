"""What will run on this machine, and why: versions, GPU, the implementation of each op, known-bad combinations."""

import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from vglann_fast.config import TrainOptions, options_from_json
from vglann_fast.errors import VglannError
from vglann_fast.run_dir import RunDir, environment

# Reported by other projects; each was seen to fail without a clear message.
BAD_CUDNN = (90800, 91500)  # from, up to: conv3d in bfloat16, contiguous layout, is wrong or slow
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu13-cuvs")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "lustre")


def doctor() -> int:
    """Print the findings, one a line. Returns 0, or 1 when one of them is a warning.

    Raises `VglannError`, after the other findings, when VGLANN_KERNELS asks for what cannot run here.
    """
    import torch
    from vglann_kernels import ImplUnavailable, choices

    found = environment()
    versions = ("vglann-fast", "python", "torch", "numpy", "safetensors", "triton")
    print("versions: " + ", ".join(f"{name} {found[name] or 'not installed'}" for name in versions))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            print(f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
        print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        print(f"GPU: none that PyTorch can use; {torch.get_num_threads()} CPU threads")
    warnings = 0
    for name, bad, advice in checks():
        print(f"WARN {name}: {advice}" if bad else f"PASS {name}")
        warnings += bad
    try:
        print("\n".join(map(str, choices())))
    except (ValueError, ImplUnavailable) as error:
        raise VglannError(f"VGLANN_KERNELS={os.environ.get('VGLANN_KERNELS')}: {error}") from error
    return 1 if warnings else 0


def checks() -> Iterator[tuple[str, bool, str]]:
    """(what is looked at, whether it is bad, what is wrong then and what to do)."""
    import torch

    on_gpu = torch.cuda.is_available()
    cuda = _numbers(torch.version.cuda or "0")
    advice = "older than 2.10: weights_only=True can be made to run code (CVE-2026-24747); pip install 'torch>=2.10'"
    yield "torch", _numbers(torch.__version__) < (2, 10), advice
    triton = _installed("triton") or "none"
    advice = f"{triton} is older than 3.6; pip install 'triton>=3.6'"
    yield "triton", () < _numbers(triton) < (3, 6), advice
    old = on_gpu and torch.cuda.get_device_capability() < (8, 0)
    yield "compute capability", old, "under 8.0: every op takes its reference"
    cudnn = (torch.backends.cudnn.version() or 0) if on_gpu else 0
    advice = f"{cudnn}: contiguous bfloat16 conv3d is wrong or slow in 9.8 to 9.14; channels-last avoids it"
    yield "cuDNN", BAD_CUDNN[0] <= cudnn < BAD_CUDNN[1], advice
    faiss = [name for name in FAISS if _installed(name)]
    advice = f"{' and '.join(faiss)} share a folder and lose the GPU silently; pip uninstall all, install one"
    yield "faiss alone", len(faiss) > 1, advice
    advice = "faiss-gpu is built for CUDA 12; pip install faiss-gpu-cu13-cuvs"
    yield "faiss-gpu and CUDA", "faiss-gpu" in faiss and cuda >= (13,), advice
    advice = "faiss-gpu-cuvs needs CUDA 13.2; faiss-gpu-cu13-cuvs is built for 13.0"
    yield "faiss-gpu-cuvs and CUDA", "faiss-gpu-cuvs" in faiss and (0, 0) < cuda < (13, 2), advice
    two = bool(_installed("opencv-python") and _installed("opencv-python-headless"))
    advice = "opencv-python and opencv-python-headless share a folder; pip uninstall both, install the second"
    yield "opencv alone", two, advice
    advice = "the distribution pynvml is dead; pip uninstall pynvml, pip install nvidia-ml-py"
    yield "NVML", _installed("pynvml") is not None, advice
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton"))
    kind = file_system(cache)
    advice = (
        f"{cache} is on {kind}, where processes spoil it for each other; set TRITON_CACHE_DIR to a local disk"
    )
    yield "Triton's cache", kind in NETWORK_FILE_SYSTEMS, advice


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def file_system(path: Path, mounts: str = "/proc/self/mounts") -> str | None:
    """The kind of file system that `path` is or would be on; None where the system does not say."""
    if not Path(mounts).is_file():
        return None
    fields = [line.split() for line in Path(mounts).read_text().splitlines()]
    holds = [(len(f[1]), f[2]) for f in fields if path.absolute().is_relative_to(f[1])]
    return max(holds)[1] if holds else None


def verify_run(path: str | Path, device: Any) -> int:
    """Compare the kernels with float64 at the shapes of the run at `path`; prints one line a quantity.

    Where no Triton kernel can run it says so and compares the references alone. Returns 1 when a line is over its
    limit, else 0. Raises `VglannError` when `path` is no run or the kernels do not take its shapes.
    """
    from vglann_kernels.launch import why_no_triton
    from vglann_kernels.verify import Shapes, report

    run = RunDir.open(path)
    train: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    why = why_no_triton(device)
    if why:
        print(f"no Triton kernel runs here: {why}; comparing the references alone")
    shapes = Shapes(
        batch=train.batch_size,
        frames=run.options["frames"],
        size=run.options["size"],
        levels=train.levels,
        blur=train.blur,
        latent_dim=train.latent_dim,
        device=str(device),
        impl="reference" if why else "triton",
    )
    try:
        return 1 if report(shapes) else 0
    except ValueError as error:
        raise VglannError(f"{path}: {error}") from error
