"""`vglann_kernels.proof`: its arithmetic, its table, and that it finds faults where ttsem is installed."""

import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from vglann_kernels import impl as switch
from vglann_kernels import proof, semantics
from vglann_kernels.batchnorm_relu import op as batchnorm_relu
from vglann_kernels.sectors import Sectors

from vglann_fast.glo.generator import TwoStreamGenerator

ROWS = proof.read_table()


def rounded(exact):
    """The float32 nearest to a fraction, ties to even, by whole numbers."""
    exponent = max(math.frexp(abs(float(exact)))[1] - 24, -149) if exact else 0
    return math.ldexp(round(exact / Fraction(2) ** exponent), exponent)


def test_a_product_and_a_sum_are_rounded_once():
    a, b, c = semantics.hard_cases()
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = (x[finite] for x in (a, b, c))
    rows = zip(*(map(Fraction, x.tolist()) for x in (a, b, c)), strict=True)
    exact = [rounded(x * y + z) for x, y, z in rows]
    small = np.abs(exact) < 3.4e38
    ours = semantics.fma(a, b, c)
    assert (ours[small] == np.array(exact)[small]).all()
    with np.errstate(over="ignore"):
        twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (ours != twice).any(), "the cases do not tell it from rounding twice"


def test_special_values_are_those_of_the_formula():
    a, b, c = semantics.hard_cases()
    with np.errstate(all="ignore"):
        plain = a * b + c
    ours = semantics.fma(a, b, c)
    assert (np.isnan(ours) == np.isnan(plain.astype(np.float64)))[~np.isinf(plain)].all()
    assert semantics.fma(np.float32(np.inf), np.float32(1), np.float32(0)) == np.inf


