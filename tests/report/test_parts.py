"""The parts of the report page: filmstrips, charts, and numbers in words."""

import base64
import math
import re

import cv2
import numpy as np
import pytest

from vglann_fast.report.artifacts import seconds_spent
from vglann_fast.report.filmstrip import filmstrip
from vglann_fast.report.headline import duration, outcome
from vglann_fast.report.page import setting_rows
from vglann_fast.report.plots import Series, chart, tick_label


@pytest.mark.parametrize(
    ("channels", "frames", "height", "width"),
    [(3, 1, 7, 9), (1, 5, 16, 16), (3, 19, 64, 48), (3, 20, 21, 21)],
)
def test_filmstrip_keeps_frames_apart(channels: int, frames: int, height: int, width: int) -> None:
    # Flat frames of very different colors: a frame that bled into a neighbor would show.
    colors = np.array([[20, 90, 230], [230, 90, 20]], np.uint8)[np.arange(frames) % 2, :channels]  # (T, C)
    video = np.broadcast_to(colors.T[:, :, None, None], (channels, frames, height, width))
    strip = filmstrip(video)
    data = base64.b64decode(strip.uri.removeprefix("data:image/webp;base64,"), validate=True)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert (strip.frames, strip.width, strip.height) == (frames, width, height)
    assert picture.shape[1] == strip.strip_width
    for i, color in enumerate(colors):
        top = i // strip.columns * strip.cell_height + strip.margin
        left = i % strip.columns * strip.cell_width + strip.margin
        frame = picture[top : top + height, left : left + width]
        assert frame.shape == (height, width, 3)
        assert np.abs(frame[..., ::-1].astype(int) - color).max() <= 5


@pytest.mark.parametrize(
    "bad",
    [np.zeros((3, 2, 4, 4), np.float32), np.zeros((2, 2, 4, 4), np.uint8), np.zeros((3, 0, 4, 4), np.uint8)],
)
def test_filmstrip_refuses_what_is_no_clip(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        filmstrip(bad)


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r' points="([^"]*)"', svg)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in lines]


