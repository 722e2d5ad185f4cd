"""Old names on the command line and in config files: each is read as the present one, with one warning."""

from collections.abc import Sequence
from typing import Any

from vglann_fast.options.aliases import Alias, alias, option_alias, value_alias
from vglann_fast.options.fields import flag_of
from vglann_fast.progress import say
from vglann_fast.run.environment import launched


class OldNames:
    """Reads old names, and warns of each once."""

    def __init__(self) -> None:
        self._warned: set[Alias] = set()

    def command(self, word: str) -> str:
        """Return the present name of a command."""
        old = alias("command", word)
        if old:
            self._warn(old, f"`vglann {old.old}`", f"`vglann {old.new}`")
        return old.new if old else word

    def option(self, command: str, name: str, value: Any) -> tuple[str, Any]:
        """Return the present name and value of an option."""
        old = option_alias(command, name)
        if old:
            self._warn(old, flag_of(old.old), flag_of(old.new))
            name = old.new
        former = value_alias(command, name, value)
        if former:
            self._warn(former, f"{flag_of(name)} {former.old}", f"{flag_of(name)} {former.new}")
        return name, former.new if former else value

    def words(self, command: str, words: Sequence[str]) -> list[str]:
        """Return the words after `command` with present options and values."""
        present: list[str] = []
        # The option that the next word may be the value of.
        pending = ""
        for word in words:
            is_option = word.startswith("--")
            flag, equals, value = word.partition("=") if is_option else (pending, "", word)
            written = flag.removeprefix("--").replace("-", "_")
            name, now = self.option(command, written, value if equals or not is_option else None)
            if is_option:
                flag = flag if name == written else flag_of(name)
                pending = "" if equals else flag
                present.append(f"{flag}={now}" if equals else flag)
            else:
                pending = ""
                present.append(now)
        return present

    def _warn(self, entry: Alias, old: str, new: str) -> None:
        # torchrun starts every process with the same words.
        if entry not in self._warned and launched().rank == 0:
            say(f"vglann: warning: {old} was renamed; use {new}")
        self._warned.add(entry)
