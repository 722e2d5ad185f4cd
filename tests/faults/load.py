"""As much as a user may have: 1,000,000 latents, 200,000 clips, 100,000 steps.

Each is measured in a process of its own. Clips lie in sparse files, which take no room on the disk.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from faults.case import Case, case, part_of

CLIPS, LATENTS, STEPS = 200_000, 1_000_000, 100_000
INDEX_SECONDS = 2.0  # of the processor, so that others on the machine do not count
INDEX_BYTES = 1000  # of memory a clip: its JSON text and its objects
TABLE_SPARE = 1.1  # of what `memory_table` says the latents take
SAVING = 3.1  # while a checkpoint is written: the table, its bytes, and the file's
# Over all steps: bytes that malloc has given out, blocks of Python's allocator, bytes resident, which has what both
# keep for later, too; and the length of the last steps' lines over the length of the first.
MALLOC, BLOCKS, RESIDENT, LINE = 1e6, 10_000, 8e6, 1.2


def cases(share: float) -> Iterable[Case]:
    """All at full size but the steps."""
    yield measured("index", f"{CLIPS:,} clips of 32x64x64, opened", [])
    yield measured("latents", f"{LATENTS:,} latents of 100: taking steps, a checkpoint", [])
    yield measured("steps", f"{part_of(STEPS, share):,} tiny steps", [str(part_of(STEPS, share))])


def measured(what: str, name: str, words: list[str]) -> Case:
    """Run `what` of this file in a process of its own; it prints figures and, where one is too large, which."""
    words = [sys.executable, "-m", "faults.load", what, *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        return case(name, [done.stderr.strip().splitlines()[-1]], "")
    result = json.loads(done.stdout.splitlines()[-1])
    return case(name, result["problems"], result["note"])


def index() -> None:
    """Open a clip folder of 200,000 clips."""
    from vglann_fast.clips.dataset import ClipSet

    with tempfile.TemporaryDirectory() as folder:
        made = [sys.executable, "-m", "faults.load", "clips", folder]  # whose memory is not to count
        subprocess.run(made, check=True)
        size = (Path(folder) / "index.json").stat().st_size
        before, began = peak_bytes(), time.process_time()
        clips = ClipSet.open(folder, "train", verify=False)
        seconds, grown = time.process_time() - began, peak_bytes() - before
        assert clips.read([0, CLIPS - 1]).shape == (2, 3, 32, 64, 64)
    say(
        {
            f"{seconds:.2f} s": seconds > INDEX_SECONDS,
            f"{grown / 1e9:.2f} GB of memory": grown > CLIPS * INDEX_BYTES,
        },
        f"{seconds:.2f} s of the processor (promised: {INDEX_SECONDS:g}) and {grown / 1e6:.0f} MB of memory "
        f"(promised: {CLIPS * INDEX_BYTES / 1e6:.0f}) for an index of {size / 1e6:.0f} MB "
        f"over {CLIPS * 393216 / 1e9:.0f} GB of clips, whose checksums were not read",
    )


def sparse_clips(folder: Path) -> None:
    """A clip folder of holes."""
    from vglann_fast.experiments.sparse_clips import write_sparse_clips

    write_sparse_clips(folder, CLIPS)


def latents() -> None:
    """A table of a million latents: steps, and a checkpoint of them written and read."""
    import torch
    from tiny import tiny_options

    from vglann_fast.glo.checkpoint import new_generator
    from vglann_fast.glo.latents import LatentTable, initial_latents
    from vglann_fast.glo.memory import memory_table
    from vglann_fast.run.folder import RunDir

    torch.set_num_threads(1)
    options = tiny_options("modern", latent_dim=100, latent_init="sphere")
    before = peak_bytes()
    random = torch.Generator().manual_seed(0)
    table = LatentTable(initial_latents(LATENTS, options, random, read=_no_clips), [""] * LATENTS, options)
    stated = dict(
        memory_table(
            new_generator(options, 16, 32),
            table.tensors().values(),
            options,
            batch_size=3,
            frames=16,
            size=32,
            clips=3,
            half=False,
        )
    )["latents and their Adam"]
    skip, began = torch.tensor(False), time.process_time()
    for step in range(100):
        index = torch.randint(LATENTS, (16,), generator=random)
        table.step(index, table.gather(index).detach() * (step + 1), skip)
    seconds, grown = (time.process_time() - began) / 100, peak_bytes() - before
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.new(Path(folder) / "run", {}).begin()
        run.checkpoints.save(1, {"latents": table.tensors()}, {"ids": []})
        saved = peak_bytes() - before
        same = torch.equal(run.checkpoints.load()[1]["latents"]["rows"], table.rows)
    say(
        {
            f"{grown / 1e9:.2f} GB": grown > TABLE_SPARE * stated + 1e8,
            f"{saved / 1e9:.2f} GB while saving": saved > SAVING * stated + 1e8,
            "other rows in the checkpoint": not same,
        },
        f"{grown / 1e9:.2f} GB at the peak (promised: {stated / 1e9:.2f}, as the table of `memory.py` says, and a "
        f"tenth), {saved / 1e9:.2f} GB while a checkpoint is written (promised: {SAVING} times the table), "
        f"{1000 * seconds:.2f} ms of the processor a step of 16; the checkpoint is read back equal",
    )


def _no_clips(rows: object) -> np.ndarray:
    raise AssertionError("latents on the sphere need no clips")


def steps(count: int) -> None:
    """So many tiny steps, see tests/fixtures/soak.py."""
    import torch
    from soak import soak

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        grown = soak(count, Path(folder))
    say(
        {
            f"{grown['malloc'] / 1e6:.1f} MB more in use": grown["malloc"] > MALLOC,
            f"{grown['blocks']} objects more": grown["blocks"] > BLOCKS,
            f"{grown['bytes'] / 1e6:.1f} MB more resident": grown["bytes"] > RESIDENT,
            f"{grown['files']} file handles more": grown["files"] > 0,
            f"{grown['checkpoints']} checkpoints more": grown["checkpoints"] > 0,
            "longer lines of the log": grown["bytes_per_line"] > LINE,
        },
        f"{grown['malloc'] / 1e6:.2f} MB in use by malloc, {grown['blocks']} objects of Python, "
        f"{grown['bytes'] / 1e6:.1f} MB resident, {grown['files']} file handles, {grown['checkpoints']} checkpoints "
        f"more than after the first 100; a line of the log is {grown['bytes_per_line']:.2f} times as long",
    )


def peak_bytes() -> int:
    """The most memory this process has taken so far; getrusage would count its parent's memory, too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def say(limits: dict[str, bool], note: str) -> None:
    """Print the result of a process: one problem for each limit, None for those that were kept."""
    print(
        json.dumps({"problems": [name if broken else None for name, broken in limits.items()], "note": note})
    )


if __name__ == "__main__":
    WHAT = {"index": index, "latents": latents, "clips": sparse_clips, "steps": steps}
    WHAT[sys.argv[1]](*[int(word) if word.isdigit() else Path(word) for word in sys.argv[2:]])
