"""The benchmarks' own machinery: timing in turns, tables, and the comparison that fails on a loss of speed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vglann_fast.experiments import clocks, parity, timing
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder

BENCH = Path(__file__).parents[2] / "bench"


def script(name):
    """A script of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare, report = script("compare"), script("report")


def result(path, times, name="test_loss[full]"):
    """A benchmark file with one group: contender -> milliseconds, or why it could not run."""
    rows = {
        contender: {"cannot_run": ms}
        if isinstance(ms, str)
        else {"ms": ms, "gb_per_s": 1.0, "share_of_copy": 0.5, "timing": "CUDA graph", "calls": 20}
        for contender, ms in times.items()
    }
    info = {
        "device": "a GPU",
        "torch": "2.13.0",
        "dtype": "bfloat16",
        "floor_bytes": 2_000_000,
        "copy_gb_per_s": 4000.0,
        "matmul_tflop_per_s": 700.0,
        "l2": "warm",
        "clocks": {"sm_mhz": [1700, 1980], "throttle_reasons": ["power cap"]},
        "rows": rows,
    }
    others = {"name": "test_other", "extra_info": {}}
    path.write_text(json.dumps({"benchmarks": [{"name": name, "extra_info": info}, others]}))
    return path


def compared(old, new):
    command = [sys.executable, str(BENCH / "compare.py"), str(old), str(new)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("times", "worse"),
    [
        ({"reference": 10.0, "triton": 1.0}, False),
        ({"reference": 20.0, "triton": 2.0}, False),  # a slower machine: the ratio is the same
        ({"reference": 10.0, "triton": 1.1}, False),  # 9 % less
        ({"reference": 10.0, "triton": 1.12}, True),  # 11 % less
        ({"reference": 8.9, "triton": 1.0}, True),
        ({"reference": 10.0, "triton": "no GPU"}, True),
        ({"reference": 10.0}, True),
        ({"reference": 10.0, "triton": 0.5, "compile": 3.0}, False),
    ],
)
def test_compare_fails_when_a_ratio_fell(tmp_path, times, worse):
    old = compare.ratios(result(tmp_path / "old.json", {"reference": 10.0, "triton": 1.0}))
    assert bool(compare.fallen(old, compare.ratios(result(tmp_path / "new.json", times)))) is worse


def test_compare_as_a_command(tmp_path):
    old = result(tmp_path / "old.json", {"reference": 10.0, "triton": 1.0})
    slow = result(tmp_path / "new.json", {"reference": 10.0, "triton": 2.0})
    assert compared(old, old).returncode == 0
    done = compared(old, slow)
    assert done.returncode == 1
    assert "test_loss[full] triton: 10.00 -> 5.00" in done.stdout


