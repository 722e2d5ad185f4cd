"""Curves of a training and of its mappings, and the PSNR of each clip."""

from collections.abc import Sequence
from typing import Any

from vglann_fast.errors import VglannError
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import TrainOptions
from vglann_fast.report.artifacts import Artifacts, number, numbers
from vglann_fast.report.plots import Chart, Series, chart


def training_charts(run: Artifacts) -> list[Chart]:
    """Return the curves of loss and PSNR and the PSNR of each clip, as far as the run has them."""
    rows = [row for row in run.metrics if row.get("stage") == "glo"]
    parts = phases(rows, run.options)
    charts = [
        curve(rows, "step", "loss", "Loss", "loss", parts=parts, log=True),
        curve(
            rows,
            "step",
            "psnr",
            "PSNR of the training batches",
            "PSNR, dB",
            levels=_levels(run),
            parts=parts,
        ),
        _clip_chart(run.reconstruction.record),
    ]
    return [one for one in charts if one is not None]


def phases(rows: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, list[dict[str, Any]]] | None:
    """Return the rows of each phase of a training by its name; None for a training of one phase.

    The loss jumps where the second begins: the foreground appears.
    """
    try:
        passes = options_from_json(TrainOptions, options["train"]).background_passes
    except (KeyError, TypeError, VglannError):  # said elsewhere on the page
        return None
    epochs = [(number(row.get("epoch")) or 0.0, row) for row in rows]
    found = {
        "background alone": [row for epoch, row in epochs if epoch <= passes],
        "both streams": [row for epoch, row in epochs if epoch > passes],
    }
    return found if passes and all(found.values()) else None


def _clip_chart(record: dict[str, Any]) -> Chart | None:
    """PSNR of every clip, worst first, against its baselines."""
    per_clip = record.get("per_clip")
    psnr = by_id(per_clip, "psnr")
    order = sorted(psnr, key=lambda clip: psnr[clip])
    if len(order) < 2:
        return None
    ranks = {clip: float(i + 1) for i, clip in enumerate(order)}
    series = [Series("reconstruction", list(ranks.values()), [psnr[clip] for clip in order])]
    for label, key in (("mean color", "psnr_mean_color"), ("still", "psnr_still"), ("PCA", "psnr_pca")):
        values = by_id(per_clip, key)
        if known := [clip for clip in order if clip in values]:
            series.append(Series(label, [ranks[c] for c in known], [values[c] for c in known]))
    few = len(order) <= 200
    svg = _drawn(series, x_label="clips, worst first", y_label="PSNR, dB", line=not few)
    last = f"{psnr[order[-1]]:.2f} dB"
    return Chart("PSNR by clip", [one.label for one in series], last, svg) if svg else None


def _levels(run: Artifacts) -> dict[str, float]:
    """Return the PSNR of the baselines of a reconstruction, as far as it is known and says something."""
    record = run.reconstruction.record
    names = {"still": "psnr_still"} | ({} if record.get("pca_exact") is True else {"PCA": "psnr_pca"})
    values = {label: number(record.get(name)) for label, name in names.items()}
    return {label: value for label, value in values.items() if value is not None}


def curve(
    rows: list[dict[str, Any]],
    x: str,
    y: str,
    title: str,
    y_label: str,
    levels: dict[str, float] | None = None,
    parts: dict[str, list[dict[str, Any]]] | None = None,
    **options: Any,
) -> Chart | None:
    """Return the chart of row[y] against row[x], or None without any such rows.

    Args:
        levels: values by name to draw as horizontal lines.
        parts: the rows by name of the line they belong to. Default: one line.
        options: passed to `chart`.
    """
    xs, ys = numbers(rows, x, y)
    if not xs:
        return None
    parts = parts or {y.upper() if y == "psnr" else y.replace("_", " "): rows}
    series = [Series(label, *numbers(own, x, y)) for label, own in parts.items()]
    series = [one for one in series if one.x]
    series += [Series(label, [min(xs), max(xs)], [value] * 2) for label, value in (levels or {}).items()]
    svg = _drawn(series, x_label=x, y_label=y_label, **options)
    return Chart(title, [one.label for one in series], f"{ys[-1]:.4g}", svg) if svg else None


def _drawn(series: Sequence[Series], **options: Any) -> str | None:
    try:
        return chart(series, **options)
    except ValueError:  # nothing in it can be drawn, e.g. a log scale of zeros
        return None


def by_id(per_clip: Any, key: str) -> dict[str, float]:
    """id -> finite number, from {"id": [...], key: [...]}; empty for anything else."""
    if not isinstance(per_clip, dict):
        return {}
    ids, values = per_clip.get("id"), per_clip.get(key)
    if not isinstance(ids, list) or not isinstance(values, list):
        return {}
    pairs = zip(ids, map(number, values), strict=False)
    return {str(clip): value for clip, value in pairs if value is not None}
