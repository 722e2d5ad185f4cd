"""Measure feature sets with a known answer by each metric, as the Markdown table of docs/metrics.md.

    python -m vglann_fast.experiments.known_features [--repeats 5]

Real features are n rows of 1,280 numbers, n = 273 and 1,024, in 32 clusters. The centers have variance 1/4; the rows
lie about them with variances that fall as 1 / √index, as the spectra of networks' features fall. The sets:

equal        other rows of the same distribution
shift        every number moved by 0.1
less spread  rows 20 % nearer to the mean of all
dropped      half of the clusters missing
copy         the training rows themselves, of which real rows are another draw

Each cell is a mean over the repeats. In brackets: how many standard deviations of `equal` it lies from the mean of
`equal`. `nearest` is the median distance to the nearest training row over the same for real rows: 1 for `equal`.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from vglann_fast.metrics.frechet import FeatureMoments, frechet_distance
from vglann_fast.metrics.kernel_distance import kernel_distance
from vglann_fast.metrics.prdc import density_coverage, nearest_distances
from vglann_fast.metrics.record import markdown

NUMBERS, DIMENSIONS, CLUSTERS = (273, 1024), 1280, 32
COLUMNS = ("mmd", "frechet", "coverage", "density", "nearest")
Draw = Callable[[int, torch.Generator], Tensor]


def features(n: int, generator: torch.Generator, clusters: int = CLUSTERS, d: int = DIMENSIONS) -> Tensor:
    """Rows of the first `clusters` clusters, float64 [n, d]."""
    centers = torch.randn(CLUSTERS, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = torch.arange(1, d + 1, dtype=torch.float64) ** -0.25
    chosen = torch.randint(clusters, (n,), generator=generator)
    return 0.5 * centers[chosen] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64)


def samplers(training: Tensor, d: int = DIMENSIONS) -> dict[str, Draw]:
    """The generated sets by name."""
    return {
        "equal": lambda n, g: features(n, g, d=d),
        "shift": lambda n, g: features(n, g, d=d) + 0.1,
        "less spread": lambda n, g: _toward_mean(features(n, g, d=d)),
        "dropped": lambda n, g: features(n, g, CLUSTERS // 2, d),
        "copy": lambda n, g: training[:n],
    }


def _toward_mean(rows: Tensor) -> Tensor:
    return rows.mean(0) + 0.8 * (rows - rows.mean(0))


def figures(real: Tensor, generated: Tensor, training: Tensor) -> dict[str, float]:
    """The figures of one set."""
    density, coverage = density_coverage(real, generated)
    known = nearest_distances(real, training).median()
    return {
        "mmd": kernel_distance(real, generated)["mmd"],
        "frechet": frechet_distance(FeatureMoments.of(real), FeatureMoments.of(generated)),
        "coverage": coverage,
        "density": density,
        "nearest": (nearest_distances(generated, training).median() / known).item(),
    }


def measure(n: int, repeats: int, d: int = DIMENSIONS) -> dict[str, dict[str, Tensor]]:
    """Set -> figure -> its values [repeats]."""
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(repeat)
        real, training = features(n, generator, d=d), features(n, generator, d=d)
        for name, draw in samplers(training, d).items():
            found.setdefault(name, []).append(figures(real, draw(n, generator), training))
    return {
        name: {key: torch.tensor([one[key] for one in rows]) for key in COLUMNS}
        for name, rows in found.items()
    }


def table(n: int, found: dict[str, dict[str, Tensor]]) -> str:
    """The figures of all sets as Markdown."""
    rows = []
    for name, values in found.items():
        cells = []
        for key in COLUMNS:
            mean, equal = values[key].mean().item(), found["equal"][key]
            away = "" if name == "equal" else f" ({(mean - equal.mean().item()) / equal.std().item():+.0f})"
            cells.append(f"{mean:.3g}{away}")
        rows.append([name, *cells])
    return markdown([f"n = {n:,}, d = {DIMENSIONS:,}", *COLUMNS], rows)


def main() -> None:
    """Print a table for each n."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    a = parser.parse_args()
    for n in NUMBERS:
        print(table(n, measure(n, a.repeats)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
