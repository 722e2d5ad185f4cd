"""The report's tables and charts of what `vglann evaluate` measured.

Records are read leniently, as everything the report shows: what is missing or of another kind is left out.
"""

from collections.abc import Mapping
from typing import Any

from vglann_fast.metrics.record import BASELINE_COLUMNS, QUALITY_COLUMNS, QUALITY_ROWS, pca_cell_is_exact
from vglann_fast.report.artifacts import number
from vglann_fast.report.plots import Chart, Series, bars, chart

FLOOR = "real clips (floor)"
_SHARES = ("precision", "recall", "density", "coverage")
Records = Mapping[str, dict[str, Any]]
Table = tuple[list[str], list[list[str]]]


def number_tables(records: Records) -> list[Table]:
    """(head, rows) of reconstruction and its baselines, and of each kind of features."""
    found = records.get("reconstruction", {})
    qualities = {name: found[key] for key, name in QUALITY_ROWS.items() if isinstance(found.get(key), dict)}
    tables: list[Table] = []
    for title, columns in (("reconstruction", QUALITY_COLUMNS), ("baselines", BASELINE_COLUMNS)):
        rows = [
            [name, shown(at(one, "clips")), *(_quality_cell(one, column) for column in columns)]
            for name, one in qualities.items()
        ]
        tables += [([title, "n", *columns.values()], rows)] if rows else []
    for title, sources in by_title(records).items():
        rows = [
            [name, shown(at(one, "frechet")), spread(one), *(shown(at(one, key)) for key in _SHARES)]
            for name, one in sources.items()
        ]
        n = at(next(iter(sources.values())), "n")
        tables.append(([f"{title}, n = {shown(n)}", "distance", "of quarters", *_SHARES], rows))
    return tables


def _quality_cell(quality: dict[str, Any], column: str) -> str:
    return "exact" if pca_cell_is_exact(quality, column) else shown(at(quality, column))


def distance_charts(records: Records) -> list[Chart]:
    """For each kind of features the Fréchet distances of all sources, and their floor."""
    charts = []
    for title, sources in by_title(records).items():
        values = {name: value for name, one in sources.items() if (value := at(one, "frechet")) is not None}
        floor = values.pop(FLOOR, None)
        try:
            svg = bars(list(values.items()), x_label=title, mark=None if floor is None else ("floor", floor))
        except ValueError:
            continue
        charts.append(Chart(f"Distance to held-out clips, {title}", [], "", svg))
    return charts


def motion_charts(records: Records) -> list[Chart]:
    """For each source how much its videos change from frame to frame, beside real clips."""
    charts = []
    for name, record in records.items():
        series = []
        for label in ("generated", "real"):
            motion = record.get("motion")
            steps = motion.get(label) if isinstance(motion, dict) else None
            steps = steps.get("steps") if isinstance(steps, dict) else None
            known = [number(step) for step in steps] if isinstance(steps, list) else []
            points = [(float(i + 1), value) for i, value in enumerate(known) if value is not None]
            series.append(Series(label, [x for x, _ in points], [y for _, y in points]))
        try:
            svg = chart(series, x_label="frame step", y_label="mean |step|, 1/255", cover=(0,))
        except ValueError:
            continue
        charts.append(Chart(f"Motion of {name}", ["generated", "real"], "", svg))
    return charts


def by_title(records: Records) -> dict[str, dict[str, dict[str, Any]]]:
    """Title of a protocol -> source -> figures; the floor, which all sources share, comes first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, record in records.items():
        features = record.get("features")
        for title, one in features.items() if isinstance(features, dict) else ():
            if isinstance(one, dict) and isinstance(one.get("generated"), dict):
                floor = one.get("floor")
                sources = found.setdefault(title, {FLOOR: floor} if isinstance(floor, dict) else {})
                sources[name] = one["generated"]
    return found


def spread(figures: dict[str, Any]) -> str:
    """Mean and standard deviation of the distance over disjoint quarters."""
    mean, sd = (at(figures, "quarters", key) for key in ("mean", "sd"))
    return "–" if mean is None or sd is None else f"{shown(mean)} ± {shown(sd)}"


def at(value: Any, *keys: str) -> float | None:
    """The finite number under these keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return number(value)


def shown(value: float | None) -> str:
    """A number to four digits; a dash for none."""
    return "–" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
