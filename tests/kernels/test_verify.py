"""`python -m vglann_kernels.verify`: what it compares, and that it can fail."""

import os
import subprocess
import sys

import pytest
import torch
from vglann_kernels import verify


def test_a_line_is_wrong_when_over_its_limit_or_nan():
    assert verify.Line("op", "case", "loss", 1e-7, 1e-7, 2e-7).ok
    assert not verify.Line("op", "case", "loss", 3e-7, 1e-7, 2e-7).ok
    assert not verify.Line("op", "case", "loss", float("nan"), 1e-7, 2e-7).ok


def test_a_wrong_kernel_is_found(monkeypatch):
    def off_by_a_thousandth(head, background, impl):
        video = head[:, :3] * (1.001 if impl == "triton" else 1.0) + 0 * background[:, :, None]
        return video, head[:, 3].mean(dim=(1, 2, 3))

    monkeypatch.setattr(verify, "mask_composite", off_by_a_thousandth)
    lines = list(verify.composite(verify.Shapes(batch=1, frames=2, size=4, device="cpu")))
    assert not any(line.ok for line in lines if line.quantity == "video" and "float32" in line.case)
    assert all(line.ok for line in lines if line.quantity == "mask_mean")


def test_the_reference_alone(monkeypatch, capsys):
    shapes = verify.Shapes(batch=1, frames=2, size=32, device="cpu", impl="reference")
    assert verify.report(shapes) == 0
    assert "bfloat16 channels-last" in capsys.readouterr().out
    exact = verify.mask_composite

    def wrong_in_float32(head, background, impl):
        video, mean = exact(head, background, impl=impl)
        return video * (1.00001 if head.dtype == torch.float32 else 1), mean

    monkeypatch.setattr(verify, "mask_composite", wrong_in_float32)
    assert verify.report(shapes) == 6  # the video and both gradients, in two layouts


def stand_in(wrong=0.0):
    """`composite_laplacian_loss` as a kernel does it for bfloat16: float32 inside, gradients rounded at the end."""
    plain = verify.composite_laplacian_loss

    def loss(head, background, clips, index, impl, **options):
        if impl == "reference":
            return plain(head, background, clips, index, impl=impl, **options)
        value = plain(head.float(), background.float(), clips, index, impl="reference", **options)
        return value + wrong * head[0, 0, 0, 0, 0].float()

    return loss


def test_gradients_in_bfloat16_are_compared_where_they_are_decided(monkeypatch):
    """As on a GPU: the reference rounds the video and turns signs, a kernel does not and keeps its limit."""
    shapes = verify.Shapes(batch=2, frames=2, size=64, device="cpu", dtype="bfloat16")
    monkeypatch.setattr(verify, "composite_laplacian_loss", stand_in())
    torch.manual_seed(0)
    gradients = [line for line in verify.composite_laplacian(shapes) if line.quantity.startswith("grad")]
    for line in gradients:
        assert line.ok, str(line)
        assert line.reference_error > 10 * line.error  # so twice that would forgive anything
        assert line.limit < 0.02
    assert sum(line.left_out for line in gradients) < 0.2


def test_one_wrong_value_of_a_gradient_is_found(monkeypatch):
    shapes = verify.Shapes(batch=1, frames=1, size=32, device="cpu", dtype="float32")
    monkeypatch.setattr(verify, "composite_laplacian_loss", stand_in(wrong=1e-4))
    lines = list(verify.composite_laplacian(shapes))
    assert not any(line.ok for line in lines if line.quantity == "grad_head")
    assert all(line.ok for line in lines if line.quantity == "grad_background")


def test_what_a_band_near_zero_reaches_is_undecided():
    shapes = verify.Shapes(size=16, levels=1)
    difference = torch.full((1, 16, 16), 5.0, dtype=torch.float64)
    difference += 10 * (torch.arange(16) % 2).double()  # all bands are large
    difference.requires_grad_()
    assert not verify.undecided(difference, [difference], shapes, 1e-6)[0].any()
    level = torch.zeros(1, 16, 16, dtype=torch.float64)
    level[:, :, 8:] = 1  # level except for an edge: bands are 0 up to two columns from it
    level.requires_grad_()
    (out,) = verify.undecided(level, [level], shapes, 1e-6)
    assert out.any(dim=1)[0].tolist() == [True] * 16
    assert not verify.Line("op", "case", "grad", 0.0, 0.0, 1.0, left_out=0.6).ok


def test_a_search_that_errs_is_found(monkeypatch):
    shapes = verify.Shapes(device="cpu", latent_dim=8)
    assert all(line.ok for line in verify.nearest(shapes))
    plain = verify.nearest_rows

    def last_of_equals(queries, database, impl):
        index, squared = plain(queries, database.flip(0), impl=impl)
        return len(database) - 1 - index, squared

    monkeypatch.setattr(verify, "nearest_rows", last_of_equals)
    wrong = [line.case for line in verify.nearest(shapes) if not line.ok]
    assert {case.split(", ")[0] for case in wrong} >= {"reference"}
    assert all(case.endswith("ties") for case in wrong)


def test_one_op_in_one_dtype(capsys):
    command = ["--impl", "reference", "--device", "cpu", "--batch", "1", "--frames", "1", "--size", "32"]
    assert verify.main([*command, "--op", "composite", "laplacian", "--dtype", "bfloat16"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert {line[0] for line in lines} == {"composite", "laplacian"}
    assert {line[1] for line in lines} == {"bfloat16"}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert verify.main(["--device", "cpu"]) == 2
    assert "no Triton kernel runs here: it needs a GPU" in capsys.readouterr().err


def test_the_command_line_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "vglann_kernels.verify",
        "--device",
        "cpu",
        "--batch",
        "1",
        "--frames",
        "1",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # All ops are compared in tests of their own.
    ops = ("composite", "step_guard")
    done = subprocess.run(
        [*command, "--size", "32", "--latent-dim", "8", "--op", *ops],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all within their limits" in done.stdout
    assert "vglann_kernels.proof" in done.stdout
    for op in ops:
        assert f"\n{op} " in done.stdout


def test_the_seed_draws_the_inputs():
    shapes = [
        verify.Shapes(1, 1, 32, latent_dim=4, device="cpu", impl="reference", seed=s) for s in (0, 0, 1)
    ]
    first, again, other = ([line.error for line in verify.verify(one)] for one in shapes)
    assert first == again != other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_this_gpu():
    for line in verify.verify(verify.Shapes(batch=2, frames=4)):
        assert line.ok, str(line)
