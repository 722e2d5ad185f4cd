"""The devices of --device, and operations without a deterministic version, seen without a GPU."""

import pytest

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
