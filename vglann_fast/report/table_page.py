"""The results of `vglann table`: table.md and the page table.html, and what a run's own page shows of them.

All from table.json, see `experiments/table.py`. It is read leniently: nothing here raises for what is in it, and
what cannot be shown is said.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vglann_fast.metrics.feature_tables import (
    DOUBTFUL_NOTE,
    FLOOR,
    TRUTH,
    Cells,
    at,
    best_sources,
    bold,
    frechet_cell,
    is_marked,
    kernel_cell,
    quarters_cell,
    shown,
    spread_cell,
)
from vglann_fast.metrics.record import (
    RECONSTRUCTION,
    TRAINING_LATENTS,
    doubts,
    escaped,
    markdown,
    tables,
)
from vglann_fast.report.artifacts import read_array, read_json
from vglann_fast.report.evaluation import by_title, distance_charts, motion_charts, number_tables
from vglann_fast.report.gallery import Card, Gallery, view
from vglann_fast.report.rendering import render_page
from vglann_fast.run.destinations import atomic_file

# The paper's Table 1: FVD on its own clips, which nobody else's table has.
PAPER = {
    "laplacian": {"imle": 2651.40, "vae": 2891.24, "gmm": 2700.96},
    "resnext101-3d": {"imle": 2305.44, "vae": 2421.96, "gmm": 2587.32},
}
COMPARABLE = "FVD"  # title of the one protocol whose values may stand beside the paper's
COLUMN = "the paper’s FVD"
# What the tables of records that are damaged raise.
DAMAGED = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")  # of a loss or mapping, and so of folders


@dataclass(frozen=True)
class DistanceTable:
    """Mappings by losses, in the distances of one protocol; (row, column) of the mappings that lie nearest to the
    truth under each loss."""

    head: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]

    @property
    def cells(self) -> Cells:
        """As `feature_tables` has them."""
        return self.head, self.rows, self.best

    @property
    def comparable(self) -> bool:
        """Return True if the paper's values stand beside them."""
        return COLUMN in self.head


@dataclass(frozen=True)
class Table:
    """Content of table.json, as far as it can be read. records: loss -> name -> record, for losses of the table."""

    losses: list[str]
    mappings: list[str]
    records: dict[str, dict[str, dict[str, Any]]]
    facts: list[str]


def read_table(folder: Path, problems: list[str]) -> Table | None:
    """The table in `folder`, or None when there is none; what is wrong with it goes to `problems`."""
    content = read_json(folder / "table.json", folder, problems)
    if content.get("format") != "vglann-table":
        return None
    losses, mappings = (_names(content.get(name), problems) for name in ("losses", "mappings"))
    runs = content.get("runs")
    records: dict[str, dict[str, dict[str, Any]]] = {}
    for loss in losses:
        run = runs.get(loss) if isinstance(runs, dict) else None
        there = run.get("records") if isinstance(run, dict) else None
        there = there if isinstance(there, dict) else {}
        names = (RECONSTRUCTION, TRAINING_LATENTS, *mappings)
        records[loss] = {name: there[name] for name in names if isinstance(there.get(name), dict)}
    train = content.get("train")
    train = train if isinstance(train, dict) else {}
    facts = [f"{key} {content[key]}" for key in ("preset", "seed") if key in content]
    facts += [f"{key} {train[key]}" for key in ("width", "epochs") if key in train]
    facts.append(f"clips {Path(str(content.get('clips'))).name}")
    return Table(losses, mappings, records, facts)


def distance_tables(table: Table) -> list[DistanceTable]:
    """A table for each protocol: the floor, the truth, videos from training latents and every mapping, under every
    loss."""
    by_loss = {loss: by_title(records) for loss, records in table.records.items()}
    titles = dict.fromkeys(title for found in by_loss.values() for title in found)
    return [
        _distance_table(title, table, {loss: found.get(title, {}) for loss, found in by_loss.items()})
        for title in titles
    ]


def _distance_table(title: str, table: Table, figures: dict[str, dict[str, Any]]) -> DistanceTable:
    n = next((at(one, "n") for sources in figures.values() for one in sources.values()), None)
    names = [FLOOR, TRUTH, TRAINING_LATENTS, *table.mappings]
    head, rows = [f"{title}, n = {shown(n)}"], [[name] for name in names]
    best: set[tuple[int, int]] = set()
    for loss, sources in figures.items():
        known = {name: sources.get(name, {}) for name in names}
        columns = {
            loss: [kernel_cell(one) for one in known.values()],
            "of splits": [spread_cell(one, "mmd") for one in known.values()],
            "Fréchet": [frechet_cell(one) for one in known.values()],
            "of quarters": [quarters_cell(one) for one in known.values()],
        }
        columns = {
            name: cells for name, cells in columns.items() if name == loss or set(cells) != {shown(None)}
        }
        best |= {
            (names.index(name), len(head) + list(columns).index("of splits"))
            for name in best_sources(sources, "mmd")
            if name in table.mappings
        }
        if title == COMPARABLE and loss in PAPER:
            columns[COLUMN] = [shown(PAPER[loss].get(name)) for name in names]
        for name, cells in columns.items():
            head.append(name)
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    return DistanceTable(head, rows, best)


