"""The command line: `main` reads the arguments, calls the verb, and answers a mistake in one line.

Nothing heavy is imported before a verb runs, so `vglann --help` is quick.
"""

import os
import re
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, Namespace

from vglann_fast.cli.commands import REPLAYED, perform
from vglann_fast.cli.parser import new_parser, spelled_out
from vglann_fast.cli.paths import expand_users
from vglann_fast.cli.streams import abandon_broken_streams, usable_streams
from vglann_fast.errors import VglannError
from vglann_fast.progress import say
from vglann_fast.run.environment import Launch, job_size, launched
from vglann_fast.run.files import actionable
from vglann_fast.runtime.signals import Interrupted, terminated_in_order

# As PyTorch, cuBLAS and cuDNN say it.
_OUT_OF_MEMORY = "(can't allocate|not enough|out of) memory|size calculation overflowed|STATUS_ALLOC_FAILED"
_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
}


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
    except ArgumentError as error:
        return _fail(_in_plain_words(str(error), words))
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
    """Read the arguments and do what they say; returns the exit status."""
    words = expand_users(words)
    chosen = new_parser().parse_args(spelled_out(words))
    name, values = chosen.verb, chosen[chosen.verb]
    if name in ("clips", "weights", "study"):  # groups of verbs
        name, values = f"{name} {values.verb}", values[values.verb]
    _check_processes(name)
    _check_current_folder()
    with terminated_in_order():
        status = perform(name, values)
        if name in REPLAYED:
            _remember(name, values)
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


def _in_plain_words(message: str, words: Sequence[str]) -> str:
    """What the parser says of a value, in the user's terms: it has a key for an option, and types for kinds."""
    message = " ".join(message.split())
    found = re.fullmatch(r'Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*)', message)
    if not found:
        return message
    key, kind, value = found.groups()
    option = "--" + key.replace("_", "-")
    name = option if any(word.split("=")[0] == option for word in words) else key.upper()
    expected = _KINDS.get(kind, kind)
    if kind.startswith("typing.Literal"):
        expected = " or ".join(", ".join(re.findall(r"'([^']+)'", kind)).rsplit(", ", 1))
    return f"{name}: expected {expected}, got {value!r}"


def _fail(message: str) -> int:
    """Print the error; of several processes only that which failed first does, for the others follow from it."""
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


def _check_processes(verb: str) -> None:
    """Under torchrun only the verbs that share their work; the others would write it all in every process."""
    if verb not in ("train", "map", "doctor") and job_size() > 1:
        raise VglannError(
            "under torchrun only train and map run in several processes; start this one alone, "
            "with WORLD_SIZE unset"
        )


def _remember(verb: str, a: Namespace) -> None:
    """Note a command that made something of a run, for `replay`."""
    from vglann_fast.run.folder import RunDir

    if launched().rank == 0 and not a.get("dry_run"):
        RunDir.open(a.run).logs.remember(
            verb, {name: value for name, value in a.as_dict().items() if name != "run"}
        )
