"""The report's tables and charts of what `vglann evaluate` measured.

Records are read leniently, as everything the report shows: what is missing or of another kind is left out.
"""

from collections.abc import Mapping
from typing import Any

from vglann_fast.metrics.feature_tables import FLOOR, TRUTH, Cells, at, feature_tables, shown
from vglann_fast.metrics.record import BASELINE_COLUMNS, QUALITY_COLUMNS, QUALITY_ROWS, pca_cell_is_exact
from vglann_fast.report.artifacts import number
from vglann_fast.report.plots import Chart, Series, bars, chart

Records = Mapping[str, dict[str, Any]]
Table = tuple[list[str], list[list[str]]]


def number_tables(records: Records) -> list[Cells]:
    """(head, rows, places of what is bold) of reconstruction and its baselines, and of each kind of features."""
    found = records.get("reconstruction", {})
    qualities = {name: found[key] for key, name in QUALITY_ROWS.items() if isinstance(found.get(key), dict)}
    tables: list[Cells] = []
    for title, columns in (("reconstruction", QUALITY_COLUMNS), ("baselines", BASELINE_COLUMNS)):
        rows = [
            [name, shown(at(one, "clips")), *(_quality_cell(one, column) for column in columns)]
            for name, one in qualities.items()
        ]
        tables += [([title, "n", *columns.values()], rows, set())] if rows else []
    for title, sources in by_title(records).items():
        tables += feature_tables(title, sources)
    return tables


def _quality_cell(quality: dict[str, Any], column: str) -> str:
    return "exact" if pca_cell_is_exact(quality, column) else shown(at(quality, column))


def distance_charts(records: Records) -> list[Chart]:
    """For each kind of features the kernel distances of all sources, below 0 as 0, and their floor.

    A Fréchet distance is not charted: with few videos its order is the wrong one.
    """
    charts = []
    for title, sources in by_title(records).items():
        values = {
            name: max(value, 0.0) for name, one in sources.items() if (value := at(one, "mmd")) is not None
        }
        floor = values.pop(FLOOR, None)
        try:
            svg = bars(list(values.items()), x_label=title, mark=None if floor is None else ("floor", floor))
        except ValueError:
            continue
        charts.append(Chart(f"Kernel distance to held-out clips, {title}", [], "", svg))
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
    """Title of a protocol -> source -> figures; floor and truth, which all sources share, come first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, record in records.items():
        features = record.get("features")
        for title, one in features.items() if isinstance(features, dict) else ():
            if isinstance(one, dict) and isinstance(one.get("generated"), dict):
                shared = {FLOOR: one.get("floor"), TRUTH: {"splits": one.get("truth")}}
                sources = found.setdefault(
                    title,
                    {key: _with_dimensions(one, it) for key, it in shared.items() if isinstance(it, dict)},
                )
                sources[name] = _with_dimensions(one, one["generated"])
    return found


def _with_dimensions(one: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of an earlier version, which do not say how many numbers a feature has; their protocol does."""
    dimensions = at(one, "protocol", "dimensions")
    return figures if dimensions is None else {"dimensions": dimensions, **figures}
