"""Home folders in arguments: what shells leave to the program in `--out=~/clips` and in quotes."""

import os
import re
from collections.abc import Iterable

from vglann_fast.run.environment import home

_TILDE = re.compile(r"(--?[\w-]+=)?(~[^/]*)(.*)", re.DOTALL)


def expand_user(word: str) -> str:
    """Return an argument with the home folder in place of a leading `~` or `~user` of its value.

    As in a shell `./~` is a folder of that name, and so is `~name` where no such user exists.
    Raises `VglannError` where this user has no home folder.
    """
    match = _TILDE.fullmatch(word)
    if match is None:
        return word
    option, user, rest = match.groups("")
    if user == "~":
        return f"{option}{home()}{rest}"
    if os.path.lexists(user):
        return word
    return option + os.path.expanduser(user) + rest


def expand_users(words: Iterable[str]) -> list[str]:
    """Return the arguments, each as by `expand_user`."""
    return [expand_user(word) for word in words]
