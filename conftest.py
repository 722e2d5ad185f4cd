"""Chooses what is collected: `pytest` runs tests/, `pytest --benchmark-only` runs bench/.

A path named on the command line is always taken as it is.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what lies in the folder that was not asked for (the folder itself is always looked into)."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return None
    other = "tests" if config.getoption("benchmark_only", False) else "bench"
    return True if ROOT / other in collection_path.parents else None
