"""The verbs without any network, not even loopback: in a network namespace of their own."""

import ctypes
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from faults.case import Case, case, not_here
from faults.forked import run
from faults.route import Route, writers

CLONE_NEWNET = 0x40000000


def cases(share: float) -> Iterable[Case]:
    """Every verb of the route, once."""
    if not can_unshare():
        yield not_here("no network", "a network namespace needs root; run `make faults` as root")
        return
    with tempfile.TemporaryDirectory() as root:
        route = Route(Path(root))
        problems: list[str | None] = []
        for name in writers(share):
            verb = route.verb(name)
            route.whole(verb)
            folder = verb.place(route.root / "offline")
            ended = run(verb.start(folder), route.log, without_network)
            problems.append(route.came_through(ended, verb, folder))
        yield case(
            "no network",
            problems,
            "every verb but clips fetch, in a network namespace without interfaces; as undisturbed",
        )


def without_network() -> None:
    """Leave the network, for good. Raises OSError where that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def can_unshare() -> bool:
    """Return True if a process may leave the network."""
    child = os.fork()
    if child == 0:
        try:
            without_network()
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
