"""The commands, how one is added, and how words become its arguments.

A command is one function that adds its arguments and says what it does:

    @command("sample", "make new videos from noise", "vglann sample run -n 16 --seed 1")
    def add_sample(parser: Parser) -> None:
        parser.add_argument("run", metavar="RUN", help="run folder")
        parser.set_defaults(func=_sample)

It stands in a module of `commands/`. Help, errors, --config and `vglann replay` follow from the arguments.
"""

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from vglann_fast.cli.types import boolean, names
from vglann_fast.errors import VglannError
from vglann_fast.options.fields import flag_of

# What argparse and this file keep beside the arguments.
INTERNAL = ("func", "command", "config", "dry_run", "help", "block", "given")


@dataclass(frozen=True)
class Command:
    """One command. `examples` are whole command lines."""

    name: str
    summary: str
    examples: tuple[str, ...]
    add: Callable[["Parser"], None]


COMMANDS: dict[str, Command] = {}


def command(name: str, summary: str, *examples: str) -> Callable[..., Callable[["Parser"], None]]:
    """Register the decorated function as the command `name`; "clips pack" is `pack` of the group `clips`."""

    def register(add: Callable[["Parser"], None]) -> Callable[["Parser"], None]:
        COMMANDS[name] = Command(name, summary, examples, add)
        return add

    return register


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, within limits."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((110, 24)).columns
        super().__init__(prog, max_help_position=26, width=min(max(columns, 80), 110))


class Parser(argparse.ArgumentParser):
    """The parser of one command. Mistakes are `VglannError` of one line that names the argument."""

    def __init__(self, name: str) -> None:
        super().__init__(
            prog=f"vglann {name}", formatter_class=_Help, exit_on_error=False, allow_abbrev=False
        )
        self.set_defaults(command=name)

    @property
    def arguments(self) -> dict[str, argparse.Action]:
        """The arguments by the names of their attributes."""
        return {action.dest: action for action in self._actions if action.dest not in INTERNAL}

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the arguments in `words`, and in `given` the flags of those that are there. Raises `VglannError`."""
        # argparse of Python 3.11 and 3.12 makes an empty list of such a value.
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                raise VglannError(f"{word[:-3]}: expected a value, got '--'; see `{self.prog} --help`")
        try:
            values, rest = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            name = f"{error.argument_name}: " if error.argument_name else ""
            raise VglannError(f"{name}{error.message}; see `{self.prog} --help`") from error
        for word in rest:
            if word.startswith("-"):
                raise self.unknown(word)
        if rest:
            raise VglannError(f"{rest[0]}: one argument too many; see `{self.prog} --help`")
        values.given = self._given(words)
        return values

    def _given(self, words: Sequence[str]) -> list[str]:
        """Return what the arguments in `words` are called in messages: "RUN", "--seed"."""
        # What is in the namespace before keeps argparse from filling in a default.
        before = argparse.Namespace(**dict.fromkeys(self.arguments, argparse.SUPPRESS))
        after = vars(self.parse_known_args(words, before)[0])
        # A positional argument that may be left out is None then.
        return [
            action.option_strings[0] if action.option_strings else str(action.metavar)
            for name, action in self.arguments.items()
            if after[name] not in (argparse.SUPPRESS, None)
        ]

    def unknown(self, word: str, where: str = "") -> VglannError:
        """Return the error for an option that the command does not have, with the nearest one that it has.

        where: the file that the option stands in, if any.
        """
        word = word.partition("=")[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = get_close_matches(word, flags, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"see `{self.prog} --help`"
        return VglannError(f"{where}{word} is not an option of `{self.prog}`; {hint}")

    def error(self, message: str) -> Any:
        """Raise what argparse has no argument for, as the missing ones."""
        raise VglannError(f"{self.prog.removeprefix('vglann ')}: {message}; see `{self.prog} --help`")

    def read_values(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return arguments by name, given as text, numbers, booleans or lists of names, as `read` would.

        None is an argument that was not given. Raises `VglannError` that begins with `where`.
        """
        arguments, found = self.arguments, {}
        for name, value in values.items():
            if name not in arguments:
                raise self.unknown(flag_of(name), where)
            if value is not None:
                try:
                    found[name] = _converted(arguments[name], value)
                except (argparse.ArgumentTypeError, ValueError) as error:
                    raise VglannError(f"{where}{name}: {error}") from error
        return found


def _converted(action: argparse.Action, value: Any) -> Any:
    if action.type is names and isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = ",".join(value)
    if isinstance(value, bool):
        value = "true" if value else "false"
    if not isinstance(value, str | int | float):
        kind = "a list" if isinstance(value, list) else "a mapping"
        raise argparse.ArgumentTypeError(f"expected one value, got {kind}")
    convert: Any = boolean if action.nargs == 0 else action.type or str
    return convert(str(value))


def command_parser(name: str) -> Parser:
    """Return the parser of a command."""
    chosen = COMMANDS[name]
    parser = Parser(name)
    parser.description = chosen.summary[0].upper() + chosen.summary[1:] + "."
    parser.epilog = "\n".join(("examples:", *(f"  {example}" for example in chosen.examples)))
    chosen.add(parser)
    if parser.usage is None:
        parser.usage = " ".join((parser.prog, *_needed(parser), "[options]"))
    return parser


def _needed(parser: Parser) -> list[str]:
    """Return the positional arguments and the options without which the command is refused."""
    found = []
    for action in parser.arguments.values():
        name = str(action.metavar or action.dest)
        if action.option_strings:
            found += [f"{action.option_strings[0]} {name}"] if action.required else []
        else:
            many = f"{name} ..." if action.nargs in ("+", "*") else name
            found.append(many if action.required else f"[{many}]")
    return found


def values_for(name: str, words: Sequence[str], values: Mapping[str, Any], where: str) -> argparse.Namespace:
    """Return the arguments of command `name`: `words`, and others by name as history.jsonl has them.

    A value that is missing has its default; one that this version does not know is left out. Raises as
    `Parser.read_values`.
    """
    parser = command_parser(name)
    known = {key: value for key, value in values.items() if key in parser.arguments}
    parser.set_defaults(**parser.read_values(known, where))
    return parser.read(words)


def perform(values: argparse.Namespace) -> int:
    """Run the command that was chosen, and return the exit status.

    A mistake, and an operation that --deterministic does not have, is a `VglannError`.
    """
    if not hasattr(values, "device"):
        return values.func(values) or 0
    from vglann_fast.runtime.numerics import numerics

    # What holds until the command ends, see `device_and_kernels`.
    with ExitStack() as values.block:
        # A training has its --precision; everywhere else PyTorch would allow TensorFloat-32 to convolutions.
        values.block.enter_context(
            numerics(
                deterministic=bool(getattr(values, "deterministic", False)),
                tf32=False,
                threads=getattr(values, "threads", None),
            )
        )
        return values.func(values) or 0