def paper_note(found: Sequence[DistanceTable]) -> str:
    """Return the note on comparing these values with the paper's own."""
    if any(one.comparable for one in found):
        return (
            "The paper’s values are of its own clips: compare which mapping and which loss comes first, not the "
            "numbers. Values under any other title are of other networks, and not comparable with the paper’s at all."
        )
    return (
        "The paper’s Table 1 is in FVD, the distance in features of I3D. None of these values is FVD, so none is "
        "comparable with the paper’s."
    )


def write_table_page(folder: str | Path) -> Path:
    """Write table.md and table.html from what the table in `folder` holds; returns table.md.

    Raises `VglannError` when the disk is full, or jinja2 or OpenCV is missing.
    """
    folder = Path(folder)
    problems: list[str] = []
    table = read_table(folder, problems) or Table([], [], {}, [])
    results = folder / "table.md"
    with atomic_file(results) as temporary:
        temporary.write_text(as_markdown(table), encoding="utf-8", errors="replace")
    found = distance_tables(table)
    page = render_page(
        "table.html",
        name=folder.resolve().name,
        facts=table.facts,
        tables=found,
        paper_note=paper_note(found),
        doubtful_note=DOUBTFUL_NOTE,
        real=_strips(folder, "real", "real clips", problems),
        samples={
            loss: [
                (kind, _strips(folder, f"{loss}/{kind}", f"{kind}, {loss}", problems))
                for kind in table.mappings
            ]
            for loss in table.losses
        },
        runs=[
            (
                loss,
                number_tables(records),
                [*distance_charts(records), *motion_charts(_without(records, TRAINING_LATENTS))],
            )
            for loss, records in table.records.items()
        ],
        warnings=_warnings(table),
        doubts=_doubts(table, problems),
        problems=problems,
    )
    with atomic_file(folder / "table.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return results


def as_markdown(table: Table) -> str:
    """The whole of the results as Markdown."""
    found = distance_tables(table)
    parts = ["# Mappings by losses", escaped(", ".join(table.facts)) + "."]
    parts += [markdown(one.head, bold(one.cells)) for one in found]
    parts.append(
        "Under each loss the kernel distance to real clips, held out from training: lower is nearer, 0 is equal. "
        f"**Bold**: what lies nearest to the truth, or within its spread. {paper_note(found)}"
    )
    if is_marked([one.cells for one in found]):
        parts.append(DOUBTFUL_NOTE)
    parts += [f"**But:** {escaped(line)}." for line in _warnings(table)]
    for loss, records in table.records.items():
        if RECONSTRUCTION in records and len(records) > 1:
            parts += [f"## {loss}", *_as_measured(records)]
    return "\n\n".join(parts) + "\n"


def _as_measured(records: dict[str, dict[str, Any]]) -> list[str]:
    """The tables of a run as `vglann evaluate` prints them, and what makes them doubtful."""
    try:
        return [tables(records), *(f"- {escaped(line)}" for line in doubts(records))]
    except DAMAGED:
        return ["Its records are damaged."]


def _doubts(table: Table, problems: list[str]) -> list[str]:
    lines = []
    for loss, records in table.records.items():
        try:
            lines += [f"{loss}, {line}" for line in doubts(records)]
        except DAMAGED:
            problems.append(f"table.json: the records of {loss} are damaged")
    return lines


def _warnings(table: Table) -> list[str]:
    """Return what is wrong with the clips of the comparison, each line once."""
    every = (one for records in table.records.values() for one in records.values())
    return list(dict.fromkeys(line for one in every for line in _texts(one.get("warnings"))))


def _without(records: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {key: record for key, record in records.items() if key != name}


def _strips(folder: Path, place: str, of: str, problems: list[str]) -> Gallery:
    """The videos of samples/`place`, none if there are none."""
    video: np.ndarray | None = read_array(folder / "samples" / place / "video.npy", 3, folder, problems)
    if video is None:
        return Gallery()
    cards = [Card([view("Video", f"{i + 1}: {of}", one, 84)], [], []) for i, one in enumerate(video)]
    return Gallery(cards, len(cards))


def _names(value: Any, problems: list[str]) -> list[str]:
    """Return the elements of a list that name losses or mappings, each once: they become paths and links."""
    names = dict.fromkeys(_texts(value))
    odd = [name for name in names if not _NAME.fullmatch(name) or name == TRAINING_LATENTS]
    problems += [f"table.json: {name[:100]!r} is not a name" for name in odd]
    return [name for name in names if name not in odd]


def _texts(value: Any) -> list[str]:
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []
