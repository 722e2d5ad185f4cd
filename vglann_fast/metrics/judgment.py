"""The rules by which figures are marked and called best; every table of the product asks them."""

from collections.abc import Mapping

SPREAD_FIGURES = ("mmd", "precision", "recall", "density", "coverage")  # the figures of the truth row


def frechet_is_doubtful(n: float, dimensions: float) -> bool:
    """Return True if n videos are too few for features of so many numbers: fewer than twice as many."""
    return n < 2 * dimensions


def nearest_to_truth(truth: Mapping[str, float], means: Mapping[str, float]) -> set[str]:
    """Return the sources that may be called best in one figure: the nearest to the truth and, as these cannot be
    told from the truth, all within its spread. A single source is not nearest to anything: it has to lie within it.

    truth: {"mean", "sd"}. means: of the sources, by name.
    """
    gaps = {name: abs(value - truth["mean"]) for name, value in means.items()}
    least = min(gaps.values()) if len(gaps) > 1 else 0.0
    return {name for name, gap in gaps.items() if gap <= max(least, truth["sd"])}
