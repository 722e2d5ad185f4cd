"""The tables about features, as `vglann evaluate`, the report and `vglann table` show them.

Two rules hold in all of them. The kernel distance stands before any Fréchet distance. A Fréchet distance of n < 2 d
videos carries `DOUBTFUL`, since it prefers samples of too little spread, and is never bold. Bold is what lies nearest
to the truth row, see `truth.py`.

Records are read leniently: what is missing or of another kind is a dash, and marked where it should not be trusted.
"""

import math
from collections.abc import Mapping
from typing import Any

from vglann_fast.metrics.judgment import SPREAD_FIGURES, frechet_is_doubtful, nearest_to_truth

FLOOR, TRUTH = "real clips (floor)", "real against real (truth)"
DOUBTFUL = "†"
DOUBTFUL_NOTE = (
    f"{DOUBTFUL} Fewer videos than twice the features (n < 2 d): such a Fréchet distance prefers samples of too "
    "little spread. Do not rank by it; compare kernel distances."
)
_REFERENCES = (FLOOR, TRUTH, "training-latents")  # rows that are not mappings, so never called best
_SPREAD_COLUMNS = ("kernel distance", "precision", "recall", "density", "coverage")
Cells = tuple[list[str], list[list[str]], set[tuple[int, int]]]  # head, rows, (row, column) of what is bold
Sources = Mapping[str, Mapping[str, Any]]


def feature_tables(
    title: str, sources: Sources, nearest: Mapping[str, float | None] | None = None
) -> list[Cells]:
    """The tables of one protocol: distances at the full n, and the truth row with every source at its n.

    Args:
        sources: figures by name as `compare.compare` returns them, `FLOOR` first. "splits" of a source, and of
            `TRUTH`, are records of `truth.Truth`.
        nearest: median distance to the nearest training clip by source, for a column of its own.
    """
    every = [(name, figures) for name, figures in sources.items() if name != TRUTH]
    n = shown(at(every[0][1], "n")) if every else "–"
    head = [f"{title}, n = {n}", "kernel distance", "Fréchet distance", "of quarters"]
    rows = [[name, kernel_cell(one), frechet_cell(one), quarters_cell(one)] for name, one in every]
    if nearest is not None:
        head.append("to nearest training clip")
        rows = [[*row, shown(nearest.get(row[0]))] for row in rows]
    return [(head, rows, set()), _spread_table(title, n, sources)]


def _spread_table(title: str, n: str, sources: Sources) -> Cells:
    """The truth row, and every source at its n; without a truth the figures at the full n, nothing of them bold."""
    truth = sources.get(TRUTH, {})
    if at(truth, "splits", "n") is None:
        names = [key for key in SPREAD_FIGURES if key != "mmd"]
        rows = [
            [name, *(shown(at(one, key)) for key in names)] for name, one in sources.items() if name != TRUTH
        ]
        return [f"{title}, n = {n}", *names], rows, set()
    count, size = (shown(at(truth, "splits", key)) for key in ("splits", "n"))
    head = [f"{title}, {count} splits of n = {size}", *_SPREAD_COLUMNS]
    ordered = [TRUTH, *(name for name in sources if name not in (FLOOR, TRUTH))]
    rows = [[name, *(spread_cell(sources[name], key) for key in SPREAD_FIGURES)] for name in ordered]
    best = {
        (ordered.index(name), column)
        for column, key in enumerate(SPREAD_FIGURES, 1)
        for name in best_sources(sources, key)
    }
    return head, rows, best


def best_sources(sources: Sources, key: str) -> set[str]:
    """Return the mappings that may be called best in one of `SPREAD_FIGURES`; none without a truth."""
    mean, sd = (at(sources.get(TRUTH), "splits", key, part) for part in ("mean", "sd"))
    if mean is None or sd is None:
        return set()
    values = {
        name: at(one, "splits", key, "mean") for name, one in sources.items() if name not in _REFERENCES
    }
    if key == "mmd":
        # The truth's distance is near 0 and has its own error: a source below it is not further off.
        values = {name: None if value is None else max(value, mean) for name, value in values.items()}
    return nearest_to_truth(
        {"mean": mean, "sd": sd}, {name: value for name, value in values.items() if value is not None}
    )


def kernel_cell(figures: Mapping[str, Any]) -> str:
    """The kernel distance and its standard error."""
    error = at(figures, "mmd_error")
    return shown(at(figures, "mmd")) + ("" if error is None else f" ± {shown(error)}")


def frechet_cell(figures: Mapping[str, Any]) -> str:
    """The Fréchet distance, marked where n < 2 d or where the record does not tell."""
    value, n, d = (at(figures, key) for key in ("frechet", "n", "dimensions"))
    if value is None:
        return shown(None)
    sure = n is not None and d is not None and not frechet_is_doubtful(n, d)
    return shown(value) if sure else f"{shown(value)} {DOUBTFUL}"


def quarters_cell(figures: Mapping[str, Any]) -> str:
    """Mean and standard deviation of the Fréchet distance over disjoint quarters, marked by a quarter's n."""
    mean, sd, n, d = (
        at(figures, *keys)
        for keys in (("quarters", "mean"), ("quarters", "sd"), ("quarters", "n"), ("dimensions",))
    )
    if mean is None or sd is None:
        return shown(None)
    sure = n is not None and d is not None and not frechet_is_doubtful(n, d)
    return f"{shown(mean)} ± {shown(sd)}" if sure else f"{shown(mean)} ± {shown(sd)} {DOUBTFUL}"


def spread_cell(figures: Mapping[str, Any], key: str) -> str:
    """Mean and standard deviation of one figure over the splits of the truth."""
    mean, sd = (at(figures, "splits", key, part) for part in ("mean", "sd"))
    return shown(None) if mean is None or sd is None else f"{shown(mean)} ± {shown(sd)}"


def is_marked(tables: list[Cells]) -> bool:
    """Return True if a cell carries `DOUBTFUL`, so that the note has to stand beside the tables."""
    return any(DOUBTFUL in cell for _, rows, _ in tables for row in rows for cell in row[1:])


def bold(cells: Cells) -> list[list[str]]:
    """The rows in Markdown, with the best in bold."""
    _, rows, best = cells
    return [
        [f"**{cell}**" if (i, j) in best else cell for j, cell in enumerate(row)]
        for i, row in enumerate(rows)
    ]


def at(value: Any, *keys: str) -> float | None:
    """The finite number under these keys, or None; booleans are not numbers."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of floats
        return None


def shown(value: float | None) -> str:
    """A number to four digits; a dash for none."""
    return "–" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
