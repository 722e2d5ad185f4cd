"""The devices of --device, and operations without a deterministic version, seen without a GPU."""

import pytest
import torch

from vglann_fast.cli.main import main


def test_an_operation_without_a_deterministic_version_is_one_line(monkeypatch, capsys, tmp_path):
    """Without --deterministic the same error is a fault of ours, and shows as one."""

    def refused(*arguments, **options):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr("vglann_fast.samples.sample.sample", refused)
    assert main(["sample", str(tmp_path), "--deterministic"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vglann: error: --deterministic: cumsum_cuda_kernel does not have")
    with pytest.raises(RuntimeError):
        main(["sample", str(tmp_path)])


def test_the_threads_that_were_asked_for_and_afterwards_those_there_were(monkeypatch, tmp_path):
    before, seen = torch.get_num_threads(), []

    def verify_run(*arguments):
        seen.append(torch.get_num_threads())

    monkeypatch.setattr("vglann_fast.diagnostics.verify.verify_run", verify_run)
    for threads in ("1", "2"):
        assert main(["verify", str(tmp_path), "--threads", threads]) == 0
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", ["0", "-1", "1.5", "many", "1025", "2147483648", "9" * 5000])
def test_threads_that_cannot_be_are_refused_by_name(threads, tmp_path, capsys):
    assert main(["sample", str(tmp_path), f"--threads={threads}"]) == 2
    assert "--threads" in capsys.readouterr().err
