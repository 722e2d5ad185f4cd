"""A process's place in a job, and homes and caches of users who may have none."""

import os
import pwd
import sys

import pytest
import torch
from replaced_command import replaced_command

from vglann_fast.cli.main import main
from vglann_fast.cli.parser import COMMANDS
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.run.environment import Launch, default_cache, environment, home, launched
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime import memory

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def set_variables(monkeypatch):
    def set_them(text):
        for name, value in (word.split("=") for word in text.split()):
            monkeypatch.setenv(name, value)

    return set_them


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", Launch()),
        ("WORLD_SIZE=", Launch()),
        ("RANK=3", Launch()),
        ("LOCAL_RANK=2", Launch()),
        ("WORLD_SIZE=1 RANK=0 LOCAL_RANK=0", Launch()),
        ("WORLD_SIZE=1 RANK=3", Launch()),
        ("WORLD_SIZE=4 RANK=3 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", Launch(3, 4, 1, 2)),
        ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=", Launch(1, 2, 0, 1)),
    ],
)
def test_a_place_in_a_job(text, place, set_variables):
    set_variables(text)
    assert launched() == place


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("WORLD_SIZE=abc", "WORLD_SIZE=abc"),
        ("WORLD_SIZE=0", "WORLD_SIZE=0"),
        ("WORLD_SIZE=-1", "WORLD_SIZE=-1"),
        ("WORLD_SIZE=1.5", "WORLD_SIZE=1.5"),
        ("WORLD_SIZE=²", "WORLD_SIZE=²"),
        ("WORLD_SIZE=2", "RANK is not set"),
        ("WORLD_SIZE=2 RANK=", "RANK is not set"),
        ("WORLD_SIZE=2 RANK=2", "RANK=2"),
        ("WORLD_SIZE=2 RANK=x", "RANK=x"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=x", "LOCAL_RANK=x"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE=0"),
    ],
)
def test_an_impossible_place_is_named(text, named, set_variables):
    set_variables(text)
    with pytest.raises(VglannError, match=named):
        launched()


@pytest.mark.parametrize(
    "text", ["WORLD_SIZE=2", "WORLD_SIZE=2 RANK=0", "WORLD_SIZE=abc", "WORLD_SIZE=", "RANK=3"]
)
def test_help_and_doctor_run_under_whatever_job_operators_set(text, set_variables, monkeypatch, capsys):
    set_variables(text)
    monkeypatch.setitem(
        COMMANDS, "doctor", replaced_command("doctor", lambda a: print(environment()["processes"]))
    )
    for words in (["--help"], ["--version"], ["clips", "pack", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == ""


def test_a_half_set_job_is_one_line_before_anything_is_made(tmp_path, set_variables, capsys):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(2))
    set_variables("WORLD_SIZE=2 RANK=1")
    assert main(["train", str(clips), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vglann (process 1): error: ")
    assert "MASTER_ADDR" in line
    assert not (tmp_path / "run").exists()


def test_a_rank_that_was_left_behind_does_not_cost_the_line_of_history(tmp_path, set_variables, monkeypatch):
    run = RunDir.new(tmp_path / "run", OPTIONS).begin()
    monkeypatch.setitem(COMMANDS, "sample", replaced_command("sample", lambda a: None))
    set_variables("RANK=3")
    assert main(["sample", str(run.path), "--device", "cpu"]) == 0
    assert [line["verb"] for line in run.logs.history()] == ["sample"]


OPTIONS = {"preset": "modern", "seed": 0, "clips": None, "frames": 2, "size": 32, "train": {}}


@pytest.fixture
def nobody(monkeypatch):
    """A user without an entry in /etc/passwd and without HOME, as of `docker run -u 12345`."""

    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)


def test_no_home_says_what_to_set(nobody, monkeypatch):
    with pytest.raises(VglannError, match=r"HOME.*XDG_CACHE_HOME"):
        default_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(default_cache()) == "/cache/vglann-fast"


@pytest.mark.parametrize("value", ["", "relative/home"])
def test_a_home_that_is_none(value, nobody, monkeypatch):
    monkeypatch.setenv("HOME", value)
    with pytest.raises(VglannError, match="HOME"):
        home()


def test_the_doctor_examines_a_user_without_a_home(nobody, monkeypatch, capsys):
    from vglann_fast.diagnostics import doctor

    monkeypatch.setattr(doctor, "self_test", lambda: doctor.Finding("self-test", "PASS"))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "WARN Triton's cache: no folder for it" in said
    assert "set XDG_CACHE_HOME" in said


def test_the_doctor_examines_a_machine_without_a_temporary_folder(monkeypatch):
    import tempfile

    from vglann_fast.diagnostics import doctor

    def none_usable():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    levels = {finding.name: finding.level for finding in doctor.checks()}
    assert levels["torch.compile's cache"] == "WARN"
    assert doctor.self_test().level == "FAIL"


def test_memory_of_a_process_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path / "no-proc")
    cpu = torch.device("cpu")
    memory.forget_peak(cpu)
    assert memory.peak_memory(cpu) > 1e7
    assert memory.free_beside_a_step(cpu) <= memory.free_memory(cpu)


@pytest.mark.parametrize("arguments", [None, [], ["host", 3, os.fsencode("x")]])
def test_the_arguments_of_a_host_program_may_be_anything(arguments, monkeypatch):
    if arguments is None:
        monkeypatch.delattr(sys, "argv")
    else:
        monkeypatch.setattr(sys, "argv", arguments)
    assert isinstance(environment()["command"], str)
