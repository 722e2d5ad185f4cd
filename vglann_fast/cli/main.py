"""The command line: `main` reads the arguments, runs the command, and answers a mistake in one line.

Nothing heavy is imported before a command runs, so `vglann --help` is quick.
"""

import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence

from vglann_fast.cli.parser import INTERNAL, perform
from vglann_fast.cli.words import parse
from vglann_fast.errors import VglannError
from vglann_fast.experiments.replay import MADE
from vglann_fast.run.files import actionable
from vglann_fast.runtime.signals import Interrupted, terminated_in_order

# As PyTorch, cuBLAS and cuDNN say it.
_OUT_OF_MEMORY = "(can't allocate|not enough|out of) memory|size calculation overflowed|STATUS_ALLOC_FAILED"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vglann`; returns the exit status.

    0; 1 when `doctor` or `verify` found something; 2 for a mistake of the user's; 128 + n after signal n.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_processes(words)
        values = parse(words)
        with terminated_in_order():
            status = perform(values)
            if values.command in MADE:
                _remember(values)
        return status
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


def _remember(a: Namespace) -> None:
    """Note in the run a command that `replay` can repeat."""
    from vglann_fast.run.folder import RunDir

    if os.environ.get("RANK", "0") == "0" and not getattr(a, "dry_run", False):
        options = {name: value for name, value in vars(a).items() if name not in (*INTERNAL, "run")}
        RunDir.open(a.run).logs.remember(a.command, options)
