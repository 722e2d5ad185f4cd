"""`vglann profile RUN`: a few steps of a run's training under torch.profiler, and where their time went.

    RUN/profile/profile.json
        {"device", "precision", "steps", "ms_per_step", "background_ms_per_step": null without such a phase,
        "videos_per_second", "stages": {name: ms}, "warnings": [line],
        "launches_per_step": null on a CPU, "top": [[operation or kernel, ms]], "flop_per_step",
        "matmul_flops": FLOP/s of a large product in this run, "matmul_share": of that, what the step reached}
    RUN/profile/trace.json    for chrome://tracing or Perfetto

Nothing else in the run changes: the steps are taken from its newest checkpoint and forgotten.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from vglann_fast.clips.of_run import open_clips
from vglann_fast.errors import VglannError
from vglann_fast.glo import cuda_graph
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.measured import as_chosen, choices_of_run
from vglann_fast.glo.precision import training_numerics
from vglann_fast.glo.training import Training
from vglann_fast.options.choices import Choices, settled
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.files import write_json
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.memory import forget_peak

STAGES = ("data", "generator", "loss", "backward", "update")
WARM_UP = cuda_graph.WARM_UP + 1  # a step that is replayed was captured by then
TOP = 10
# Parts of names of operations and kernels that a step of ours should not have, and what they mean.
SUSPECT = {
    "slow_conv": "a slow fallback convolution",
    "nchwToNhwc": "a change of memory layout to channels-last",
    "nhwcToNchw": "a change of memory layout from channels-last",
    "convertTensor": "a change of memory layout inside cuDNN",
    "batch_norm_backward_elemt": "BatchNorm's generic kernel",
}


def profile(run_path: str | Path, *, steps: int = 20, device: torch.device | str = "cpu") -> str:
    """Profile `steps` training steps of a run, after 4 that are not measured; write RUN/profile.

    Returns the report, several lines of text. Raises `VglannError` when the run or its clips are gone, or if
    `steps` is under 1.
    """
    if steps < 1:
        raise VglannError(f"--steps: expected at least 1, got {steps}")
    run = RunDir.open(run_path)
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    device = torch.device(device)
    choices = choices_of_run(run, options, device)
    options = settled(options, choices)
    with as_chosen(choices), training_numerics(options, device):
        training = _training_of(run, options, device, choices)
        try:
            record = _measure(training, steps, run.path / "profile")
        finally:
            training.source.close()
    write_json(run.path / "profile" / "profile.json", record)
    return report(record, run.path / "profile" / "trace.json")


def _training_of(run: RunDir, options: TrainOptions, device: torch.device, choices: Choices) -> Training:
    """The run's training at its newest checkpoint, with full steps; a finished one continues as if it had further
    epochs."""
    clips = open_clips(run)
    training = new_training(clips, options, run, seed=run.options["seed"], device=device, choices=choices)
    if run.checkpoints.exist():
        training.restore()
    # The learning rate of a last epoch may be zero.
    training.epoch, training.position = options.background_passes, 0
    return training


def _measure(training: Training, steps: int, folder: Path) -> dict[str, Any]:
    device = training.device
    forget_peak(device)
    training.train_step(with_video=False)
    training.keep_targets()
    with FlopCounterMode(display=False) as counted:
        training.train_step(with_video=False)
    for _ in range(WARM_UP - 2):
        training.train_step(with_video=False)
    seconds = _timed(training, steps)

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        _timed(training, steps)
    background = _background_seconds(training, steps) if training.options.background_passes else None
    # PyTorch cannot write to a path that is not Unicode.
    with tempfile.TemporaryDirectory() as scratch, atomic_file(folder / "trace.json") as file:
        found.export_chrome_trace(f"{scratch}/trace.json")
        shutil.copyfile(f"{scratch}/trace.json", file)

    per_step = seconds / steps
    work = [event for event in found.key_averages() if event.key not in STAGES]
    names = [event.key for event in work]
    spent = sorted(
        ((event.key, _own_time(event, device) / 1e3 / steps) for event in work), key=lambda x: -x[1]
    )
    rate = matmul_rate(device, training.precision)
    flop = counted.get_total_flops()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": training.precision,
        "steps": steps,
        "ms_per_step": 1e3 * per_step,
        "background_ms_per_step": None if background is None else 1e3 * background / steps,
        "videos_per_second": training.batch_size * training.options.accumulate / per_step,
        "stages": {name: stage_time(found, name, device) / 1e3 / steps for name in STAGES},
        "launches_per_step": _launches(work) / steps if device.type == "cuda" else None,
        "top": [[name, ms] for name, ms in spent[:TOP] if ms > 0],
        "flop_per_step": flop,
        "matmul_flops": rate,
        "matmul_share": flop / per_step / rate,
        "warnings": warnings_about(names),
    }


def _timed(training: Training, steps: int) -> float:
    """Seconds of `steps` steps, the device idle before and after."""
    _finish(training.device)
    started = time.perf_counter()
    for _ in range(steps):
        training.train_step(with_video=False)
    _finish(training.device)
    return time.perf_counter() - started


def _background_seconds(training: Training, steps: int) -> float:
    """Seconds of `steps` steps of the background phase, the first of its first pass each time."""

    def step() -> None:
        training.epoch = training.position = 0
        training.train_step(with_video=False)

    if training.graphed is not None:
        training.graphed.forget()
    for _ in range(WARM_UP):
        step()
    _finish(training.device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _finish(training.device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stage_time(found: Any, name: str, device: torch.device) -> float:
    """Microseconds between begin and end of a stage, all steps together, on the GPU's clock if there is one."""
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    return sum(
        e.time_range.elapsed_us() for e in found.events() if e.name == name and e.device_type == wanted
    )


def _own_time(event: Any, device: torch.device) -> float:
    """Microseconds of an operation without those it calls."""
    return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total


def _launches(events: list[Any]) -> int:
    return sum(event.count for event in events if "LaunchKernel" in event.key or "GraphLaunch" in event.key)


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product in the precision of the training, measured now: the roof of the step."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        _finish(device)
        started = time.perf_counter()
        a @ a
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def warnings_about(names: list[str]) -> list[str]:
    """A line for each operation or kernel among `names` that a step should not have."""
    return [
        f"{name}: {meaning}"
        for name in names
        for part, meaning in SUSPECT.items()
        if part.lower() in name.lower()
    ]


def report(record: dict[str, Any], trace: Path) -> str:
    """The record as text."""
    lines = [
        f"{record['ms_per_step']:.2f} ms a step, {record['videos_per_second']:.1f} videos/s, "
        f"{record['precision']} on {record['device']}, {record['steps']} steps",
        *(f"  {name:<10} {ms:9.3f} ms" for name, ms in record["stages"].items()),
    ]
    if (background := record.get("background_ms_per_step")) is not None:
        ratio = background / record["ms_per_step"]
        lines.append(f"{background:.2f} ms a step of the background phase, {ratio:.1%} of a full one")
    if record["launches_per_step"] is not None:
        lines.append(f"{record['launches_per_step']:.0f} launches a step")
    lines.append(
        f"{record['flop_per_step'] / 1e9:.1f} GFLOP a step: {record['matmul_share']:.1%} of the rate of a large "
        f"matrix product, {record['matmul_flops'] / 1e12:.2f} TFLOP/s"
    )
    lines += [f"  {ms:9.3f} ms  {name}" for name, ms in record["top"]]
    lines += [f"warning: {warning}" for warning in record["warnings"]]
    return "\n".join([*lines, f"trace: {trace}"])
