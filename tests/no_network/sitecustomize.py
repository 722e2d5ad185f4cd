"""Refuses every connection but to this machine, in each Python process that has this folder on its PYTHONPATH.

Names are not looked up either, but those of this machine. Sockets that a library opens without Python's socket module
are not seen; for those `faults/offline.py` runs the commands without any network.
"""

import ipaddress
import sys
from typing import Any


def is_here(host: Any) -> bool:
    """Whether this host is this machine: a loopback address, its name, or none."""
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook. Raises ConnectionRefusedError."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]  # a tuple for the Internet, a path for this machine; None: as connected
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not is_here(host):
        raise ConnectionRefusedError(f"no network in tests: {event} {host!r}")


sys.addaudithook(refuse)
