"""`vglann evaluate --features-file REAL.npy GENERATED.npy`: features that users computed elsewhere, compared.

Each file holds one array [n, d] of numbers, one row a video, from any network (V-JEPA, VideoMAE, I3D), as
`numpy.save` writes it, without pickled objects. Nothing is written. The real rows are split one by one for the truth
row, since nothing says which of them are of one shot.
"""

import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.metrics.compare import compare
from vglann_fast.metrics.feature_tables import TRUTH, feature_tables
from vglann_fast.metrics.kernel_distance import JEDI_VIDEOS, jedi_distance
from vglann_fast.metrics.record import tables_with_notes
from vglann_fast.metrics.truth import Truth
from vglann_fast.run.files import open_regular
from vglann_fast.runtime.numerics import numerics

FLAG = "--features-file"
# What reading a file that is not an array without objects raises.
_NOT_NPY = (ValueError, EOFError, OverflowError, SyntaxError, TypeError, MemoryError, tokenize.TokenError)


@numerics(tf32=False)
def compare_files(real: str | Path, generated: str | Path, protocol: str | None = None) -> dict[str, Any]:
    """Compare the features in two files.

    protocol: "jedi" adds the statistic that JEDi publishes, for its features.

    Returns what `compare.compare` returns, with "splits" and "truth" (see `truth.py`; None for fewer than 12 rows),
    "jedi" if asked for, and its warning among "warnings". Raises `VglannError` that names the file.
    """
    first, second = (torch.from_numpy(read_features(path)) for path in (real, generated))
    if first.shape[1] != second.shape[1]:
        raise VglannError(
            f"{FLAG}: {real} has {first.shape[1]} numbers a row, {generated} has {second.shape[1]}; take both from "
            "one network"
        )
    try:
        figures = compare(first, second)
        truth = Truth(first, most=len(second))
        figures["truth"] = truth.figures() if truth.enough else None
        figures["splits"] = truth.figures_of(second) if truth.enough else None
        if protocol == "jedi":
            figures["jedi"] = jedi_distance(first, second)
    except VglannError as error:
        raise VglannError(f"{FLAG}: {error}") from error
    if protocol == "jedi" and figures["n"] < JEDI_VIDEOS:
        figures["warnings"].append(
            f"{figures['n']} videos: JEDi is published for {JEDI_VIDEOS:,} on each side, and its bias falls with n; "
            "compare it only with values of the same n"
        )
    return figures


def read_features(path: str | Path) -> np.ndarray:
    """The array [n, d] in a .npy file, as float64. Raises `VglannError` that names the file and the remedy."""
    try:
        with open_regular(path):
            # Mapped, so that a header that promises more than the file holds costs nothing.
            array = np.lib.format.open_memmap(path, mode="r")
    except UnreadableError as error:
        raise UnreadableError(f"{FLAG}: {error}") from error
    except OSError as error:
        raise VglannError(f"{FLAG}: {path} cannot be read ({error.strerror or error})") from error
    except _NOT_NPY as error:
        raise VglannError(
            f"{FLAG}: {path} is not an array of numbers ({error}); write it with "
            "numpy.save(FILE, features, allow_pickle=False)"
        ) from error
    if array.ndim != 2 or not array.shape[1] or array.dtype.kind not in "fiu":
        raise VglannError(
            f"{FLAG}: {path} holds {array.dtype} of shape {list(array.shape)}; it takes numbers [videos, features]"
        )
    if len(array) < 2:
        raise VglannError(f"{FLAG}: {path} has {len(array)} rows; a comparison needs at least 2 videos")
    rows = np.array(array, dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise VglannError(
            f"{FLAG}: {path} has NaN or infinity in {len(wrong)} of {len(rows)} rows, first in row {wrong[0]}; "
            "compute these features again"
        )
    return rows


def file_tables(figures: dict[str, Any], real: str | Path, generated: str | Path) -> str:
    """Return the record of `compare_files` as Markdown tables."""
    name = Path(generated).name
    cells = feature_tables(f"against {Path(real).name}", {TRUTH: {"splits": figures["truth"]}, name: figures})
    parts = tables_with_notes(cells)
    if "jedi" in figures:
        parts.insert(0, f"JEDi, (x·y / d)², biased, times 100: {figures['jedi']:.6g}")
    return "\n\n".join(parts)