def test_chart_places_points_to_scale() -> None:
    svg = chart([Series("a", [0, 5, 10], [1, 10, 100])], x_label="step", y_label="loss", log=True)
    ((x0, y0), (x1, y1), (x2, y2)) = points_of(svg)[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # equal ratios, equal steps; up is smaller
    assert y0 > y1 > y2
    assert 'aria-label="loss against step. a: from 1 at 0 to 100 at 10"' in svg
    linear = points_of(chart([Series("a", [0, 5, 10], [1, 10, 100])], x_label="step", y_label="loss"))[0]
    assert (linear[0][1] - linear[1][1]) / (linear[0][1] - linear[2][1]) == pytest.approx(9 / 99, abs=0.01)


def test_chart_thins_long_series_and_leaves_out_what_cannot_be_drawn() -> None:
    values = [float(i % 7) for i in range(10_000)]
    values[17], values[18] = math.nan, 1e300
    (line,) = points_of(chart([Series("a", list(range(10_000)), values)], x_label="x", y_label="y"))
    assert 200 <= len(line) <= 240
    assert line == sorted(line)
    with pytest.raises(ValueError, match="finite"):
        chart([Series("a", [1, 2], [0.0, -1.0])], x_label="x", y_label="y", log=True)
    with pytest.raises(ValueError, match="finite"):
        chart([], x_label="x", y_label="y")


@pytest.mark.parametrize(
    "values", [[3.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0 + 1e-15], [-9e29, 9e29], [2e-30, 5e-30]]
)
@pytest.mark.parametrize("log", [False, True])
def test_chart_of_hardly_any_range(values: list[float], log: bool) -> None:
    if log and min(values) <= 0:
        values = [abs(v) + 1 for v in values]
    svg = chart([Series('<a "b">', list(range(len(values))), values)], x_label="<x>", y_label="y", log=log)
    assert len(points_of(svg)[0]) == len(values)
    assert all(0 <= x <= 360 and 0 <= y <= 212 for x, y in points_of(svg)[0])
    assert "<a" not in svg
    assert "<x>" not in svg


def test_chart_covers_what_it_is_told_to() -> None:
    (low,), (high,) = (
        points_of(chart([Series("a", [1], [y])], x_label="x", y_label="y", cover=(0, 1)))[0] for y in (0, 1)
    )
    (middle,) = points_of(chart([Series("a", [1], [0.5])], x_label="x", y_label="y", cover=(0, 1)))[0]
    assert middle[1] == pytest.approx((low[1] + high[1]) / 2, abs=0.2)
    assert low[1] - high[1] > 100


def test_tick_labels() -> None:
    labels = {0: "0", 0.05: "0.05", 1500: "1,500", 2e-6: "2e-06", -0.25: "-0.25", 20: "20", 3e7: "3e+07"}
    assert {value: tick_label(value) for value in labels} == labels


def test_time_adds_up_over_resumes() -> None:
    assert seconds_spent([{"seconds": s} for s in (1, 5, 9, 2, 4)]) == 13
    assert seconds_spent([{"seconds": "x"}, {"loss": 1}]) is None
    assert [duration(s) for s in (0.4, 48, 59.7, 192, 3599, 14_700)] == [
        ("0", "s"),
        ("48", "s"),
        ("1:00", "min"),
        ("3:12", "min"),
        ("59:59", "min"),
        ("4:05", "h"),
    ]


def test_nested_settings_become_lines() -> None:
    rows = setting_rows(
        {"a": 1, "b": {"c": None, "d": {"e": [1, 2]}}, "f": {}, "g": True, "h": [{"i": 1}], "j": []}
    )
    assert rows == [
        (0, "a", "1"),
        (0, "f", "{}"),
        (0, "g", "yes"),
        (0, "h", "[{'i': 1}]"),
        (0, "j", "none"),
        (0, "b", None),
        (1, "c", "none"),
        (1, "d", None),
        (2, "e", "1, 2"),
    ]


@pytest.mark.parametrize(
    ("record", "answer", "said"),
    [
        (
            {"psnr_over_still": 8.5, "psnr_pca": 25.0, "motion_r2": 0.91},
            "Yes: ",
            ["8.50 dB better", "5.00 dB better", "0.91"],
        ),
        (
            {"psnr_over_still": 8.5, "psnr_pca": 80.0, "pca_exact": True},
            "Yes: ",
            ["8.50 dB better than a still"],
        ),
        (
            {"psnr_over_still": -1.0, "psnr_pca": 25.0},
            "Partly: ",
            ["1.00 dB worse than a still", "Train longer"],
        ),
        (
            {"psnr_over_still": -1.0, "psnr_pca": 31.0},
            "Not yet: ",
            ["1.00 dB worse than PCA", "Train longer"],
        ),
        (
            {"psnr_over_still": 0.0, "psnr_pca": "x", "motion_r2": -0.3},
            "Not yet: ",
            ["-0.30", "Train longer"],
        ),
        (
            {"psnr_over_still": 0.1, "psnr_pca": "x", "motion_r2": -0.3},
            "Partly: ",
            ["0.10 dB better", "Train longer"],
        ),
        ({"psnr_pca": "x", "motion_r2": float("nan")}, "The generator ", ["30.00 dB."]),
    ],
)
def test_one_sentence_says_whether_it_worked(record: dict, answer: str, said: list[str]) -> None:
    sentence = outcome({"psnr": 30.0, "clips": 1200} | record)
    assert sentence.startswith(answer)
    assert "1,200 training clips" in sentence
    assert all(words in sentence for words in said)
    assert ("Train longer" in sentence) == ("Train longer" in said)
    assert ("PCA" in sentence) == (record["psnr_pca"] in (25.0, 31.0))
    assert outcome(record) == ""
    assert "its 1 training clip at" in outcome({"psnr": 30.0, "clips": 1})
