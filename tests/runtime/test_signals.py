"""Signals: what ends a training or a command in order, and what belongs to the host program."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.train import train
from vglann_fast.runtime.signals import Interrupted, signals_collected, terminated_in_order

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def usual_handlers():
    """The handlers of a fresh program; pytest's own may differ."""
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(4))


def current():
    return {number: signal.getsignal(number) for number in ENDING}


@pytest.mark.parametrize("number", ENDING)
def test_a_training_is_told_of_each_signal_and_the_handlers_come_back(number, usual_handlers):
    with signals_collected(alone=True) as received:
        os.kill(os.getpid(), number)
        assert received == [number]
    assert current() == usual_handlers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_any_command_leaves_by_an_exception(number, usual_handlers):
    with pytest.raises(SystemExit) as caught, terminated_in_order():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    assert current() == usual_handlers


def test_the_two_signals_of_a_session_that_ends_do_not_cut_cleaning_up_short():
    cleaned = []
    with pytest.raises(SystemExit) as caught, terminated_in_order():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)
    assert cleaned
    assert caught.value.code == 129


def test_a_training_inside_a_command_is_the_one_that_is_told():
    with terminated_in_order(), signals_collected(alone=True) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]


@pytest.mark.parametrize("number", ENDING)
def test_what_the_host_ignores_stays_ignored(number):
    """As SIGINT is in a command started with & in a script, and SIGHUP under nohup."""
    signal.signal(number, signal.SIG_IGN)
    with terminated_in_order(), signals_collected(alone=True) as received:
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    assert received == []


@pytest.mark.parametrize("number", ENDING)
def test_what_the_host_handles_is_handled_by_the_host(number):
    told = []
    signal.signal(number, lambda number, frame: told.append(number))
    with terminated_in_order(), signals_collected(alone=True) as received:
        os.kill(os.getpid(), number)
    assert (told, received) == ([number], [])


def test_a_thread_has_no_handlers_and_needs_none():
    entered = []

    def work():
        with terminated_in_order(), signals_collected(alone=True) as received:
            entered.append(received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [[]]


def test_a_training_in_another_thread_trains(clips, tmp_path):
    """As Streamlit, Flask and Gradio call it."""
    run = new_run(tmp_path / "run", clips, tiny_options(batch_size=2, epochs=2))
    thread = threading.Thread(target=train, args=(ClipSet.open(clips, "train"), run))
    thread.start()
    thread.join()
    assert run.checkpoints.load()[0]["step"] == 4


def test_sighup_saves_as_sigterm_does(clips, tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", clips, tiny_options(batch_size=2, epochs=1000))
    add = run.logs.add

    def add_and_hang_up(row):
        add(row)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(run.logs, "add", add_and_hang_up)
    with pytest.raises(Interrupted) as caught:
        train(ClipSet.open(clips, "train"), run, log_every=3)
    assert caught.value.exit_code == 129
    assert run.checkpoints.load()[0]["step"] == 3


def test_handlers_come_back_when_a_training_fails(clips, tmp_path, monkeypatch, usual_handlers):
    run = new_run(tmp_path / "run", clips, tiny_options(batch_size=2, epochs=2))

    def fail(row):
        raise KeyError(row["stage"])

    monkeypatch.setattr(run.logs, "add", fail)
    with pytest.raises(KeyError):
        train(ClipSet.open(clips, "train"), run, log_every=1)
    assert current() == usual_handlers


FOREIGN = """
#include <signal.h>
#include <unistd.h>
static void told(int number) { if (write(1, "the host was told\\n", 18)) {} }
__attribute__((constructor)) static void start(void) { signal(SIGTERM, told); signal(SIGINT, told); }
"""
UNDER_FOREIGN_HANDLERS = """
import os, signal
from vglann_fast.runtime.signals import signals_collected, terminated_in_order
assert signal.getsignal(signal.SIGTERM) is None
with terminated_in_order(), signals_collected(alone=True) as received:
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
assert not received
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_handlers_of_c_code_stay(tmp_path):
    """As R, Julia and Rust hosts install them: Python cannot name them, so it could not restore them."""
    (tmp_path / "host.c").write_text(FOREIGN)
    library = tmp_path / "host.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "host.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", UNDER_FOREIGN_HANDLERS],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the host was told") == 2


def test_handlers_that_python_cannot_name_are_left_alone(monkeypatch):
    """The same without a compiler."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was replaced"))
    with terminated_in_order(), signals_collected(alone=True) as received:
        assert received == []
