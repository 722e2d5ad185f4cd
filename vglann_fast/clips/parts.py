"""Parts of a pack: consecutive sources, packed on their own (`vglann clips pack --shard I/N`), then merged."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from vglann_fast.clips.sources import Source


@dataclass(frozen=True)
class Part:
    """A clip folder's place in a whole pack: part `number` of `of`, counted from 1.

    sources: sha256 of the names and windows of all sources of the pack, in order. Parts with other sources belong to
        another pack.
    Raises ValueError for an impossible place.
    """

    number: int
    of: int
    sources: str

    def __post_init__(self) -> None:
        if not (type(self.number) is type(self.of) is int and 1 <= self.number <= self.of):
            raise ValueError(f"part {self.number!r} of {self.of!r}")
        if not isinstance(self.sources, str):
            raise ValueError(f"part of sources {self.sources!r}")


def part_of(sources: Sequence[Source], number: int, of: int) -> tuple[Part, Sequence[Source]]:
    """Return part `number` of `of`, and its sources. Parts differ by one source in length; some may have none."""
    named = json.dumps([[source.name, source.first_frame, source.last_frame] for source in sources])
    part = Part(number, of, hashlib.sha256(named.encode()).hexdigest())
    return part, sources[len(sources) * (number - 1) // of : len(sources) * number // of]
