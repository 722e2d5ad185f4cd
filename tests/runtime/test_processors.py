"""Limits on the processors of this process, and the settings of a program before it loads PyTorch."""

import os
import subprocess
import sys

import pytest

from vglann_fast.runtime import processors


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Write a host's files: /proc/self/cgroup, and by path below /sys/fs/cgroup what groups grant."""
    monkeypatch.setattr(processors, "PROC", tmp_path / "proc")
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "sys")
    monkeypatch.setattr(processors, "allowed", lambda: 8)

    def write(groups, **files):
        (tmp_path / "proc").write_text("\n".join(groups) + "\n")
        for path, text in files.items():
            file = tmp_path / "sys" / path.replace("__", "/").replace("_DOT_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    return write


def test_the_least_quota_of_a_group_and_those_above_it(host):
    host(["0::/a/b"], a__b__cpu_DOT_max="400000 100000", a__cpu_DOT_max="150000 100000")
    assert processors.quota() == 1.5
    assert processors.available() == 2


def test_a_group_without_a_limit(host):
    host(["0::/a"], a__cpu_DOT_max="max 100000")
    assert processors.quota() is None
    assert processors.available() == 8


def test_a_container_whose_path_is_the_hosts(host):
    """The group is mounted at the top, and its path on the host is not there."""
    host(["0::/kubepods/pod7/x"], cpu_DOT_max="20000 100000")
    assert processors.quota() == 0.2
    assert processors.available() == 1


def test_version_1(host):
    files = {"cpu__a__cpu_DOT_cfs_quota_us": "300000", "cpu__a__cpu_DOT_cfs_period_us": "100000"}
    host(["5:memory:/m", "4:cpu,cpuacct:/a", "0::/"], **files)
    assert processors.quota() == 3
    host(["4:cpu,cpuacct:/a"], cpu__a__cpu_DOT_cfs_quota_us="-1")
    assert processors.quota() is None


@pytest.mark.parametrize("text", ["", "1", "a b", "100000 0", "-1 100000"])
def test_what_cannot_be_read_limits_nothing(host, text):
    host(["0::/"], cpu_DOT_max=text)
    assert processors.quota() is None


def test_a_machine_without_control_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(processors, "PROC", tmp_path / "none")
    assert processors.quota() is None
    assert processors.available() == processors.allowed() >= 1


def load(monkeypatch, tmp_path, *running):
    """Let each look at the load find so many running processes."""
    looks = iter(running)

    class Load:
        def read_text(self):
            return f"5.3 5.4 5.3 {next(looks)}/84 22226\n"

    monkeypatch.setattr(processors, "LOAD", Load())
    monkeypatch.setattr(processors, "PAUSE", 0)


@pytest.mark.parametrize(
    ("running", "busy"), [((1, 1, 1), False), ((1, 3, 1), False), ((2, 1, 2), True), ((9, 9, 9), True)]
)
def test_threads_sleep_where_others_are_busy(host, monkeypatch, tmp_path, running, busy):
    host(["0::/"])
    load(monkeypatch, tmp_path, *running)
    environment = {}
    processors.be_a_good_guest(environment)
    assert environment.get("OMP_WAIT_POLICY") == ("PASSIVE" if busy else None)
    assert "OMP_NUM_THREADS" not in environment


@pytest.mark.parametrize("text", ["", "0.1 0.2", "a b c d/e"])
def test_a_load_that_cannot_be_read_changes_nothing(host, monkeypatch, tmp_path, text):
    host(["0::/"])
    (tmp_path / "load").write_text(text)
    for file in (tmp_path / "load", tmp_path / "none"):
        monkeypatch.setattr(processors, "LOAD", file)
        environment = {}
        processors.be_a_good_guest(environment)
        assert not environment


def test_threads_sleep_within_a_quota_unless_the_user_has_said_how_they_wait(host, monkeypatch, tmp_path):
    host(["0::/"], cpu_DOT_max="200000 100000")
    load(monkeypatch, tmp_path, *[1] * 20)
    environment = {}
    processors.be_a_good_guest(environment)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "2"
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "200"}):
        environment = {**own, "OMP_NUM_THREADS": "3", "OPENBLAS_THREAD_TIMEOUT": "26"}
        before = dict(environment)
        processors.be_a_good_guest(environment)
        assert environment == before


@pytest.mark.parametrize(
    ("line", "units"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd bf16", True),
        ("cpu\t: POWER9", None),
    ],
)
def test_bfloat16_units(monkeypatch, tmp_path, line, units):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(processors, "PROCESSORS", tmp_path / "cpuinfo")
    assert processors.bfloat16_units() is units


def waiting_after(code):
    """OMP_WAIT_POLICY, and whether PyTorch is loaded, after code in a new process beside a busy one."""
    code = f"from vglann_fast.runtime import processors; processors.others_are_busy = lambda: True; {code}"
    environment = {name: value for name, value in os.environ.items() if name not in processors.WAITING}
    code += "; import os; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def test_the_program_sets_it_before_pytorch_is_loaded_and_an_import_sets_nothing():
    program = "sys.argv[1:] = ['presets', '--nonsense']; from vglann_fast.__main__ import program; program()"
    assert waiting_after(program) == "PASSIVE False"
    assert waiting_after("import vglann_fast as vf; vf.load, vf.train") == "None True"
