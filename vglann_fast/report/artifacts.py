"""The content of a run folder for the report, read leniently.

A run may have been stopped at any stage, or a file of it damaged: the report shows what is there. Nothing in
this file raises for the content of a run; what cannot be shown becomes a line in `Artifacts.problems`.
"""

import json
import math
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vglann_fast.options.aliases import read_file_of_run, read_record

# What NumPy raises for a .npy file whose header is broken in one way or another.
NOT_NPY = (OSError, ValueError, EOFError, OverflowError, SyntaxError, TypeError, MemoryError, RecursionError,
           tokenize.TokenError)  # fmt: skip


@dataclass(frozen=True)
class Media:
    """One media folder; for the formats see `vglann_fast.samples.write`. `record` is its JSON, or {}."""

    video: np.ndarray | None  # uint8 (n, 3, T, H, W)
    original: np.ndarray | None  # uint8 (n, 3, T, H, W)
    foreground: np.ndarray | None  # uint8 (n, 3, T, H, W)
    mask: np.ndarray | None  # uint8 (n, 1, T, H, W)
    background: np.ndarray | None  # uint8 (n, 3, H, W)
    record: dict[str, Any]


@dataclass
class Artifacts:
    """Everything the report shows of a run. None or empty stands for what is not there."""

    options: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    reconstruction: Media
    samples: Media
    nearest: np.ndarray | None  # uint8 (n, 3, T, H, W), the order of the samples
    interpolation: Media
    mappings: dict[str, dict[str, Any]]  # kind -> mapping.json
    evaluations: dict[str, dict[str, Any]]  # source -> its record, see `vglann_fast.metrics.record`
    problems: list[str] = field(default_factory=list)


def read_artifacts(run: Path) -> Artifacts:
    """Read what `run` holds. Never raises for missing or damaged files."""
    problems: list[str] = []
    media = run / "media"
    samples = _read_media(media / "samples", "samples", run, problems)
    nearest_file = media / "nearest" / "video.npy"
    nearest = read_array(nearest_file, 3, run, problems)
    if nearest is not None and (samples.video is None or nearest.shape != samples.video.shape):
        _tell(problems, run, nearest_file, "does not belong to these samples")
        nearest = None
    return Artifacts(
        options=read_json(run / "options.json", run, problems),
        environment=read_json(run / "environment.json", run, problems),
        metrics=_read_metrics(run / "metrics.jsonl", run, problems),
        reconstruction=_read_media(media / "reconstruction", "reconstruction", run, problems),
        samples=samples,
        nearest=nearest,
        interpolation=_read_media(media / "interpolation", "interpolation", run, problems),
        mappings={
            file.parent.name: read_json(file, run, problems)
            for file in sorted((run / "mapping").glob("*/mapping.json"))
        },
        evaluations={
            file.stem: read_json(file, run, problems) for file in sorted((run / "evaluation").glob("*.json"))
        },
        problems=problems,
    )


def _read_media(folder: Path, record: str, run: Path, problems: list[str]) -> Media:
    video = read_array(folder / "video.npy", 3, run, problems)
    others: dict[str, np.ndarray | None] = {}
    for name, channels in (("original", 3), ("foreground", 3), ("mask", 1), ("background", 3)):
        array = read_array(folder / f"{name}.npy", channels, run, problems, frames=name != "background")
        if array is not None and video is not None:
            n, _, frames, height, width = video.shape
            time = () if name == "background" else (frames,)
            if array.shape != (n, channels, *time, height, width):
                _tell(problems, run, folder / f"{name}.npy", f"shape {array.shape} does not fit video.npy")
                array = None
        others[name] = array if video is not None else None
    return Media(video=video, **others, record=read_json(folder / f"{record}.json", run, problems))


def read_array(
    file: Path, channels: int, run: Path, problems: list[str], frames: bool = True
) -> np.ndarray | None:
    """Map a uint8 array (n, channels, T, H, W), or (n, channels, H, W) without `frames`."""
    if not file.is_file():
        return None
    try:
        # Mapped, so that a header that promises more than the file holds costs nothing.
        array = np.lib.format.open_memmap(file, mode="r")
    except NOT_NPY as error:
        _tell(problems, run, file, str(error))
        return None
    expected = 5 if frames else 4
    if array.dtype != np.uint8 or array.ndim != expected or array.shape[1] != channels or 0 in array.shape:
        _tell(problems, run, file, f"unexpected {array.dtype} array of shape {array.shape}")
        return None
    return array


def read_json(file: Path, run: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a JSON file, {} if there is none; what is wrong goes to `problems`, named within `run`."""
    if not file.is_file():
        return {}
    try:
        value = read_file_of_run(file.name, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        _tell(problems, run, file, str(error))
        return {}
    if not isinstance(value, dict):
        _tell(problems, run, file, "not a JSON object")
        return {}
    return value


def _read_metrics(file: Path, run: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. A truncated last line is what a killed run leaves and is not reported."""
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = []
    damaged = 0
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        _tell(problems, run, file, str(error))
        return []
    for i, line in enumerate(lines):
        try:
            row = read_record(json.loads(line))
        except (ValueError, RecursionError):
            damaged += i < len(lines) - 1
            continue
        if isinstance(row, dict):
            rows.append(row)
    if damaged:
        _tell(problems, run, file, f"{damaged} damaged lines were passed over")
    return rows


def _tell(problems: list[str], run: Path, file: Path, reason: str) -> None:
    problems.append(f"{file.relative_to(run).as_posix()}: {reason}")


def number(value: Any) -> float | None:
    """`value` as a finite float, or None for anything else; booleans do not count as numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of floats
        return None


def numbers(rows: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The pairs (row[x], row[y]) of the rows that have both as finite numbers."""
    pairs = [(number(row.get(x)), number(row.get(y))) for row in rows]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in whole], [b for _, b in whole]


def seconds_spent(rows: list[dict[str, Any]]) -> float | None:
    """Wall time over log rows whose `seconds` count from the start of a process.

    A resumed run counts from zero again, so each fall in the sequence ends one process's share.
    """
    counts = [s for row in rows if (s := number(row.get("seconds"))) is not None]
    if not counts:
        return None
    ends = [a for a, b in zip(counts, [*counts[1:], 0.0], strict=True) if b < a]
    return sum(ends)
