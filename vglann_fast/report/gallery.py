"""Videos on a page: cards with filmstrips, beside each other."""

from dataclasses import dataclass, field

import numpy as np

from vglann_fast.report.filmstrip import Filmstrip, filmstrip

MAX_CARDS = 24  # clips shown per section; keeps the page within what a mail or a browser takes


@dataclass(frozen=True)
class View:
    """One picture of a card: its column's name, what it shows in words, and its frames."""

    label: str
    alt: str
    strip: Filmstrip


@dataclass(frozen=True)
class Card:
    """One clip: the views to compare, its streams in small, and facts (text, explanation) beneath."""

    main: list[View]
    streams: list[View]
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Gallery:
    """Cards of one section, all with the same columns, and how many clips the section's arrays hold."""

    cards: list[Card] = field(default_factory=list)
    total: int = 0


def view(label: str, of: str, video: np.ndarray, quality: int) -> View:
    """The picture of uint8 `video` (3 or 1, T, H, W), called `label`, "`label` of `of`" in words."""
    return View(label, f"{label} of {of}", filmstrip(video, quality))
