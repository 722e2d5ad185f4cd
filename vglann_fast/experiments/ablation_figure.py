"""The figure and the table of the ablation, from what `ablation.py measure` and `ablation.py time` wrote.

python -m vglann_fast.experiments.ablation_figure bench/results docs/ablation.png      # prints the table in Markdown
"""

import argparse
from pathlib import Path
from typing import Any

from vglann_fast.experiments.ablation import CHANGES, REGIMES, ROWS
from vglann_fast.run.files import read_json

PANELS = {"psnr": "PSNR, all frames, dB", "psnr_last_frame": "PSNR, last frame, dB"}
COLORS = {"short": "#1f6fb4", "long": "#d1601c"}
LEGEND = {"short": "short epochs, as trained", "long": "epochs of 50,000 clips, simulated"}
COLUMNS = {"psnr": "PSNR", "psnr_last_frame": "last frame", "ssim": "SSIM"}


def values(record: dict[str, Any], row: str, regime: str, measure: str) -> list[float]:
    """A measure of a row in a regime, one value for each seed."""
    return [run[measure] for run in record["runs"] if (run["row"], run["regime"]) == (row, regime)]


def table(record: dict[str, Any], seconds: dict[str, Any]) -> str:
    """The rows in Markdown: each measure in both regimes, seed 0 first, the range of all seeds behind it."""
    heads = [f"{name}, {regime}" for regime in REGIMES for name in COLUMNS.values()]
    lines = [f"| row | {' | '.join(heads)} | step, of paper's |", "|---" * (len(heads) + 2) + "|"]
    measured = {run["row"] for run in record["runs"]}
    for row in (row for row in ROWS if row in measured):
        cells = [
            _cell(values(record, row, regime, name), 3 if name == "ssim" else 2)
            for regime in REGIMES
            for name in COLUMNS
        ]
        ratio = seconds["of_paper"].get(row)
        lines.append(f"| {row} | {' | '.join(cells)} | {'' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines)


def _cell(found: list[float], digits: int) -> str:
    if not found:
        return ""
    spread = f" ({min(found):.{digits}f} to {max(found):.{digits}f})" if len(found) > 1 else ""
    return f"{found[0]:.{digits}f}{spread}"


def draw(record: dict[str, Any], file: Path) -> None:
    """Two panels, a line for each regime through seed 0, a point for each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(CHANGES)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (measure, title) in zip(axes, PANELS.items(), strict=True):
        for regime in REGIMES:
            found = [values(record, row, regime, measure) for row in rows]
            found = [one or [float("nan")] for one in found]  # not trained yet: a gap
            shown = {"color": COLORS[regime], "label": LEGEND[regime]}
            axis.plot([one[0] for one in found], range(len(rows)), "-", linewidth=1.8, **shown)
            for at, one in enumerate(found):
                axis.plot(one, [at] * len(one), "o", markersize=5, alpha=0.75, color=COLORS[regime])
        axis.set_xlabel(title)
        axis.grid(axis="x", color="#dddddd")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    """Draw, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    a = parser.parse_args()
    record = read_json(a.results / "ablation.json")
    draw(record, a.figure)
    print(table(record, read_json(a.results / "ablation_time.json")))


if __name__ == "__main__":
    main()