def test_the_table_and_the_plot(tmp_path, capsys):
    file = result(tmp_path / "a.json", {"reference": 10.0, "triton": 0.5, "compile": "no compiler"})
    found = json.loads(file.read_text())
    found["benchmarks"][0]["extra_info"]["rows"]["triton"]["kernels"] = ["sm90_a", "reduce_b"]
    file.write_text(json.dumps(found))
    assert report.main([str(file), "--plot", str(tmp_path / "plot.png")]) == 0
    out = capsys.readouterr().out
    assert "| triton | 0.5000 | 20.0x | 1 | 50% |  | CUDA graph, 20 calls |" in out
    assert "| compile | no compiler |" in out
    assert "\n- triton ran sm90_a, reduce_b\n" in out
    assert "SM 1700 to 1980 MHz, throttle reasons: power cap" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_reasons_by_name():
    assert clocks.reason_names(0x0) == []
    assert clocks.reason_names(0x4, 0x44) == ["power cap", "thermal, hardware"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a GPU")
def test_without_a_gpu_the_clocks_say_so():
    assert clocks.Clocks().taken() == {"not_sampled": "no GPU"}


@pytest.mark.parametrize("mode", timing.MODES)
def test_modes_compute_what_they_are_called(mode):
    x = torch.randn(4, 3, requires_grad=mode != "fwd")
    upstream = torch.randn(4, 3)
    call = timing.in_mode(mode, lambda: 3 * x, [x], upstream)()
    for _ in range(2):  # a call can be repeated
        value = call()
        assert torch.equal(value, 3 * x) if mode == "fwd" else torch.equal(value[0], 3 * upstream)


def right():
    return lambda: torch.ones(3)


def wrong():
    return lambda: torch.tensor([1.0, 1, 1.1])


def broken():
    raise RuntimeError("an illegal memory access\nwas encountered")


class Benchmark:
    """A stand-in for the fixture that pytest-benchmark hands to a test."""

    name = "test_group"

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, *_, **__):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="times by the host's clock")
def test_a_benchmark_is_red_when_a_contender_raises_or_differs_and_keeps_the_other_times(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(timing, "MAX_CALLS", 1)
    monkeypatch.setenv("VGLANN_BENCH_JSONL", str(tmp_path / "out.jsonl"))
    benchmark = Benchmark()
    contenders = {"reference": right, "triton": right, "compile": broken, "other": wrong}
    with pytest.raises(AssertionError, match="illegal memory access was encountered"):
        timing.Timing(rounds=1).record(benchmark, timing.Group(contenders, 1e-3, floor_bytes=12))
    for rows in (benchmark.extra_info["rows"], json.loads((tmp_path / "out.jsonl").read_text())["rows"]):
        assert rows["reference"]["ms"] > 0
        assert rows["triton"]["ms"] > 0
        assert "RuntimeError" in rows["compile"]["failed"]
        assert "5.77e-02" in rows["other"]["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a captured contender is replayed, not called")
def test_calls_alternate_between_copies_of_the_inputs(monkeypatch):
    monkeypatch.setattr(timing, "MAX_CALLS", 1)
    order = []
    copies = [
        timing.Group({"reference": lambda n=n: lambda: order.append(n)}, 0.0, floor_bytes=12)
        for n in range(3)
    ]
    rows = timing.Timing(rounds=2).group(*copies)["rows"]
    assert order[-6:] == [0, 1, 2] * 2
    assert rows["reference"]["calls"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a captured contender is replayed, not called")
def test_a_group_is_timed_in_turns_and_says_who_could_not_run(monkeypatch):
    def absent():
        raise timing.CannotRun("not installed\nat all")

    order = []
    calls = {name: lambda name=name: lambda: order.append(name) for name in ("first", "second")}
    monkeypatch.setattr(timing, "MAX_CALLS", 1)
    found = timing.Timing().group(timing.Group({**calls, "absent": absent}, 0.0, 1000, flops=10))
    assert found["rows"]["absent"] == {"cannot_run": "not installed"}
    assert order[-4:] == ["first", "second", "first", "second"]
    assert order.count("first") == order.count("second") >= timing.ROUNDS
    assert found["copy_gb_per_s"] > 0
    row = found["rows"]["first"]
    assert row["range_ms"][0] <= row["ms"] <= row["range_ms"][1]
    assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / found["copy_gb_per_s"])


def test_trainings_that_differ_are_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(4))
    command = ["--clips", str(clips), "--device", "cpu", "--steps", "3", "--width", "4", "--batch", "2"]
    assert parity.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["4", "fp32", "bf16", "all"]
    monkeypatch.setattr(parity, "MAX_APART", 1e-9)
    assert parity.main(command) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("apart: bf16")
    monkeypatch.setitem(parity.ROWS_ON, "cpu", ("fp32", "bf16 kernels"))
    assert parity.main(command) == 1
    assert "TRITON_INTERPRET" in capsys.readouterr().out.splitlines()[-2]  # what is missing

    def fails(*_, **__):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(parity, "trained_psnr", fails)
    assert parity.main([*command, "--preset", "paper"]) == 1
    assert "RuntimeError: operation not permitted when stream" in capsys.readouterr().out
