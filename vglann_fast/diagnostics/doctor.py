"""Report what runs on this machine, and why: versions, GPU, the implementation of each op, known-bad combinations.

With --json one object instead of lines:

    {"format": "vglann-doctor", "version": 1, "environment": {...}, "gpus": [{"name", "capability",
     "shared_memory": bytes a block may have, "memory": bytes, "driver"}], "cudnn": number or null,
     "ops": [{"op", "impl", "reason"}], "measured": [{"name", "choice", "factor", "when", "shapes"}],
     "findings": [{"name", "level": "PASS" | "WARN" | "FAIL", "text"}]}
"""

import getpass
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vglann_fast.errors import VglannError
from vglann_fast.options.training import TrainOptions
from vglann_fast.progress import quiet
from vglann_fast.run.environment import default_cache, environment, home
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime import measurements
from vglann_fast.runtime.processors import allowed, available, bfloat16_units, quota

# Reported by other projects; each was seen to fail without a clear message.
BAD_CUDNN = (90800, 91500)  # from, up to: conv3d in bfloat16, contiguous layout, is wrong or slow
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu13-cuvs")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs")
CODECS: tuple[tuple[str, Literal["r", "w"]], ...] = (
    ("h264", "r"),
    ("hevc", "r"),
    ("vp9", "r"),
    ("libx264", "w"),
    ("gif", "w"),
)  # what clips and samples need
LITTLE, TOO_LITTLE = 5e9, 2e8  # bytes free: for a training with its checkpoints, for anything

