"""The decoding child finds the parent's modules and no others, and blames no video for the limits of the machine."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

av = pytest.importorskip("av")
pytest.importorskip("cv2")

from decoding import decode, frames_or_reason, pictures  # noqa: E402
from video_files import quadrants, write_video  # noqa: E402

import vglann_fast  # noqa: E402
from vglann_fast.clips import decode as decode_module  # noqa: E402
from vglann_fast.clips.decode import DecodeJob, DecodeLimits, decode_all  # noqa: E402
from vglann_fast.errors import VglannError  # noqa: E402

ROOT = Path(vglann_fast.__file__).parent.parent
# Modules of the standard library, of this package and of packages that the child imports; and what Python runs first.
SHADOWS = [
    *("json", "enum", "types", "random", "select", "signal", "subprocess", "fractions", "hashlib", "typing"),
    *("importlib/__init__", "numpy/__init__", "av/__init__", "cv2/__init__", "vglann_fast/__init__"),
    *("sitecustomize", "usercustomize", "vglann_fast/clips/decode_child"),
]


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "a.mkv", pictures(3))


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A current folder full of modules that must not be imported."""
    folder = tmp_path / "hostile"
    for name in SHADOWS:
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("import os; open(os.environ['IMPORTED'], 'a').write(__file__); raise SystemExit(7)\n")
    monkeypatch.setenv("IMPORTED", str(tmp_path / "imported"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("entries", [[], [""], ["."], [None]], ids=["none", "empty", "dot", "absolute"])
def test_modules_in_the_current_folder_are_not_imported(tmp_path, video, hostile, monkeypatch, entries):
    """However the folder came to be the first of sys.path, after the parent had imported its modules."""
    monkeypatch.setattr(sys, "path", [str(hostile) if e is None else e for e in entries] + sys.path)
    (result,) = decode(tmp_path / "scratch", video)
    assert frames_or_reason(result) == 3
    assert not (tmp_path / "imported").exists()


def test_the_command_line_does_not_run_what_lies_in_the_current_folder(tmp_path, video, hostile):
    # `-c` puts the current folder first, which `vglann` does not; -P keeps it out.
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from vglann_fast.cli.main import main; sys.exit(main())",
    ]
    command += ["clips", "pack", str(video), "--out", str(tmp_path / "clips")]
    command += ["--frames", "3", "--size", "32", "--workers", "1", "--min-motion", "0"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


def test_a_package_that_is_found_in_the_current_folder_alone_is_used(tmp_path, video, monkeypatch):
    monkeypatch.chdir(ROOT)
    site = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    monkeypatch.setattr(sys, "path", ["", *site])
    (result,) = decode(tmp_path / "scratch", video)
    assert frames_or_reason(result) == 3


def test_modules_are_found_where_the_parent_finds_them(tmp_path, video, monkeypatch):
    """A folder that only the parent's sys.path knows comes before others, and its module is the one imported."""
    (tmp_path / "here").mkdir()
    code = f"open({str(tmp_path / 'seen')!r}, 'w').write('seen'); raise ImportError('of the test')\n"
    (tmp_path / "here" / "cv2.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *sys.path])
    with pytest.raises(VglannError, match="of the test"):
        decode(tmp_path / "scratch", video)
    assert (tmp_path / "seen").exists()


@pytest.mark.parametrize("entry", [Path("."), None, 7, b"bytes", "null\0character", os.fsdecode(b"caf\xe9")])
def test_entries_of_sys_path_that_import_passes_over_do_no_harm(tmp_path, video, monkeypatch, entry):
    monkeypatch.setattr(sys, "path", [*sys.path, entry])
    (result,) = decode(tmp_path / "scratch", video)
    assert frames_or_reason(result) == 3


def test_what_customization_prints_is_not_taken_for_an_answer(tmp_path, video, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('welcome')\nprint('{}')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    (result,) = decode(tmp_path / "scratch", video)
    assert frames_or_reason(result) == 3


def decode_under(limits, *videos, scratch):
    """The results, or the error, of decoding in a process of these limits."""
    code = (
        "import resource, sys, pathlib\n"
        f"for name, value in {limits!r}.items(): resource.setrlimit(getattr(resource, name), value)\n"
        "from vglann_fast.clips.decode import DecodeJob, DecodeLimits, decode_all\n"
        "from vglann_fast.errors import VglannError\n"
        "jobs = [DecodeJob(pathlib.Path(name)) for name in sys.argv[2:]]\n"
        "try:\n"
        "    for result in decode_all(jobs, pathlib.Path(sys.argv[1]), DecodeLimits(), 1):\n"
        "        print(getattr(result, 'reason', 'decoded'))\n"
        "except VglannError as error:\n"
        "    print('VglannError', error)\n"
    )
    scratch.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, str(scratch), *map(str, videos)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A small file of large frames."""
    return write_video(tmp_path_factory.mktemp("large") / "large.mkv", [quadrants(2000, 3000)] * 3)


def test_a_hard_limit_on_data_is_not_raised(tmp_path, video):
    half = 1500 * 2**20
    assert decode_under({"RLIMIT_DATA": (half, half)}, video, scratch=tmp_path / "scratch") == ["decoded"]


def test_memory_that_the_machine_does_not_give_is_not_the_videos_fault(tmp_path, video, large):
    needed = used_by_an_idle_child(tmp_path, video)
    limit = needed + 60 * 2**20
    (first, second) = decode_under(
        {"RLIMIT_DATA": (limit, limit)}, video, large, scratch=tmp_path / "scratch"
    )
    assert first == "decoded"
    assert second.startswith("VglannError")
    assert "ulimit -d" in second
    assert "large.mkv" in second


def used_by_an_idle_child(tmp_path, video):
    """Bytes of data of a child that has decoded a small video."""
    seen = []
    popen = decode_module.subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decode_module.subprocess, "Popen", lambda *a, **k: seen.append(popen(*a, **k)) or seen[-1]
        )
        (tmp_path / "idle").mkdir()
        results = decode_all([DecodeJob(video), DecodeJob(video)], tmp_path / "idle", DecodeLimits(), 1)
        next(results)
        status = Path(f"/proc/{seen[0].pid}/status").read_text()
        results.close()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")) * 1024


def test_a_child_that_cannot_start_is_not_the_videos_fault(tmp_path, video, monkeypatch):
    limit = 40 * 2**20
    start = decode_module.subprocess.Popen

    def starved(*args, **kwargs):
        return start(
            *args, **kwargs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        )

    monkeypatch.setattr(decode_module.subprocess, "Popen", starved)
    with pytest.raises(VglannError, match=r"ulimit -a.*--workers"):
        decode(tmp_path / "scratch", video)


def test_a_process_that_cannot_be_made_is_not_the_videos_fault(tmp_path, video, monkeypatch):
    def refused(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(decode_module.subprocess, "Popen", refused)
    with pytest.raises(VglannError, match="temporarily unavailable"):
        decode(tmp_path / "scratch", video)


@pytest.mark.parametrize("files_before", [0, 1])
def test_a_child_that_runs_out_of_cpu_time_gets_more_or_the_machine_is_named(
    tmp_path, video, monkeypatch, files_before
):
    """The time is a process's: where other videos took it, the next process has enough for one."""
    start, children = decode_module.subprocess.Popen, []

    def started(*args, **kwargs):
        children.append(start(*args, **kwargs))
        if not files_before:
            children[-1].send_signal(signal.SIGXCPU)
        return children[-1]

    monkeypatch.setattr(decode_module.subprocess, "Popen", started)
    (tmp_path / "scratch").mkdir()
    jobs = (DecodeJob(video) for _ in range(2))
    results = decode_all(jobs, tmp_path / "scratch", DecodeLimits(), 1)
    if not files_before:
        with pytest.raises(VglannError, match="ulimit -t"):
            next(results)
        return
    # The first result waits until both are asked for, so the signal comes behind the first or the second.
    first = next(results)
    children[0].send_signal(signal.SIGXCPU)
    assert [frames_or_reason(first), *map(frames_or_reason, results)] == [3, 3]


def test_few_open_files_are_enough_or_the_machine_is_named(tmp_path, video):
    lines = set()
    for most in range(6, 16):
        lines |= set(decode_under({"RLIMIT_NOFILE": (most, most)}, video, scratch=tmp_path / "scratch"))
    assert "decoded" in lines
    assert all(line == "decoded" or line.startswith("VglannError") for line in lines)


def test_a_stack_of_a_gigabyte_does_not_take_the_decoders_memory(tmp_path, video):
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    if 0 <= hard < 2**30:
        pytest.skip("the hard limit on stacks is lower here")
    assert decode_under({"RLIMIT_STACK": (2**30, hard)}, video, scratch=tmp_path / "scratch") == ["decoded"]
