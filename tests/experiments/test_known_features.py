"""Feature sets with a known answer, small: what the metrics must see of them, and what none of them sees."""

import pytest

from vglann_fast.experiments.known_features import measure


@pytest.fixture(scope="module")
def found():
    """Of 80 rows of 320 numbers: n < d, as with 273 videos and 1,280 features."""
    values = measure(80, repeats=6, d=320)
    return {name: {key: rows.mean().item() for key, rows in one.items()} for name, one in values.items()}


def test_frechet_of_few_rows_prefers_too_little_spread(found):
    assert found["less spread"]["frechet"] < found["equal"]["frechet"]


def test_the_kernel_distance_sees_a_shift_and_dropped_modes(found):
    assert abs(found["equal"]["mmd"]) < found["shift"]["mmd"]
    assert found["dropped"]["mmd"] > 5 * abs(found["equal"]["mmd"])


def test_coverage_sees_dropped_modes(found):
    assert found["dropped"]["coverage"] < found["equal"]["coverage"] - 0.1


def test_density_takes_too_little_spread_for_better(found):
    assert found["less spread"]["density"] > 1.2 * found["equal"]["density"]


def test_only_the_nearest_training_row_sees_a_copy(found):
    copy, equal = found["copy"], found["equal"]
    assert abs(copy["mmd"] - equal["mmd"]) < found["shift"]["mmd"]
    assert abs(copy["coverage"] - equal["coverage"]) < 0.1
    assert copy["nearest"] < 0.01 < 0.9 < equal["nearest"]
