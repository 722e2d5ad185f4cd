"""The report of a run: one HTML page that needs nothing but itself.

Videos, styles and the script are inside the page; its content security policy forbids it to load anything
else. Sections whose artifacts a run does not have say which command makes them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vglann_fast.errors import VglannError
from vglann_fast.metrics.feature_tables import DOUBTFUL_NOTE, at, shown
from vglann_fast.metrics.record import RECONSTRUCTION, verdicts
from vglann_fast.report.ablation import ablation
from vglann_fast.report.artifacts import Artifacts, Media, number, read_artifacts
from vglann_fast.report.curves import by_id, curve, training_charts
from vglann_fast.report.evaluation import Table, distance_charts, motion_charts, number_tables
from vglann_fast.report.filmstrip import filmstrip
from vglann_fast.report.gallery import MAX_CARDS, Card, Gallery, View, view
from vglann_fast.report.headline import figures, outcome
from vglann_fast.report.mappings import Comparison, compare_mappings
from vglann_fast.report.plots import Chart, Series, scatter
from vglann_fast.report.rendering import render_page
from vglann_fast.report.table_page import distance_tables, paper_note, read_table
from vglann_fast.run.destinations import atomic_file

_MOST_DEPTH = 8
_MOST_TEXT = 1000


def write_report(run: str | Path) -> Path:
    """Write `run`/report/index.html from whatever the run holds, and return its path.

    Missing or damaged artifacts are named in the page. Raises `VglannError` when `run` is not a folder, the
    disk is full, or jinja2 or OpenCV is missing.
    """
    run = Path(run)
    if not run.is_dir():
        raise VglannError(f"{run} is not a run folder; make one with `vglann train`")
    artifacts = read_artifacts(run)
    comparison = compare_mappings(run, artifacts.mappings, artifacts.problems)
    html = render(run.resolve().name, artifacts, comparison, _beside(run, artifacts.problems))
    page = run / "report" / "index.html"
    with atomic_file(page) as temporary:
        # A folder's name or a JSON string may hold what is not Unicode text.
        temporary.write_text(html, encoding="utf-8", errors="replace")
    return page


def _beside(run: Path, problems: list[str]) -> dict[str, Any]:
    """Read the table that the run is of, and an ablation in its folder or the one around it."""
    run = run.resolve()
    table = read_table(run.parent, problems)
    found = distance_tables(table) if table is not None and run.name in table.losses else []
    ablations = [ablation(folder, problems) for folder in (run, run.parent)]
    return {
        "tables": found,
        "paper_note": paper_note(found),
        "ablation": next((one for one in ablations if one[0]), None),
    }


def render(name: str, run: Artifacts, comparison: Comparison | None, beside: dict[str, Any]) -> str:
    """The page of a run called `name`, as text. beside: what `_beside` found."""
    return render_page(
        "page.html",
        name=name,
        facts=_header_facts(run),
        outcome=outcome(run.reconstruction.record),
        figures=figures(run),
        reconstructions=_reconstructions(run.reconstruction),
        samples=_samples(run.samples, run.nearest),
        sample_note=_sample_note(run.samples.record),
        interpolation=_interpolation(run.interpolation),
        interpolation_ends=_ends(run.interpolation.record),
        training=training_charts(run),
        mappings=_mappings(run),
        comparison=_comparison_table(comparison, run.mappings),
        scatters=_scatters(comparison),
        evaluation_tables=number_tables(run.evaluations),
        doubtful_note=DOUBTFUL_NOTE,
        verdicts=verdicts(run.evaluations.get(RECONSTRUCTION, {})),
        evaluation=[*distance_charts(run.evaluations), *motion_charts(run.evaluations)],
        settings=setting_rows(run.options),
        environment=setting_rows(run.environment),
        problems=run.problems,
        **beside,
    )


def _header_facts(run: Artifacts) -> list[str]:
    """Describe the kind of run, in a few words each, as far as its options tell."""
    options, train = run.options, run.options.get("train")
    train = train if isinstance(train, dict) else {}
    facts = [f"{key} {options[key]}" for key in ("preset", "seed") if key in options]
    facts += [f"{key} {train[key]}" for key in ("loss", "variant", "width") if key in train]
    for media in (run.reconstruction, run.samples):
        if media.video is not None:
            frames, height, width = media.video.shape[2:]
            facts.append(f"{frames} frames of {width}×{height}")
            break
    started = run.environment.get("started")
    return facts + ([f"started {str(started)[:10]}"] if started else [])  # the day of an ISO date


def _streams(media: Media, i: int, of: str) -> list[View]:
    """Foreground, mask and background of clip i, as far as they are there."""
    views = []
    for label, array in (
        ("Foreground", media.foreground),
        ("Mask", media.mask),
        ("Background", media.background),
    ):
        if array is not None:
            video = array[i][:, None] if array.ndim == 4 else array[i]  # a still is a video of one frame
            views.append(view(label, of, video, 82))
    return views


def _reconstructions(media: Media) -> Gallery:
    """A card per clip: original | reconstruction, and the streams."""
    if media.video is None:
        return Gallery()
    shown = media.record.get("shown")
    per_clip = media.record.get("per_clip")
    psnr, motion = by_id(per_clip, "psnr"), by_id(per_clip, "motion_r2")
    baselines = {name: by_id(per_clip, key) for name, key in (("still", "psnr_still"), ("PCA", "psnr_pca"))}
    cards = []
    for i in range(min(len(media.video), MAX_CARDS)):
        clip = _text_at(shown, i)
        of = f"clip {clip or i + 1}"
        pair = [] if media.original is None else [view("Original", of, media.original[i], 88)]
        facts = [(clip, "clip id")] if clip else []
        if (value := psnr.get(clip)) is not None:
            facts.append((f"{value:.2f} dB", "PSNR of the reconstruction"))
            for name, values in baselines.items():
                if (base := values.get(clip)) is not None:
                    facts.append((f"{name} {base:.2f}", f"PSNR of the baseline {name}, in dB"))
            if (r2 := motion.get(clip)) is not None:
                facts.append((f"R² {r2:.2f}", "of its motion: 0 for a still, 1 for perfect"))
        pair.append(view("Reconstruction", of, media.video[i], 88))
        cards.append(Card(pair, _streams(media, i, of), facts))
    return Gallery(cards, len(media.video))


def _samples(media: Media, nearest: np.ndarray | None) -> Gallery:
    """A card per sample: sample | nearest training clip, and the streams."""
    if media.video is None:
        return Gallery()
    found = media.record.get("nearest")
    found = found if isinstance(found, dict) else {}
    cards = []
    for i in range(min(len(media.video), MAX_CARDS)):
        of = f"sample {i + 1}"
        clip = _text_at(found.get("id"), i)
        facts = [(f"{of}, nearest {clip}" if clip else of, "place in video.npy and id of the nearest clip")]
        if (distance := _number_at(found.get("latent_distance"), i)) is not None:
            facts.append((f"distance {distance:.3f}", "between the latents of the sample and of that clip"))
        if (psnr := _number_at(found.get("pixel_psnr"), i)) is not None:
            facts.append((f"{psnr:.2f} dB", "PSNR between the sample and that clip: high means a copy"))
        pair = [view("Sample", of, media.video[i], 88)]
        if nearest is not None:
            clip_view = filmstrip(nearest[i], 88)
            pair.append(View("Nearest clip", f"Training clip nearest to sample {i + 1}", clip_view))
        cards.append(Card(pair, _streams(media, i, of), facts))
    return Gallery(cards, len(media.video))


def _sample_note(record: dict[str, Any]) -> str:
    """Describe how the samples were drawn."""
    known = [(key, record.get(key)) for key in ("mapping", "seed")]
    return ", ".join(f"{key} {value}" for key, value in known if value is not None)


def _ends(record: dict[str, Any]) -> str:
    """Between which clips the interpolation goes."""
    between = record.get("between")
    return " and ".join(str(clip) for clip in between) if isinstance(between, list) else ""


def _interpolation(media: Media) -> Gallery:
    """One view per step along the path, no streams."""
    if media.video is None:
        return Gallery()
    count = min(len(media.video), MAX_CARDS)
    cards = [
        Card([View(f"Step {i + 1}", f"Interpolation step {i + 1}", filmstrip(media.video[i], 88))], [], [])
        for i in range(count)
    ]
    return Gallery(cards, len(media.video))


def _mappings(run: Artifacts) -> list[tuple[str, list[Chart], list[tuple[int, str, str | None]]]]:
    """Per fitted mapping: its kind, curves over the epochs, and what else its record says."""
    found = []
    for kind, record in run.mappings.items():
        epochs = record.get("epochs")
        if not isinstance(epochs, list):  # not in the record: take the log's
            epochs = [row for row in run.metrics if row.get("stage") == kind]
        rows = [row for row in epochs if isinstance(row, dict)]
        charts = [
            curve(rows, "epoch", "loss", "Regression loss", "loss", log=True),
            curve(rows, "epoch", "match_distance", "Distance from a latent to its match", "mean distance"),
            curve(
                rows,
                "epoch",
                "match_diversity",
                "Distinct matches per latent, in the pool of the fit",
                "fraction",
                cover=(0, 1),
            ),
        ]
        rest = {key: value for key, value in record.items() if not (key == "epochs" and rows)}
        found.append((kind, [one for one in charts if one is not None], setting_rows(rest)))
    return found


def _comparison_table(found: Comparison | None, records: dict[str, dict[str, Any]]) -> Table | None:
    """A row for each mapping: how its samples cover the training latents, and how near they come to held-out ones."""
    if found is None or not found.mappings:
        return None
    head = [
        "mapping",
        "coverage",
        "density",
        "match_diversity",
        "distance, fitted",
        "held out",
        "NLL, fitted",
        "held out",
    ]
    rows = []
    for kind, one in found.mappings.items():
        gap = records.get(kind, {}).get("gap")
        gaps = [at(gap, part, key) for key in ("distance", "nll") for part in ("fitted", "held_out")]
        rows.append([kind, *map(shown, (one.coverage, one.density, one.match_diversity, *gaps))])
    return head, rows


def _scatters(found: Comparison | None) -> list[Chart]:
    """For each mapping its samples over the training latents, along the principal axes of these."""
    charts: list[Chart] = []
    if found is None:
        return charts
    every = np.concatenate([found.latents, *(one.points for one in found.mappings.values())])
    corners = [tuple(every.min(0).tolist()), tuple(every.max(0).tolist())]
    for kind, one in found.mappings.items():
        groups = [("training latents", found.latents), ("samples", one.points)]
        series = [Series(label, points[:, 0].tolist(), points[:, 1].tolist()) for label, points in groups]
        first, second = (f"{100 * share:.0f} % of the variance" for share in found.shares)
        try:
            svg = scatter(series, x_label=first, y_label=second, cover=corners)
        except ValueError:
            continue
        charts.append(Chart(kind, [label for label, _ in groups], "", svg))
    return charts


def setting_rows(value: dict[str, Any], depth: int = 0) -> list[tuple[int, str, str | None]]:
    """Nested settings as lines (depth, name, value); the value of a group's own line is None. Groups come last."""
    rows: list[tuple[int, str, str | None]] = []
    groups = {k: v for k, v in value.items() if isinstance(v, dict) and v and depth < _MOST_DEPTH}
    for key, item in value.items():
        if isinstance(item, list) and not any(isinstance(part, dict | list) for part in item):
            rows.append((depth, str(key), ", ".join(_shown(part) for part in item) or "none"))
        elif key not in groups:
            rows.append((depth, str(key), _shown(item)))
    for key, item in groups.items():
        rows.append((depth, str(key), None))
        rows += setting_rows(item, depth + 1)
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + " …"


def _text_at(values: Any, i: int) -> str:
    return str(values[i]) if isinstance(values, list) and i < len(values) else ""


def _number_at(values: Any, i: int) -> float | None:
    return number(values[i]) if isinstance(values, list) and i < len(values) else None
