"""The command line: `main` reads the arguments, calls the verb, and answers a mistake in one line.

Nothing heavy is imported before a verb runs, so `vglann --help` is quick.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, Namespace

from vglann_fast.cli.commands import REPLAYED, perform
from vglann_fast.cli.parser import new_parser, spelled_out
from vglann_fast.errors import VglannError
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
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = new_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_processes(words)
        chosen = parser.parse_args(spelled_out(words))
        name, values = chosen.verb, chosen[chosen.verb]
        if name in ("clips", "weights", "study"):  # groups of verbs
            name, values = f"{name} {values.verb}", values[values.verb]
        with terminated_in_order():
            status = perform(name, values)
            if name in REPLAYED:
                _remember(name, values)
        return status
    except ArgumentError as error:
        return _fail(_in_plain_words(str(error), words))
    except VglannError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Interrupted as error:
        print(f"vglann: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if message := actionable(error):
            return _fail(message)
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search(_OUT_OF_MEMORY, str(error)):
            return _fail("out of memory; ask for less, or take a machine with more")
        raise


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
    rank = os.environ.get("RANK", "0")  # torchrun's number of this process, if there are several
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from vglann_fast.runtime.distributed import first_to_fail

        if not first_to_fail():
            return 2
    name = "vglann" if rank == "0" else f"vglann (process {rank})"
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def _check_processes(arguments: Sequence[str]) -> None:
    """Under torchrun only the verbs that share their work; the others would do it all in every process."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if not processes.isdigit():
        raise VglannError(f"WORLD_SIZE: expected a number of processes, got {processes!r}")
    if int(processes) > 1 and not {"train", "map"} & set(arguments[:1]):
        raise VglannError("under torchrun only train and map run in several processes; start this one alone")


def _remember(verb: str, a: Namespace) -> None:
    """Note a command that made something of a run, for `replay`."""
    from vglann_fast.run.folder import RunDir

    if os.environ.get("RANK", "0") == "0" and not a.get("dry_run"):
        RunDir.open(a.run).logs.remember(
            verb, {name: value for name, value in a.as_dict().items() if name != "run"}
        )
