"""The fixture that the benchmarks of the ops share: one `Timing` serves a session."""

import pytest

from vglann_fast.experiments.timing import Timing, keep_band_matrices


@pytest.fixture(scope="session")
def timing() -> Timing:
    """Times a group of contenders interleaved, beside a copy and a matrix product."""
    keep_band_matrices()
    return Timing()
