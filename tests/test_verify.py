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


def test_turned_signs_are_allowed_only_where_some_are_expected():
    assert verify.turned_signs(3 * 32 * 32) == 0
    for count, share in ((393_216, 1e-2), (5_898_240, 5e-3)):
        assert 0 < verify.turned_signs(count) < share


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert verify.main(["--device", "cpu"]) == 2
    assert "no Triton kernel runs here: CPU tensors need TRITON_INTERPRET=1" in capsys.readouterr().err


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
    done = subprocess.run(
        [*command, "--size", "32"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all within their limits" in done.stdout
    assert "bfloat16: not shown" in done.stdout
    for op in ("composite ", "laplacian ", "composite_laplacian ", "latent_adam "):
        assert f"\n{op}" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_this_gpu():
    for line in verify.verify(verify.Shapes(batch=2, frames=4)):
        assert line.ok, str(line)