Level = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One check: its name, its status and, in `text`, the problem with its remedy or the measured value."""

    name: str
    level: Level
    text: str = ""

    def __str__(self) -> str:
        return f"{self.level} {self.name}" + (f": {self.text}" if self.text else "")


def doctor(as_json: bool = False) -> int:
    """Print the findings, one a line or as JSON. Returns 0, or 1 when one of them is a warning or a failure.

    Raises `VglannError`, after the other findings, when VGLANN_KERNELS asks for what cannot run here.
    """
    from vglann_kernels import ImplUnavailable, choices

    found, gpus = environment(), list(_gpus())
    findings, measured = list(checks()), list(_measured())
    with quiet("vglann_kernels", "faiss"):  # the ops are in the answer
        try:
            ops, wrong = choices(), None
        except (ValueError, ImplUnavailable) as error:
            ops, wrong = [], error
        if wrong is None:
            findings.append(self_test())
    if as_json:
        record = {
            "format": "vglann-doctor",
            "version": 1,
            "environment": found,
            "gpus": gpus,
            "cudnn": _cudnn(),
            "ops": [{"op": choice.op, "impl": choice.impl, "reason": choice.reason} for choice in ops],
            "measured": measured,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(record, indent=1))
    else:
        lines = [*_heading(found, gpus), *map(str, findings), *map(str, ops), *map(_as_line, measured)]
        print("\n".join(lines))
    if wrong is not None:
        raise VglannError(f"VGLANN_KERNELS={os.environ.get('VGLANN_KERNELS')}: {wrong}") from wrong
    return 1 if any(finding.level != "PASS" for finding in findings) else 0


def _heading(found: dict[str, Any], gpus: list[dict[str, Any]]) -> Iterator[str]:
    versions = ("vglann-fast", "python", "torch", "numpy", "safetensors", "triton")
    yield "versions: " + ", ".join(f"{name} {found[name] or 'not installed'}" for name in versions)
    for i, gpu in enumerate(gpus):
        yield (
            f"GPU {i}: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB, "
            f"{gpu['shared_memory'] // 1024} KiB shared memory a block, driver {gpu['driver'] or 'unknown'}"
        )
    if gpus:
        yield f"CUDA {found['cuda']}, cuDNN {_cudnn()}"
    else:
        yield "GPU: none that PyTorch can use"
    yield f"CPU: {_processors()}; {found['cpu_threads']} threads, load {os.getloadavg()[0]:.1f}"


def _processors() -> str:
    """Say how many processors this process may use, and what limits them."""
    limit = quota()
    granted = "" if limit is None else f", quota {limit:g}"
    units = {True: "bfloat16 units", False: "no bfloat16 units", None: "bfloat16 units unknown"}[
        bfloat16_units()
    ]
    return f"{available()} of {os.cpu_count()} processors (affinity {allowed()}{granted}), {units}"


def _gpus() -> Iterator[dict[str, Any]]:
    import torch

    file = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.is_file() else None
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        yield {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "shared_memory": properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            "memory": properties.total_memory,
            "driver": driver[0] if driver else None,
        }


def _cudnn() -> int | None:
    import torch

    return torch.backends.cudnn.version() if torch.cuda.is_available() else None


def checks() -> Iterator[Finding]:
    """Everything that can be said without computing."""
    yield from _versions()
    yield from _installations()
    yield codecs()
    yield tune_file()
    yield from _folders()


def _measured() -> Iterator[dict[str, Any]]:
    """Yield each choice that `vglann tune` made on this machine, as --json has it."""
    import torch

    try:
        entries = measurements.own_entries()
    except VglannError:  # a finding says it
        return
    here = measurements.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for entry in entries:
        for name, contest in entry.contests.items() if entry.machine == here else ():
            # The contest of all choices together is not a choice itself.
            choice = entry.choices.get(name, contest.choice)
            row = {"name": name, "choice": choice, "factor": contest.factors.get(choice), "when": entry.when}
            yield {**row, "shapes": dict(entry.shapes)}


def _as_line(row: dict[str, Any]) -> str:
    """Say one measured choice: what it is for, its factor, and when it was measured."""
    shown = ("width", "batch_size", "frames", "size", "latents", "latent_dim")
    shapes = ", ".join(f"{name} {row['shapes'][name]}" for name in shown if name in row["shapes"])
    factor = "" if row["factor"] is None else f"{row['factor']:.2f} times the default's speed, "
    return f"measured {row['name']}: {row['choice']} ({factor}{row['when'][:10]}, {shapes})"


def tune_file() -> Finding:
    """Check that what `vglann tune` measured, if anything, can be read."""
    try:
        count = len(measurements.own_entries())
    except VglannError as error:
        return Finding("vglann tune", "WARN", str(error))
    return Finding("vglann tune", "PASS", f"measurements: {count}" if count else "nothing measured yet")


def _judged(name: str, bad: bool, text: str, level: Level = "WARN", fine: str = "") -> Finding:
    return Finding(name, level, text) if bad else Finding(name, "PASS", fine)


def _versions() -> Iterator[Finding]:
    import torch

    on_gpu = torch.cuda.is_available()
    advice = "older than 2.10: weights_only=True can be made to run code (CVE-2026-24747); pip install 'torch>=2.10'"
    yield _judged("torch", _numbers(torch.__version__) < (2, 10), advice, "FAIL", torch.__version__)
    if triton := _installed("triton"):
        advice = f"{triton} is older than 3.6; pip install 'triton>=3.6'"
        fine = triton if on_gpu else f"{triton}, unused without a GPU"
        yield _judged("triton", () < _numbers(triton) < (3, 6), advice, fine=fine)
    if not on_gpu:
        return
    old = torch.cuda.get_device_capability() < (8, 0)
    yield _judged("compute capability", old, "under 8.0: every op takes its reference")
    cudnn = _cudnn() or 0
    advice = f"{cudnn}: contiguous bfloat16 conv3d is wrong or slow in 9.8 to 9.14; channels-last avoids it"
    yield _judged("cuDNN", BAD_CUDNN[0] <= cudnn < BAD_CUDNN[1], advice)


def _installations() -> Iterator[Finding]:
    import torch

    cuda = _numbers(torch.version.cuda or "0")
    faiss = [name for name in FAISS if _installed(name)]
    if faiss:
        advice = (
            f"{' and '.join(faiss)} share a folder and lose the GPU silently; pip uninstall all, install one"
        )
        yield _judged("faiss alone", len(faiss) > 1, advice, "FAIL", ", ".join(faiss))
    if "faiss-gpu" in faiss:
        advice = "faiss-gpu is built for CUDA 12; pip install faiss-gpu-cu13-cuvs"
        yield _judged("faiss-gpu and CUDA", cuda >= (13,), advice)
    if "faiss-gpu-cuvs" in faiss:
        advice = "faiss-gpu-cuvs needs CUDA 13.2; faiss-gpu-cu13-cuvs is built for 13.0"
        yield _judged("faiss-gpu-cuvs and CUDA", (0, 0) < cuda < (13, 2), advice)
    opencv = [name for name in ("opencv-python", "opencv-python-headless") if _installed(name)]
    if opencv:
        advice = (
            "opencv-python and opencv-python-headless share a folder; pip uninstall both, install the second"
        )
        yield _judged("opencv alone", len(opencv) > 1, advice, fine=opencv[0])
    dead = _installed("pynvml") is not None
    if dead or _installed("nvidia-ml-py"):
        advice = "the distribution pynvml is dead; pip uninstall pynvml, pip install nvidia-ml-py"
        yield _judged("NVML", dead, advice)


def codecs() -> Finding:
    """Check that PyAV, where it is installed, can read and write what this project does."""
    try:
        from av.codec import Codec
        from av.error import FFmpegError
    except ImportError:
        return Finding(
            "video codecs", "WARN", "no PyAV: no videos in or out; pip install 'vglann-fast[video]'"
        )
    missing = []
    for name, mode in CODECS:
        try:
            Codec(name, mode)
        except (FFmpegError, ValueError):
            missing.append(f"{'reads' if mode == 'r' else 'writes'} no {name}")
    advice = f"PyAV {', '.join(missing)}; pip install --force-reinstall av"
    return _judged("video codecs", bool(missing), advice)


def _folders() -> Iterator[Finding]:
    places: dict[str, tuple[str, Callable[[], Path]]] = {
        "Triton's cache": ("TRITON_CACHE_DIR", lambda: home() / ".triton"),
        "torch.compile's cache": ("TORCHINDUCTOR_CACHE_DIR", _inductor_cache),
        "our cache": ("XDG_CACHE_HOME", default_cache),  # of videos, weights and features
    }
    for name, (variable, usual) in places.items():
        given = os.environ.get(variable) if usual is not default_cache else None
        try:
            folder = Path(given) if given else usual()
        except (OSError, VglannError) as error:
            yield Finding(name, "WARN", f"no folder for it ({error}); set {variable} to a folder of your own")
            continue
        kind = file_system(folder)
        advice = (
            f"{folder} is on {kind}, where processes spoil it for each other; set {variable} to a local disk"
        )
        yield _judged(name, kind in NETWORK_FILE_SYSTEMS, advice)
    free = shutil.disk_usage(os.curdir).free
    level: Level = "FAIL" if free < TOO_LITTLE else "WARN"
    yield _judged(
        "free disk", free < LITTLE, f"{free / 1e9:.1f} GB here, a training wants {LITTLE / 1e9:.0f}", level
    )


def _inductor_cache() -> Path:
    """Return the folder that torch.compile takes by default. Raises OSError without a temporary folder."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def self_test(steps: int = 8) -> Finding:
    """Every op against float64 at a small size, and a tiny training that must learn; some seconds."""
    import torch
    from vglann_kernels.launch import why_no_triton
    from vglann_kernels.verify import Shapes, verify

    from vglann_fast.runtime.numerics import numerics

    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    impl = "reference" if why_no_triton(torch.device(device)) else "triton"
    try:
        with numerics():
            shapes = Shapes(batch=2, frames=4, size=32, levels=2, latent_dim=8, device=device, impl=impl)
            wrong = [str(line) for line in verify(shapes) if not line.ok]
            if wrong:
                return Finding("self-test", "FAIL", f"off float64: {'; '.join(wrong)}")
            first, last = _tiny_training(torch.device(device), steps)
    except (OSError, RuntimeError, VglannError) as error:
        return Finding("self-test", "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    seconds = time.monotonic() - started
    learned = f"loss {first:.3f} to {last:.3f} in {steps} steps, {seconds:.1f} s on {device}"
    return Finding("self-test", "PASS" if last < first and math.isfinite(last) else "FAIL", learned)


def _tiny_training(device: Any, steps: int) -> tuple[float, float]:
    """Losses of the first and the last of `steps` steps on four clips of a moving edge."""
    import numpy as np

    from vglann_fast.glo.assemble import new_training

    class Edges:
        ids = ("a", "b", "c", "d")
        frames, size = 16, 32

        def __len__(self) -> int:
            return len(self.ids)

        def read(self, rows: Any = None) -> Any:
            clips = np.zeros((4, 3, 16, 32, 32), np.uint8)
            for i, clip in enumerate(clips):
                for frame in range(16):
                    clip[:, frame, :, : 4 + 5 * i + frame % 8] = 60 * (i + 1)
            return clips if rows is None else clips[rows]

    options = TrainOptions(
        width=4, latent_dim=8, levels=2, batch_size=4, epochs=10 * steps, lr_generator=0.01
    )
    with tempfile.TemporaryDirectory() as folder:
        training = new_training(Edges(), options, RunDir(Path(folder), {}), device=device)  # type: ignore[arg-type]
        losses = [training.train_step(with_video=False)[0].item() for _ in range(steps)]
        training.source.close()
    return losses[0], losses[-1]


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def file_system(path: Path, mounts: str = "/proc/self/mounts") -> str | None:
    """The kind of file system that `path` leads to, through links, or would once it is made; None if unknown.

    Of mounts on the same folder the last one hides those before it.
    """
    if not Path(mounts).is_file():
        return None
    path, depth, kind = Path(os.path.realpath(path.expanduser())), -1, None
    for line in Path(mounts).read_text(errors="replace").splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(
            re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        )  # "\040" is a blank
        if path.is_relative_to(point) and len(point.parts) >= depth:
            depth, kind = len(point.parts), fields[2]
    return kind
