"""From the words of a command line to the arguments of one command."""

from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches

import vglann_fast.cli.commands  # noqa: F401  # registers the commands
from vglann_fast import __version__
from vglann_fast.cli.config import config_values
from vglann_fast.cli.old_names import OldNames
from vglann_fast.cli.parser import COMMANDS, command_parser
from vglann_fast.errors import VglannError

GROUPS = {
    "clips": "videos to packed clips",
    "study": "a blind comparison by people",
    "weights": "weights of public networks, from files you have",
}
HELP = ("-h", "--help")


def parse(words: Sequence[str]) -> Namespace:
    """Return the arguments of the chosen command, with `func` and the name `command`.

    Precedence: words, then --config FILE. Prints what --help and --version ask for, and exits. Raises `VglannError`
    for a mistake.
    """
    old_names = OldNames()
    name, rest = _chosen(words, old_names)
    rest = old_names.words(name, rest)
    parser = command_parser(name)
    values = parser.read(rest)
    if getattr(values, "config", None) is not None:
        parser.set_defaults(**config_values(parser, values.config, old_names))
        values = parser.read(rest)
    return values


def _chosen(words: Sequence[str], old_names: OldNames) -> tuple[str, list[str]]:
    """Return the command that `words` begin with, and the words after it."""
    word, *rest = words or ("",)
    if word in HELP:
        print(overview())
        raise SystemExit(0)
    if word == "--version":
        print(f"vglann {__version__}")
        raise SystemExit(0)
    word = old_names.command(word)
    if word in GROUPS:
        group, (word, *rest) = word, rest or ("",)
        if word in HELP:
            print(overview(group))
            raise SystemExit(0)
        word = f"{group} {word}".strip()
    if word not in COMMANDS:
        raise _unknown(word)
    return word, rest


def _unknown(word: str) -> VglannError:
    if not word or word in GROUPS:
        return VglannError(f"a command is missing; `{f'vglann {word}'.strip()} --help` lists them")
    near = get_close_matches(word, COMMANDS, 1)
    hint = f"did you mean `vglann {near[0]}`?" if near else "`vglann --help` lists them"
    return VglannError(f"{word} is not a command; {hint}")


def overview(group: str = "") -> str:
    """Return the help of `vglann`, or of a group of commands."""
    shown = {name: c for name, c in COMMANDS.items() if not group or name.split()[0] == group}
    width = max(map(len, shown))
    lines = [f"  {name:{width}}  {chosen.summary.split(';')[0]}" for name, chosen in shown.items()]
    if group:
        return "\n".join((f"usage: vglann {group} COMMAND ...\n", f"{GROUPS[group]}:", *lines))
    return "\n".join(
        (
            "usage: vglann COMMAND ...\n",
            "Train non-adversarial video generators: videos -> clips -> GLO -> mapping -> new videos.\n",
            "commands:",
            *lines,
            "\n`vglann COMMAND --help` lists the arguments and examples of a command.",
        )
    )