def test_without_ttsem_it_is_skipped_and_not_green(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(proof, "find_spec", lambda name: None)
    assert proof.main(["--share"]) == 2
    said = capsys.readouterr().err
    assert "ttsem is not installed" in said
    assert "make proof" in said


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert proof.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_what_ci_repeats_is_in_the_table_and_right():
    shared = [case for case in proof.cases() if proof.shared(case)]
    assert {case.dtype for case in shared} == set(proof.DTYPES)
    for case in shared:
        assert ROWS[str(case)].verdict.startswith("right"), case


def test_no_row_is_of_another_kernel_than_there_is():
    for name, row in ROWS.items():
        assert row.sources == proof.sources(row.op), f"{name}: run make proof"


@pytest.mark.parametrize(
    ("changed", "of"),
    [
        ("upsample_conv/tiles.py", {"upsample_conv"}),
        ("latent_adam/rule.py", {"latent_adam"}),
        ("laplacian/op.py", {"laplacian", "composite_laplacian"}),
        ("launch.py", set(proof.OPS)),
        ("nearest/reference.py", set()),
        ("nearest/README.md", set()),
    ],
)
def test_a_row_is_of_all_that_decides_what_is_launched(changed, of, tmp_path):
    shutil.copytree(Path(proof.__file__).parent, tmp_path / "kernels")
    with (tmp_path / "kernels" / changed).open("a") as file:
        file.write("TILE = 16\n")
    stale = {op for op in proof.OPS if proof.sources(op, tmp_path / "kernels") != proof.sources(op)}
    assert stale == of


def test_a_table_is_read_as_it_was_written(tmp_path):
    row = ROWS["composite bfloat16 ttir"]
    proof.write_table({str(row.case): row}, tmp_path / "table.md")
    assert proof.read_table(tmp_path / "table.md") == {str(row.case): row}
    assert "| composite | float16 | - | ttir | not run |" in (tmp_path / "table.md").read_text()


def test_what_got_worse_is_reported():
    row = ROWS["composite bfloat16 ttir"]
    assert not proof.worse(row, row)
    assert proof.worse(row, None)
    assert proof.worse(replace(row, verdict="WRONG 90: a fault"), row)
    assert proof.worse(row, replace(row, sources="0"))
    assert proof.worse(replace(row, error="1.0e+00"), row)


@triton.jit
def _shared_place_kernel(out_ptr, x_ptr, last):
    first = tl.program_id(0) * 16
    x = tl.load(x_ptr + first + tl.arange(0, 16))
    tl.store(out_ptr + tl.minimum(first, last) + tl.arange(0, 16), x)


@pytest.mark.parametrize(("last", "races"), [(16, set()), (8, {("_shared_place_kernel", "out_ptr")})])
def test_a_write_where_another_program_writes_is_found(last, races):
    pytest.importorskip("ttsem", reason="make proof-share installs it")
    with semantics.executed("ttir", 90) as launches:
        _shared_place_kernel[(2,)](torch.zeros(32), torch.arange(32.0), last)
    assert (launches.count, launches.several, launches.unchecked) == (1, 1, 0)
    assert launches.races == races


def test_a_write_behind_a_tensor_is_found():
    sanitize = pytest.importorskip("ttsem.sanitize", reason="make proof-share installs it")
    with pytest.raises(sanitize.KernelFault, match="past the end"), semantics.executed("ttir", 90):
        _shared_place_kernel[(2,)](torch.zeros(31), torch.arange(32.0), 16)


@triton.jit
def _strided_copy_kernel(out_ptr, x_ptr, STRIDE: tl.constexpr):
    place = tl.arange(0, 512)
    tl.store(out_ptr + place, tl.load(x_ptr + place * STRIDE))


@pytest.mark.parametrize(("stride", "loads", "sectors"), [(1, 4, 64), (8, 16, 512)])
def test_sectors_are_those_that_the_lanes_of_a_warp_touch(stride, loads, sectors):
    """512 float32: four accesses of 16 bytes a lane, or one sector for each value."""
    pytest.importorskip("ttsem", reason="make proof-share installs it")
    counted = Sectors()
    with semantics.executed("ttgir", 90, counted):
        _strided_copy_kernel[(1,)](torch.zeros(512), torch.zeros(512 * stride), stride)
    load, store = (("_strided_copy_kernel", kind) for kind in ("load", "store"))
    assert (counted.requests[load], counted.sectors[load]) == (loads, sectors)
    assert (counted.requests[store], counted.sectors[store]) == (4, 64)
    assert counted.unique_bytes(load) == counted.unique_bytes(store) == 2048


@triton.jit
def _square_kernel(out_ptr, x_ptr, steps):
    row, total = tl.arange(0, 64), tl.zeros([64, 64], tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + row[:, None] * 64 + step * 32 + tl.arange(0, 32)[None, :])
        total = tl.dot(x, tl.trans(x), total)
    tl.store(out_ptr + row[:, None] * 64 + row[None, :], total)


def test_sectors_of_copies_to_shared_memory_are_counted():
    """Two steps of 64 rows of 64 bytes; a warp copies 512 bytes at once."""
    pytest.importorskip("ttsem", reason="make proof-share installs it")
    counted, x = Sectors(), torch.randn(64, 64).half()
    with semantics.executed("ttgir", 90, counted):
        _square_kernel[(1,)](torch.zeros(64, 64), x, 2)
    copy = ("_square_kernel", "copy")
    assert (counted.requests[copy], counted.sectors[copy]) == (16, 256)
    assert counted.unique_bytes(copy) == x.nbytes


def test_the_whole_generator_by_its_kernels_is_the_one_without(monkeypatch):
    """Convolutions, norms and composite, forward and backward, on the IR; the convolutions hand over statistics."""
    pytest.importorskip("ttsem", reason="make proof-share installs it")
    monkeypatch.setattr(batchnorm_relu, "FEW_ROWS", 100)
    torch.manual_seed(0)
    generator = TwoStreamGenerator("original", 8, 2, frames=16, size=16).channels_last()
    z, results = torch.randn(2, 8), []
    with semantics.executed("ttir", 90) as launches:
        results.append(video_and_gradients(generator, z, "triton"))
    results.append(video_and_gradients(generator.double(), z.double(), "reference"))
    assert launches.count > 40
    assert not launches.unchecked
    assert not launches.races
    for ours, exact in zip(*results, strict=True):
        assert 0 < (ours.double() - exact).norm() <= 1e-4 * exact.norm()


def video_and_gradients(generator, z, impl):
    generator.zero_grad()
    with switch.using_impl(impl):
        video = generator(z)
        video.square().mean().backward()
    return [video.detach(), *(parameter.grad.clone() for parameter in generator.parameters())]
