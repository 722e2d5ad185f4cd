"""The program beside busy neighbors: its own choice of threads against others, in turns.

    python -m vglann_fast.experiments.neighbors RUN CLIPS [--neighbors 3] [--rounds 3]

RUN: a run of preset `demo`, whose mapping is fitted again in a copy. CLIPS: its clips, for a short training. The
neighbors are processes that multiply matrices with PyTorch on all processors and spin while they wait, as PyTorch
does unasked. Prints a Markdown table: wall seconds and CPU seconds, medians of the rounds. Settings take turns within
a round, so that what else the machine does meets all of them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

# What the environment of a setting has; all names in CLEARED are removed first.
CLEARED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT")
SETTINGS: dict[str, dict[str, str]] = {
    "the program's own choice": {},
    "OpenMP as it comes (GOMP_SPINCOUNT=300000)": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NEIGHBOR = """
import torch
x = torch.randn(512, 512)
while True:
    x = torch.tanh(x @ x)
"""


def environment(setting: str) -> dict[str, str]:
    """The environment of a process in one of `SETTINGS`."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return kept | SETTINGS[setting]


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    """Keep `count` busy processes running."""
    clean = {name: value for name, value in os.environ.items() if name not in CLEARED}
    started = [subprocess.Popen([sys.executable, "-c", NEIGHBOR], env=clean) for _ in range(count)]
    try:
        time.sleep(10)  # they load PyTorch first
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def timed(words: list[str], setting: str) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of a command. Raises CalledProcessError if it fails."""
    before, started = os.times(), time.monotonic()
    command = [sys.executable, "-m", "vglann_fast", *words]
    subprocess.run(command, env=environment(setting), check=True, capture_output=True)
    after = os.times()
    used = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    return time.monotonic() - started, used


def commands(run: Path, clips: Path, folder: Path) -> dict[str, list[str]]:
    """The words of both commands; what they write goes to `folder`."""
    copied, new = folder / "run", str(folder / "new")
    shutil.copytree(run, copied)
    machine = ["--device", "cpu"]
    return {
        "map": ["map", str(copied), *machine],
        "train": ["train", str(clips), "--preset", "demo", "--epochs", "8", "--out", new, *machine],
    }


def table(times: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Markdown: a line for each setting, wall and CPU seconds of each command."""
    names = list(times)
    lines = [
        f"| setting | {' | '.join(f'{name}, wall s | CPU s' for name in names)} |",
        "|---|" + "---:|" * (2 * len(names)),
    ]
    for setting in SETTINGS:
        cells = [
            f"{median(pair[part] for pair in times[name][setting]):.0f}" for name in names for part in (0, 1)
        ]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--neighbors", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    times: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with neighbors(a.neighbors):
        for _ in range(a.rounds):
            for setting in SETTINGS:
                with tempfile.TemporaryDirectory() as folder:
                    for name, words in commands(a.run, a.clips, Path(folder)).items():
                        times.setdefault(name, {}).setdefault(setting, []).append(timed(words, setting))
    print(table(times))


if __name__ == "__main__":
    main()
