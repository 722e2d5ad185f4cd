"""bench/on_gpu.sh at tiny size on a CPU: what it leaves on disk, and when its exit code is red."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vglann_kernels.impl import OPS

from vglann_fast.experiments.step_rows import ROWS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "on_gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Found by every Python that the script starts: the loops over frames, one contender of three groups, raise.
SABOTAGE = """
import torch

def raises(*_, **__):
    raise RuntimeError("an illegal memory access was encountered")

torch.nn.functional.l1_loss = raises
"""


def called(*arguments, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "TINY": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def results(path):
    """(group, contender) -> row of a file of results."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["group"], name): row for line in lines for name, row in line["rows"].items()}


def summary(out):
    """Name of a command -> what became of it."""
    return dict(line.split(": ", 1) for line in (out / "summary.txt").read_text().splitlines())


def test_it_ends_with_0_when_everything_ran(tmp_path):
    done = called(tmp_path, "nearest", "twin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(what.startswith("ok") for what in summary(tmp_path).values())
    assert results(tmp_path / "nearest.jsonl")["nearest unit sphere 20x500x8", "reference"]["ms"] > 0
    assert "### nearest unit sphere 20x500x8" in (tmp_path / "tables.md").read_text()


def test_a_contender_that_raises_makes_it_red_and_the_others_are_measured(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(SABOTAGE)
    out = tmp_path / "out"
    done = called(out, "step", "kernels", "counters", PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode == 1
    ended = {name: what.split()[0].rstrip(",") for name, what in summary(out).items()}
    assert ended == {"step-15": "failed", "step-256": "ok", "kernels": "failed", "counters": "left"}
    step, kernels = results(out / "step.jsonl"), results(out / "kernels.jsonl")
    assert "illegal memory access" in step["step 2", "author"]["failed"]
    assert step["step 2", "fp32"]["ms"] > 0
    failed = {key for key, row in kernels.items() if "failed" in row}
    assert failed == {("laplacian full 256", "author"), ("laplacian full 15", "author")}
    measured = {group for (group, name), row in kernels.items() if name == "reference" and row["ms"] > 0}
    assert len(measured) == 18
    assert (
        "| author | RuntimeError: an illegal memory access was encountered |"
        in (out / "tables.md").read_text()
    )


def test_what_there_is_no_time_for_is_said_and_makes_it_red(tmp_path):
    done = called(tmp_path, TOTAL="0")
    assert done.returncode == 1
    ended = summary(tmp_path)
    assert ended.pop("counters").startswith("left out")
    assert set(ended.values()) == {"no time"}
    assert [name.split("-")[0] for name in ended][-5:] == ["step", "step", "kernels", "nearest", "twin"]


def test_the_limits_of_the_parts_are_less_than_all_they_may_take():
    """Otherwise the last part would be cut off where every one before it takes its limit."""
    text = SCRIPT.read_text()
    (total,) = map(int, re.findall(r"TOTAL:-(\d+)", text))
    limits = [int(seconds) for seconds in re.findall(r"\brun (\d+) ", text)]
    # The checks run at the same time; `layers`, `tune` and `convolutions` are calls of their own.
    *checks, check_of_convolutions = map(int, re.findall(r"\brun_verify (\d+) ", text))
    *first, cudnn, epoch, layers, tune, convolutions_15, convolutions_256 = limits
    assert (len(checks), len(first)) == (3, 6)
    assert max(checks) + sum(first) <= total
    assert cudnn + epoch + layers <= total
    assert tune <= total
    assert check_of_convolutions + convolutions_15 + convolutions_256 <= total
    assert total <= 9 * 60 - 20
    assert layers == max(limits)


def test_the_rows_of_the_step_exist_and_are_the_columns_of_its_document(tmp_path):
    """With an interpreter that says what it was asked for."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = called(tmp_path / "out", "step", "convolutions", PYTHON=str(python), TINY="")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {name for name in summary(tmp_path / "out") if name.startswith("verify")}
    assert checks == {f"verify-upsample_conv-{dtype}" for dtype in ("bfloat16", "float16", "float32")}
    rows = {}
    for name in ("step-15", "step-256", "convolutions-15", "convolutions-256"):
        words = (tmp_path / "out" / f"{name}.txt").read_text().splitlines()
        assert words[words.index("--batch") + 1] == name.split("-")[1]
        rows[name] = words[words.index("--rows") + 1 :]
    assert {row for names in rows.values() for row in names} <= ROWS.keys()
    (head,) = [line for line in (ROOT / "docs" / "step.md").read_text().splitlines() if "| group |" in line]
    columns = {cell.strip() for cell in head.split("|")} - {"", "group", "times"}
    for size in ("15", "256"):
        assert {*rows[f"step-{size}"], *rows[f"convolutions-{size}"]} == columns


def test_the_counters_are_of_the_kernels_that_there_are():
    (pattern, count) = re.search(r"'regex:(\S+)' --launch-count (\d+)", SCRIPT.read_text()).groups()
    # What the group calls: its two kernels in turn, then the joint loss.
    ops = ("composite", "laplacian", "composite_laplacian")
    sources = [(ROOT / "kernels" / "vglann_kernels" / op / "kernel.py").read_text() for op in ops]
    launched = [name for text in sources for name in re.findall(r" (_\w+_kernel)\[", text)]
    assert len(launched) == 7
    counted = [name for name in launched if re.search(pattern, name)]
    assert counted == ["_laplacian_fwd_kernel", "_composite_laplacian_kernel", "_sums_kernel"]
    assert int(count) == len(counted)


def test_one_wrong_kernel_among_the_parallel_checks_makes_it_red(tmp_path):
    """With an interpreter that says what it was asked for, and fails for one blur of one op."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "ran $*"\n[[ "$*" != *"--op laplacian"*"--blur paper"* ]]\n')
    python.chmod(0o755)
    done = called(tmp_path / "out", "verify", PYTHON=str(python), TINY="")
    assert done.returncode == 1
    ended = summary(tmp_path / "out")
    assert [name for name, what in ended.items() if not what.startswith("ok")] == ["verify-laplacian-paper"]
    assert len(ended) == 13
    # What compiles for a time that is not known is in a call of its own.
    assert {name.split("-")[1] for name in ended} == {*OPS} - {"upsample_conv"}
    assert "--dtype float16" in (tmp_path / "out" / "verify-laplacian-float16.txt").read_text()


def test_without_a_gpu_or_with_a_wrong_name_nothing_runs(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\n[[ $1 != -c ]]\n")
    python.chmod(0o755)
    done = called(tmp_path / "out", "step", PYTHON=str(python), TINY="")
    assert done.returncode == 1
    assert "sees no NVIDIA GPU" in done.stderr
    done = called(tmp_path / "out", "kernel")
    assert done.returncode == 1
    assert "no part kernel" in done.stderr
    assert "usage" in called().stderr


def test_a_killed_session_leaves_what_was_measured(tmp_path):
    out = tmp_path / "out.jsonl"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "bench" / "kernel_groups.py"),
        str(out),
        *["composite fwd 15"] * 2000,
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    assert results(out)["composite fwd 15", "reference"]["ms"] > 0
