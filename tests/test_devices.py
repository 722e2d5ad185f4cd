"""What --device and --deterministic set for the process, seen without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import vglann_kernels

from vglann_fast import devices, verbs
from vglann_fast.cli import main


@pytest.fixture
def modes():
    """They hold for the process, and the tests are one process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.usefixtures("modes")
def test_a_verb_that_does_not_train_computes_in_float32(monkeypatch):
    monkeypatch.setattr(devices, "device_of", lambda a: torch.device("cuda"))
    monkeypatch.setattr(vglann_kernels, "choices", lambda device: {})
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    devices.device_and_kernels(SimpleNamespace(deterministic=False, kernels=None))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("modes")
def test_an_operation_without_a_deterministic_version_is_one_line(monkeypatch, capsys, tmp_path):
    """Without --deterministic the same error is a fault of ours, and shows as one."""

    def refused(a):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    monkeypatch.setitem(verbs.VERBS, "sample", refused)
    assert main(["sample", str(tmp_path), "--deterministic"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vglann: error: --deterministic: cumsum_cuda_kernel does not have")
    with pytest.raises(RuntimeError):
        main(["sample", str(tmp_path)])
