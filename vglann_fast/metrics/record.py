"""The files that `vglann evaluate` writes, and the tables it prints.

    evaluation/reconstruction.json   {"format": "vglann-evaluation", "version": 1, "name": "reconstruction", "step",
                                     "train": quality, "held_out": quality of inverted held-out clips, if any}
    evaluation/<source>.json         the same head with the name of a mapping, or "training-latents", and
        step, seed                   of the checkpoint; of the noise
        frames, size                 of the clips
        real                         {"split", "clips": taken, "of": in that split, "sha256": of the clips taken}
        training, generated          {"clips", "sha256"}
        features                     {title: {"protocol": the extractor's record (network, resize, range, frames,
                                     sha256 of its weights, dimensions), "generated": figures, "floor": figures of as
                                     many training clips, "truth": splits of real against real or null,
                                     "nearest_training_clip": distances}}
        motion                       {"generated", "real"}: see `temporal.motion_statistics`
        nearest_training_clip        distances in pixels: root mean square, in 1/255
        warnings                     lines

A quality is what `reconstruction.means_of` returns, with "pca_components" and "pca_exact". The latter is true where
PCA with as many components as a latent has numbers reproduces the training clips without an error, because there are
so few of them; PCA is not fitted then. Figures: see `compare.compare`; for "generated" with "splits": splits
of the source at the truth's n, or null. Splits are specified in `truth.py`. Distances are {"generated", "real":
quantiles}, without "real" where no clips are held out. The sha256 of a set of videos is the sha256 of their sorted
sha256 digests. A number that is not finite is null.
"""

from collections.abc import Mapping
from typing import Any

from vglann_fast.metrics.feature_tables import (
    DOUBTFUL_NOTE,
    FLOOR,
    TRUTH,
    Cells,
    bold,
    feature_tables,
    is_marked,
)
from vglann_fast.samples.write import finite

FORMAT = ("vglann-evaluation", 1)
RECONSTRUCTION, TRAINING_LATENTS = "reconstruction", "training-latents"
# Parts of a reconstruction record, and columns of the tables about them, by key.
QUALITY_ROWS = {"train": "training clips", "held_out": "held-out clips, inverted"}
QUALITY_COLUMNS = {
    "psnr": "PSNR, dB",
    "psnr_last_frame": "last frame, dB",
    "ssim": "SSIM",
    "l1": "L1, 1/255",
    "laplacian": "Laplacian",
    "motion_r2": "motion R²",
    "motion_r2_median": "R² of the median clip",
}
BASELINE_COLUMNS = {
    "psnr_mean_color": "mean color, dB",
    "psnr_still": "mean frame (still), dB",
    "psnr_pca": "PCA, dB",
    "motion_r2_pca": "PCA, motion R²",
    "psnr_nearest": "nearest training clip, dB",
    "still_clips": "clips without motion",
}


