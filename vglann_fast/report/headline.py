"""The first screen of the report: one sentence on whether the training worked, and the figures behind it."""

from dataclasses import dataclass
from typing import Any

from vglann_fast.report.artifacts import Artifacts, number, numbers, seconds_spent


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page, and in words what it means."""

    name: str
    value: str
    unit: str
    meaning: str


def outcome(record: dict[str, Any]) -> str:
    """Return one sentence that says how well a run reproduces its clips beside its baselines, or "".

    record: reconstruction.json, read leniently: what is not a number is left out of the sentence.
    """
    psnr, over_still, motion = (number(record.get(name)) for name in ("psnr", "psnr_over_still", "motion_r2"))
    clips = number(record.get("clips"))
    if psnr is None:
        return ""
    over_pca = _over_pca(record)
    beside = [
        f"{abs(over):.2f} dB {'better' if over >= 0 else 'worse'} than {name}"
        for name, over in (("a still of each clip", over_still), ("PCA", over_pca))
        if over is not None
    ]
    if motion is not None:
        beside.append(f"with a motion R² of {motion:.2f} (0 is a still, 1 is perfect)")
    baselines = [over for over in (over_still, over_pca) if over is not None]
    # A generator of stills has not learned to make videos, however near the stills are.
    won = [figure > 0 for figure in (*baselines, motion) if figure is not None] if baselines else []
    answer = "" if not won else "Yes: " if all(won) else "Partly: " if any(won) else "Not yet: "
    count = "" if clips is None else f"{clips:,.0f} "
    which = f"its {count}training clip{'s' * (clips != 1)}"
    advice = "" if not won or all(won) else " Train longer, or on fewer clips."
    sentence = f"the generator reproduces {which} at a PSNR of {', '.join([f'{psnr:.2f} dB', *beside])}."
    return (answer + sentence if answer else sentence[0].upper() + sentence[1:]) + advice


def figures(run: Artifacts) -> list[Figure]:
    """Return the numbers at the top of the page; only those that are known."""
    record, rows = run.reconstruction.record, [row for row in run.metrics if row.get("stage") == "glo"]
    names = ("psnr", "psnr_over_still", "psnr_still", "psnr_pca", "motion_r2", "clips")
    psnr, over_still, still, pca, motion, clips = (number(record.get(name)) for name in names)
    steps, seconds = numbers(rows, "step", "step")[0], seconds_spent(rows)
    over_pca = _over_pca(record)
    found = []
    if psnr is not None:
        found.append(Figure("Reconstruction PSNR", f"{psnr:.2f}", "dB", _PSNR))
    if over_still is not None:
        found.append(Figure(_beside("Over a still", still), f"{over_still:+.2f}", "dB", _STILL))
    if record.get("pca_exact") is True:
        found.append(Figure("PCA of so few clips", "exact", "", _PCA_EXACT))
    elif over_pca is not None:
        found.append(Figure(_beside("Over PCA", pca), f"{over_pca:+.2f}", "dB", _PCA))
    if motion is not None:
        found.append(Figure("Motion R²", f"{motion:.2f}", "", _MOTION))
    if clips is not None:
        found.append(Figure("Training clips", f"{clips:,.0f}", "", _CLIPS))
    taken = f"{max(steps):,.0f} steps" if steps else ""
    if seconds is not None:
        found.append(Figure(f"Training time{', ' * bool(taken)}{taken}", *duration(seconds), _TIME))
    elif taken:
        found.append(Figure("Training steps", f"{max(steps):,.0f}", "", _TIME))
    return found


_PSNR = (
    "How near the reconstructions are to their clips, on a logarithmic scale: 6 dB more is half the error. "
    "At 20 dB a clip looks blurred, at 30 dB nearly like the original."
)
_STILL = (
    "PSNR minus the PSNR of a still picture, the mean of each clip's frames. Below 0 a still picture would be nearer "
    "to the clips than the model."
)
_PCA = (
    "PSNR minus the PSNR of principal components, the best linear model with as many numbers for each clip as a "
    "latent has. Below 0 the generator is worse than a linear model."
)
_PCA_EXACT = (
    "Principal components, a linear model, reproduce so few clips without an error. "
    "So they are not a baseline here."
)
_MOTION = (
    "The fraction of the motion that is reproduced. Motion is what each frame adds to its clip's mean frame. 0 is a "
    "still, 1 is perfect, and below 0 the motion is wrong."
)
_CLIPS = "Each of them has a latent, the vector that the generator turns into its reconstruction."
_TIME = "The time that the steps of the training took. A step is one batch of clips."


def _over_pca(record: dict[str, Any]) -> float | None:
    """Return PSNR over PCA; None where one is unknown, or where PCA is exact."""
    psnr, pca = number(record.get("psnr")), number(record.get("psnr_pca"))
    return None if psnr is None or pca is None or record.get("pca_exact") is True else psnr - pca


def _beside(name: str, value: float | None) -> str:
    return name if value is None else f"{name} of {value:.2f} dB"


def duration(seconds: float) -> tuple[str, str]:
    """Return a duration as (value, unit): ("48", "s"), ("3:12", "min"), ("4:05", "h")."""
    whole = round(seconds)
    if whole < 60:
        return str(whole), "s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}", "min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}", "h"
