"""`vglann doctor` and `vglann verify RUN`: what they print, and that each can end with 1."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import new_run, tiny_options
from tuned import AN_ENTRY, CPU
from vglann_kernels import verify

from vglann_fast.cli.main import main
from vglann_fast.diagnostics import doctor
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.runtime.measurements import Contest, machine, place, write


@pytest.fixture(autouse=True)
def no_default(monkeypatch):
    monkeypatch.delenv("VGLANN_KERNELS", raising=False)


@pytest.fixture
def installed(monkeypatch):
    """Versions that the checks see, by distribution; what is not in it is not installed."""
    found = {"triton": "3.9.0"}
    monkeypatch.setattr(doctor, "_installed", found.get)
    return found


@pytest.fixture
def no_self_test(monkeypatch):
    monkeypatch.setattr(doctor, "self_test", lambda: doctor.Finding("self-test", "PASS"))


def bad():
    return {finding.name: finding.text for finding in doctor.checks() if finding.level != "PASS"}


def level(name):
    (found,) = (finding.level for finding in doctor.checks() if finding.name == name)
    return found


def test_a_good_machine_passes(installed, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "file_system", lambda path: "ext4")
    monkeypatch.setattr(doctor, "LITTLE", 0)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "WARN" not in out
    assert "FAIL" not in out
    assert "PASS self-test: loss " in out
    if not torch.cuda.is_available():
        assert "GPU: none" in out
        for op in ("composite", "laplacian", "composite_laplacian", "nearest", "latent_adam"):
            assert f"\n{op}: reference (CPU tensors)" in out


@pytest.mark.usefixtures("no_self_test")
def test_as_json(installed, capsys):
    installed["pynvml"] = "12.0"
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["version"]) == ("vglann-doctor", 1)
    assert found["environment"]["torch"] == torch.__version__
    assert {op["op"]: op["reason"] for op in found["ops"]}.keys() >= {"nearest", "latent_adam"}
    levels = {finding["name"]: finding["level"] for finding in found["findings"]}
    assert levels["NVML"] == "WARN"
    assert levels["torch"] == levels["self-test"] == "PASS"


def test_the_self_test_fails_on_a_wrong_kernel_and_on_a_training_that_does_not_learn(monkeypatch):
    wrong = verify.Line("nearest", "float32", "distance", 1.0, 0.0, 1e-6)
    monkeypatch.setattr(verify, "verify", lambda shapes: iter([wrong]))
    assert (doctor.self_test().level, "off float64: nearest" in doctor.self_test().text) == ("FAIL", True)
    monkeypatch.setattr(verify, "verify", lambda shapes: iter([]))
    monkeypatch.setattr(doctor, "_tiny_training", lambda device, steps: (0.5, float("nan")))
    assert doctor.self_test().level == "FAIL"

    def broken(device, steps):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(doctor, "_tiny_training", broken)
    assert doctor.self_test().text == "RuntimeError: no kernel image is available"


@pytest.mark.usefixtures("no_self_test")
def test_a_warning_is_exit_code_1(installed, capsys):
    installed["pynvml"] = "12.0"
    assert main(["doctor"]) == 1
    assert "WARN NVML: the distribution pynvml is dead" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"triton": "3.5.1"}, "triton"),
        ({"faiss-cpu": "1.12", "faiss-gpu-cu13-cuvs": "1.15"}, "faiss alone"),
        ({"opencv-python": "4", "opencv-python-headless": "4"}, "opencv alone"),
    ],
)
def test_known_bad_installations(installed, found, name):
    assert not bad()
    installed.update(found)
    assert list(bad()) == [name]


def test_two_of_faiss_are_a_failure(installed):
    installed.update({"faiss-cpu": "1.12", "faiss-gpu-cu13-cuvs": "1.15"})
    assert level("faiss alone") == "FAIL"


def test_codecs_that_are_missing_are_named(monkeypatch):
    assert doctor.codecs().level == "PASS"
    monkeypatch.setattr(doctor, "CODECS", (("h264", "r"), ("libnone", "w")))
    assert doctor.codecs().level == "WARN"
    assert "writes no libnone" in doctor.codecs().text


def test_a_disk_that_is_nearly_full(monkeypatch):
    monkeypatch.setattr(doctor, "LITTLE", 1e30)
    assert level("free disk") == "WARN"
    monkeypatch.setattr(doctor, "TOO_LITTLE", 1e30)
    assert level("free disk") == "FAIL"


def test_known_bad_gpus(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert set(bad()) == {"compute capability", "cuDNN"}
    installed["faiss-gpu"] = "1.15.1"
    assert "CUDA 12" in bad()["faiss-gpu and CUDA"]
    del installed["faiss-gpu"]
    installed["faiss-gpu-cuvs"] = "1.15.1"
    assert "13.2" in bad()["faiss-gpu-cuvs and CUDA"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert not bad()


def test_an_old_torch(installed, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert "CVE-2026-24747" in bad()["torch"]


def test_a_cache_on_the_network(installed, tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    folder = (tmp_path / "home").resolve()
    (folder / "a b").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "local")
    points = {
        "/": "zfs",
        folder: "nfs4",
        folder / "local": "xfs",
        str(folder / "a b").replace(" ", "\\040"): "ext4",
    }
    lines = [f"device {point} {kind} rw 0 0\n" for point, kind in points.items()]
    mounts.write_text("".join([*lines, f"device {folder / 'local'} btrfs rw 0 0\n", "torn\n"]))
    kinds = {"x/.triton": "nfs4", "local/y": "btrfs", "link/y": "btrfs", "a b/c": "ext4", "../homes": "zfs"}
    for path, kind in kinds.items():
        assert doctor.file_system(folder / path, str(mounts)) == kind, path
    assert doctor.file_system(tmp_path, str(tmp_path / "none")) is None
    monkeypatch.setattr(doctor, "file_system", lambda path: "nfs4")
    assert "TRITON_CACHE_DIR" in bad()["Triton's cache"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = tmp_path / "vglann-fast"  # weights and features lie in it
    monkeypatch.setattr(doctor, "file_system", lambda path: "nfs4" if path == ours else "ext4")
    assert bad()["our cache"].startswith(f"{ours} is on nfs4")
    assert "Triton's cache" not in bad()


@pytest.mark.usefixtures("no_self_test")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_a_choice_that_cannot_run_is_said_after_the_rest(monkeypatch, capsys):
    monkeypatch.setenv("VGLANN_KERNELS", "triton")
    assert main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert "versions: " in printed.out
    assert "VGLANN_KERNELS=triton: composite: triton" in printed.err


@pytest.mark.usefixtures("no_self_test", "own_cache")
def test_the_doctor_says_the_default_where_the_choices_were_not_faster_together(capsys):
    together = Contest("defaults", "defaults", {"defaults": 1.0}, {"defaults": 1.0}, {})
    found = {**AN_ENTRY.contests, "together": together}
    write(place(), [replace(AN_ENTRY, machine=machine(CPU), contests=found)])
    main(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("measured precision")]
    assert "fp32" in line
    assert "bf16" not in line


@pytest.fixture
def run(tmp_path):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(4, frames=2))
    options = tiny_options(batch_size=2, blur="gaussian")
    return new_run(tmp_path / "run", clips, options).path


def test_verify_without_triton_says_so_and_compares_the_references(run, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["verify", str(run), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "no Triton kernel runs here: it needs a GPU" in out
    assert "comparing the references alone" in out
    assert "all within their limits" in out
    assert "bfloat16" in out


def test_verify_takes_the_shapes_of_the_run(run, monkeypatch):
    seen = []
    monkeypatch.setattr(verify, "report", lambda shapes: seen.append(shapes) or 1)
    assert main(["verify", str(run), "--device", "cpu", "--seed", "3"]) == 1  # a wrong line
    (shapes,) = seen
    assert (shapes.batch, shapes.frames, shapes.size, shapes.levels) == (2, 2, 32, 2)
    assert (shapes.blur, shapes.latent_dim, shapes.impl, shapes.seed) == ("gaussian", 8, "reference", 3)


def test_verify_of_no_run(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
