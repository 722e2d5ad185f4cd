"""What the benchmarks of the ops share: they find `interleaved`, and one `Timing` serves a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import Timing, keep_band_matrices


@pytest.fixture(scope="session")
def timing() -> Timing:
    """Times a group of contenders in turns, beside a copy and a matrix product."""
    keep_band_matrices()
    return Timing()
