"""One line of the table of faults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A fault or a class of inputs, and what became of it.

    tried: how often it was done; 0: not here, and `note` says why.
    survived: how often all the program promises was true afterwards.
    lost: how often it was not, so tried == survived + lost.
    note: what "survived" was held to, or how the fault was made; one line.
    """

    name: str
    tried: int
    survived: int
    lost: int
    note: str

    def __post_init__(self) -> None:
        if self.tried != self.survived + self.lost or min(self.survived, self.lost) < 0:
            raise ValueError(f"{self.name}: {self.tried} tried, {self.survived} survived, {self.lost} lost")
        if "\n" in self.name + self.note or not self.name or not (self.tried or self.note):
            raise ValueError(f"{self.name!r}: a name, and a note of one line where nothing was tried")


def case(name: str, problems: list[str | None], note: str) -> Case:
    """The line of one try for each of `problems`: None where all went well, else what was wrong."""
    wrong = [problem for problem in problems if problem is not None]
    said = f"{note}; lost: {wrong[0]}" if wrong else note
    return Case(name, len(problems), len(problems) - len(wrong), len(wrong), " ".join(said.split()))


def not_here(name: str, reason: str) -> Case:
    """The line of a class that is not tried on this machine."""
    return Case(name, 0, 0, 0, reason)


def part_of(count: int, share: float) -> int:
    """`share` of a full count, at least one."""
    return max(1, round(count * share))
