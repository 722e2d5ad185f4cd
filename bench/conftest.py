"""What the benchmarks of the ops share: they find `interleaved`, and one `Timing` serves a session."""

import pytest

from vglann_fast.experiments.timing import Timing, keep_band_matrices


@pytest.fixture(scope="session")
def timing() -> Timing:
    """Times a group of contenders in turns, beside a copy and a matrix product."""
    keep_band_matrices()
    return Timing()
