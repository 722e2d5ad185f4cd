"""Standard streams in any state: what a command prints never turns work that is done into a failure."""

import io
import logging
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from replaced_command import replaced_command

from vglann_fast.cli.main import main
from vglann_fast.cli.parser import COMMANDS
from vglann_fast.cli.streams import usable_streams
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.progress import Progress, say

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def show(tmp_path_factory):
    """The arguments of a Python that prints a line and loads nothing heavy: `vglann clips show CLIPS`."""
    clips = write_clip_folder(tmp_path_factory.mktemp("streams") / "clips", moving_squares(2))
    return ["-m", "vglann_fast", "clips", "show", str(clips)]


@pytest.fixture
def printing(monkeypatch):
    """`vglann doctor`, which prints what it is given and logs it."""

    def replace(text):
        def verb(a):
            print(text)
            logging.getLogger("vglann_fast").info("log of %s", text)
            say(f"progress of {text}")

        monkeypatch.setitem(COMMANDS, "doctor", replaced_command("doctor", verb))

    return replace


@pytest.fixture
def without_host_logging(monkeypatch):
    """Called in a test: pytest configures logging for each of its phases, as a host program does."""
    return lambda: monkeypatch.setattr(logging.getLogger(), "handlers", [])


def ascii_stream(errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)


@pytest.mark.parametrize(
    ("text", "printed"),
    [("café", rb"caf\xe9"), ("\N{SNOWMAN}/run", rb"\u2603/run"), (os.fsdecode(b"run\xe9"), b"run\xe9")],
    ids=["latin", "symbol", "bytes"],
)
def test_an_ascii_stream_gets_escapes_and_the_bytes_of_names(text, printed, printing, monkeypatch):
    printing(text)
    out, err = ascii_stream(), ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["doctor"]) == 0
    assert out.buffer.getvalue() == printed + b"\n"
    assert b"progress of " in err.buffer.getvalue()
    assert (out.errors, err.errors) == ("strict", "strict")


def test_a_name_that_is_not_utf_8_comes_out_as_it_is(printing, monkeypatch):
    printing(os.fsdecode(b"run\xe9"))
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["doctor"]) == 0
    assert out.buffer.getvalue() == b"run\xe9\n"


def test_a_non_ascii_folder_under_an_ascii_stream(tmp_path):
    clips = write_clip_folder(tmp_path / "café", moving_squares(2))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "vglann_fast", "clips", "show", str(clips)],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"caf\xe9" in done.stdout


class OnlyWrite:
    """Stand-in of a host program for a stream: no isatty, no fileno, no encoding."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


class Full(OnlyWrite):
    def write(self, text):
        raise OSError(28, "No space left on device")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"none": lambda: None, "closed": closed, "memory": io.StringIO, "bare": OnlyWrite}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_command_runs_on_the_streams_of_any_host(stream, printing, monkeypatch):
    printing("text")
    out, err = STREAMS[stream](), STREAMS[stream]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["doctor"]) == 0
    assert sys.stdout is out
    assert sys.stderr is err


@pytest.mark.parametrize("stream", [*STREAMS.values(), Full], ids=[*STREAMS, "full"])
def test_progress_needs_no_terminal_and_no_stream(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with Progress("glo", 2, "step") as progress:
        for _ in range(2):
            progress.advance()
            progress.show(loss=1.0)


def test_standard_error_that_takes_nothing_is_no_reason_to_stop(printing, monkeypatch, without_host_logging):
    printing("text")
    without_host_logging()
    monkeypatch.setattr(sys, "stderr", Full())
    assert main(["doctor"]) == 0


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(redirection, show):
    command = f"{shlex.join([sys.executable, *show])} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at the end", "at once"])
def test_a_full_disk_behind_standard_output_is_one_line(unbuffered, show):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *show], env=environment, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("vglann: error: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_error_keeps_the_exit_code():
    command = [sys.executable, "-m", "vglann_fast", "clips", "show"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == 2


def test_closed_descriptors_are_occupied_so_that_no_file_gets_their_output(tmp_path):
    code = (
        "import os, sys; from replaced_command import replaced_command; from vglann_fast.cli.main import main\n"
        "def verb(a):\n"
        f"    with open({str(tmp_path / 'file')!r}, 'wb') as file: os.write(1, b'noise of a library')\n"
        "from vglann_fast.cli.parser import COMMANDS; COMMANDS['doctor'] = replaced_command('doctor', verb)\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        ["bash", "-c", f"exec '{sys.executable}' -c \"$0\" <&- >&- 2>&-", code], check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_the_log_is_shown_once_however_often_a_host_calls_main(printing, without_host_logging, capsys):
    printing("text")
    without_host_logging()
    for _ in range(2):
        assert main(["doctor"]) == 0
    assert capsys.readouterr().err.count("log of text") == 2
    assert not logging.getLogger().handlers
    assert not logging.getLogger("vglann_fast").handlers
    assert logging.getLogger("vglann_fast").level == logging.NOTSET


def test_logging_that_a_host_has_configured_is_left_alone(printing, monkeypatch, capsys):
    records = []

    class Host(logging.Handler):
        def emit(self, record):
            records.append(record.levelname)

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [Host()])
    before = root.level
    printing("text")
    assert main(["doctor"]) == 0
    assert "log of" not in capsys.readouterr().err
    assert (root.level, records) == (before, [])  # a host's WARNING hides our INFO


def test_streams_of_two_threads_that_overlap_come_back(monkeypatch):
    out = ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    opened, first_ended = threading.Event(), threading.Event()

    def second():
        with usable_streams():
            opened.set()
            assert first_ended.wait(60)
            print("é")

    thread = threading.Thread(target=second)
    with usable_streams():
        thread.start()
        assert opened.wait(60)
    first_ended.set()
    thread.join()
    out.flush()
    assert out.buffer.getvalue() == rb"\xe9" + b"\n"
    assert out.errors == "strict"


def test_ctrl_c_while_the_program_loads_is_no_traceback(tmp_path):
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "vglann_fast", "--help"], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, b"")


def test_every_line_on_standard_error_is_one_that_may_be_lost():
    """`say` prints it; a bare print would end the command where standard error is full or closed."""
    for file in (ROOT / "vglann_fast").rglob("*.py"):
        if file.name != "progress.py":
            assert "file=sys.stderr" not in file.read_text(encoding="utf-8"), file
