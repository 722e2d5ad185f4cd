"""The command line: `main` reads the arguments, runs the command, and answers a mistake in one line.

Nothing heavy is imported before a command runs, so `vglann --help` is quick.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence

from vglann_fast.cli.parser import INTERNAL, perform
from vglann_fast.cli.paths import expand_users
from vglann_fast.cli.streams import abandon_broken_streams, usable_streams
from vglann_fast.cli.words import parse
from vglann_fast.errors import VglannError
from vglann_fast.experiments.replay import MADE
from vglann_fast.progress import say
from vglann_fast.run.environment import Launch, job_size, launched
from vglann_fast.run.os_errors import actionable
from vglann_fast.runtime.signals import Interrupted, terminated_in_order

# As PyTorch, cuBLAS and cuDNN say it.
_OUT_OF_MEMORY = "(can't allocate|not enough|out of) memory|size calculation overflowed|STATUS_ALLOC_FAILED"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vglann`; returns the exit status.

    0; 1 when `doctor` or `verify` found something; 2 for a mistake of the user's; 128 + n after signal n.
    """
    try:
        with usable_streams():
            return _answered(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        if arguments is None:  # a program of its own, whose streams nobody needs after it
            abandon_broken_streams()


def _answered(words: list[str]) -> int:
    """Run a command; returns the exit status, after a line for what went wrong."""
    try:
        try:
            status = _run(words)
        except SystemExit:  # --help and --version end so
            _flush_output()
            raise
        _flush_output()
        return status
    except VglannError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        return 141
    except Interrupted as error:
        say(f"vglann: {error}")
        return error.exit_code
    except OSError as error:
        if message := actionable(error):
            return _fail(message)
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search(_OUT_OF_MEMORY, str(error)):
            return _fail("out of memory; ask for less, or take a machine with more")
        raise


def _run(words: list[str]) -> int:
    """Read the arguments and run their command; returns the exit status."""
    values = parse(expand_users(words))
    _check_processes(values.command)
    _check_current_folder()
    with terminated_in_order():
        status = perform(values)
        if values.command in MADE:
            _remember(values)
    return status


def _flush_output() -> None:
    """Write what standard output still holds. Raises `VglannError` if that fails, unless its reader has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise VglannError(
            f"standard output cannot be written ({error.strerror}); send it elsewhere"
        ) from error


def _check_current_folder() -> None:
    """Raise `VglannError` where the current folder was removed: MKL would end the process with a riddle."""
    try:
        os.getcwd()
    except OSError as error:
        raise VglannError(
            f"the current folder cannot be found ({error.strerror}); cd to one that is there"
        ) from error


def _fail(message: str) -> int:
    """Print the error, in a job of several processes only in the first to fail; returns 2."""
    try:
        place = launched()
    except VglannError:
        place = Launch()
    if place.size > 1:
        from vglann_fast.runtime.distributed import first_to_fail

        if not first_to_fail():
            return 2
    name = "vglann" if place.rank == 0 else f"vglann (process {place.rank})"
    say(f"{name}: error: {' '.join(message.split())}")
    return 2


def _check_processes(command: str) -> None:
    """Raise `VglannError` under torchrun for a command that does not share its work: every process would write it."""
    if command not in ("train", "map", "evaluate", "doctor") and job_size() > 1:
        raise VglannError(
            "under torchrun only train, map and evaluate run in several processes; start this one alone, "
            "with WORLD_SIZE unset"
        )


def _remember(a: Namespace) -> None:
    """Note in the run a command that `replay` can repeat."""
    from vglann_fast.run.folder import RunDir

    if launched().rank == 0 and not getattr(a, "dry_run", False):
        options = {name: value for name, value in vars(a).items() if name not in (*INTERNAL, "run")}
        RunDir.open(a.run).logs.remember(a.command, options)