def record_of(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what evaluation/<name>.json is to hold."""
    record: dict[str, Any] = finite({"format": FORMAT[0], "version": FORMAT[1], "name": name, **content})
    return record


def tables(records: Mapping[str, dict[str, Any]]) -> str:
    """The records of one evaluation as Markdown tables."""
    sources = {name: record for name, record in records.items() if name != RECONSTRUCTION}
    quality = records[RECONSTRUCTION]
    parts = [*_quality_tables(quality), *verdicts(quality)]
    shown_tables: list[Cells] = []
    for title in next(iter(sources.values()))["features"]:
        shown_tables += _feature_tables(
            title, {name: one["features"][title] for name, one in sources.items()}
        )
    parts += tables_with_notes(shown_tables)
    parts.append(_video_table(sources))
    return "\n\n".join(parts)


def doubts(records: Mapping[str, dict[str, Any]]) -> list[str]:
    """The warnings about feature figures, each once, with the titles and sources they are about."""
    found: dict[str, list[str]] = {}
    for name, record in records.items():
        for title, one in record.get("features", {}).items():
            for line in one["generated"]["warnings"]:
                found.setdefault(line, []).append(f"{title} of {name}")
    return [f"{', '.join(where)}: {line}" for line, where in found.items()]


def verdict(quality: Mapping[str, Any]) -> str:
    """Return one sentence if a model is below a baseline, or "".

    quality: what `reconstruction.means_of` returns, also as read from a file: what is not a number is passed over.
    """
    names = ("psnr", "psnr_still", "psnr_over_still", "psnr_pca", "pca_components")
    psnr_, still, over_still, pca, components = (_or_nan(quality.get(name)) for name in names)
    below = []
    if over_still < 0:
        below.append(f"a still (each clip's mean frame: {still:.2f} dB)")
    if psnr_ < pca:
        below.append(f"PCA with {components:.0f} components ({pca:.2f} dB)")
    if not below:
        return ""
    return f"The model reproduces these clips worse than {' and than '.join(below)}."


def _or_nan(value: Any) -> float:
    """A number as it is, anything else as NaN, which is neither below nor above any number."""
    return float(value) if type(value) in (int, float) else float("nan")


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each part of a reconstruction record whose clips a baseline reproduces better."""
    found = {name: record.get(key) for key, name in QUALITY_ROWS.items()}
    lines = {name: verdict(one) for name, one in found.items() if isinstance(one, dict)}
    return [f"{name}: {line}" for name, line in lines.items() if line]


def pca_cell_is_exact(quality: Mapping[str, Any], column: str) -> bool:
    """Return True if a cell is about a PCA that reproduces its clips by construction."""
    return quality.get("pca_exact") is True and column in ("psnr_pca", "motion_r2_pca")


def _quality_tables(record: dict[str, Any]) -> list[str]:
    tables = []
    for title, columns in (("reconstruction", QUALITY_COLUMNS), ("baselines", BASELINE_COLUMNS)):
        rows = [
            [name, str(quality["clips"]), *(_quality_cell(quality, column) for column in columns)]
            for key, name in QUALITY_ROWS.items()
            if (quality := record.get(key))
        ]
        tables.append(markdown([title, "n", *columns.values()], rows))
    return tables


def _quality_cell(quality: dict[str, Any], column: str) -> str:
    return "exact" if pca_cell_is_exact(quality, column) else _number(quality.get(column))


def tables_with_notes(cells: list[Cells]) -> list[str]:
    """Feature tables as Markdown, and what a reader has to know about them."""
    parts = [markdown(one[0], bold(one)) for one in cells]
    if any(best for _, _, best in cells):
        parts.append("**Bold**: nearest to the truth row, or within its spread.")
    return [*parts, DOUBTFUL_NOTE] if is_marked(cells) else parts


def _feature_tables(title: str, sources: dict[str, dict[str, Any]]) -> list[Cells]:
    first = next(iter(sources.values()))
    figures = {FLOOR: first["floor"], TRUTH: {"splits": first.get("truth")}}
    figures |= {name: one["generated"] for name, one in sources.items()}
    nearest = {FLOOR: first["nearest_training_clip"].get("real", {}).get("median")}
    nearest |= {
        name: one["nearest_training_clip"]["generated"].get("median") for name, one in sources.items()
    }
    return feature_tables(title, figures, nearest)


def _video_table(sources: dict[str, dict[str, Any]]) -> str:
    """A row for the real clips and each source: motion, and the nearest training clip in pixels."""
    first = next(iter(sources.values()))
    rows = [_video_row("real clips", first["motion"]["real"], first["nearest_training_clip"].get("real", {}))]
    rows += [
        _video_row(name, one["motion"]["generated"], one["nearest_training_clip"]["generated"])
        for name, one in sources.items()
    ]
    head = ["videos", "motion, 1/255", "5 % to 95 %", "last-frame jump", "to nearest training clip, 1/255"]
    return markdown(head, rows)


def _video_row(name: str, motion: dict[str, Any], distances: dict[str, Any]) -> list[str]:
    energy = motion["energy"]
    spread = f"{_number(energy['p05'])} to {_number(energy['p95'])}"
    return [
        name,
        _number(energy["mean"]),
        spread,
        _number(motion["last_frame_jump"]),
        _number(distances.get("median")),
    ]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose columns line up as plain text, too; all but the first are numbers."""
    head, *rows = [[escaped(cell) for cell in row] for row in (head, *rows)]
    # A rule of one character would be a colon without its dash.
    widths = [max(2, *(len(row[i]) for row in (head, *rows))) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (head, rule, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """A line of Markdown that shows this text, whatever it is: no HTML, no link, no cell of a table."""
    for special, instead in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("](", "]\\(")):
        text = text.replace(special, instead)
    return " ".join(text.split())
