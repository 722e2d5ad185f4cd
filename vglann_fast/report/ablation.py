"""The report's table and charts of an ablation, from the ablation.json of `experiments/ablation.py`."""

from pathlib import Path
from typing import Any

from vglann_fast.metrics.feature_tables import shown
from vglann_fast.report.artifacts import number, read_json
from vglann_fast.report.evaluation import Table
from vglann_fast.report.plots import Chart, bars

_MEASURES = {"psnr": "PSNR, dB", "psnr_last_frame": "last frame, dB", "ssim": "SSIM"}


def ablation(folder: Path, problems: list[str]) -> tuple[list[Table], list[Chart]]:
    """Of the ablation in `folder`, for each regime: the rows with their measures, and the PSNR as bars.

    Of several seeds the mean is shown, and their range behind it. Empty without one.
    """
    runs = read_json(folder / "ablation.json", folder, problems).get("runs")
    rows = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    tables: list[Table] = []
    charts = []
    for regime in dict.fromkeys(str(run.get("regime")) for run in rows):
        named: dict[str, list[dict[str, Any]]] = {}
        for run in rows:
            if str(run.get("regime")) == regime:
                named.setdefault(str(run.get("row")), []).append(run)
        head = [f"{regime} epochs", "seeds", *_MEASURES.values()]
        body = [
            [name, str(len(some)), *(_cell(some, key) for key in _MEASURES)] for name, some in named.items()
        ]
        tables.append((head, body))
        means = [(name, mean) for name, some in named.items() if (mean := _mean(some, "psnr")) is not None]
        try:
            charts.append(
                Chart(f"Reconstruction, {regime} epochs", [], "", bars(means, x_label=_MEASURES["psnr"]))
            )
        except ValueError:
            continue
    return tables, charts


def _values(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [value for run in runs if (value := number(run.get(key))) is not None]


def _mean(runs: list[dict[str, Any]], key: str) -> float | None:
    values = _values(runs, key)
    return sum(values) / len(values) if values else None


def _cell(runs: list[dict[str, Any]], key: str) -> str:
    values = _values(runs, key)
    spread = f" ({shown(min(values))} to {shown(max(values))})" if len(values) > 1 else ""
    return shown(_mean(runs, key)) + spread
