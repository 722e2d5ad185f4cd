"""What the report shows of an evaluation, and of a damaged one."""

import json
from xml.etree import ElementTree

import pytest

from vglann_fast.report.evaluation import distance_charts, motion_charts, number_tables
from vglann_fast.report.page import write_report
from vglann_fast.report.plots import bars


def figures(distance):
    shares = {"precision": 0.5, "recall": 0.25, "density": 1.5, "coverage": None}
    return {"n": 273, "frechet": distance, "quarters": {"mean": 2 * distance, "sd": 0.5}, **shares}


def record(distance):
    motion = {"generated": {"steps": [2.0, 2.5, 9.0]}, "real": {"steps": [2.0, 2.0, 2.0]}}
    features = {"frechet[lite0]": {"generated": figures(distance), "floor": figures(3.25)}}
    return {"features": features, "motion": motion}


RECORDS = {
    "imle": record(12.5),
    "gaussian": record(2150.0),
    "reconstruction": {
        "train": {
            "clips": 1200,
            "psnr": 23.456,
            "ssim": 0.7,
            "motion_r2": 0.219,
            "psnr_still": 24.2,
            "pca_exact": True,
        }
    },
}


def test_tables():
    quality, baselines, features = number_tables(RECORDS)
    assert quality[1] == [["training clips", "1,200", "23.46", "–", "0.7", "–", "–", "0.219", "–"]]
    assert baselines[1] == [["training clips", "1,200", "–", "24.2", "exact", "exact", "–", "–"]]
    assert features[0][0] == "frechet[lite0], n = 273"
    assert features[1] == [
        ["real clips (floor)", "3.25", "6.5 ± 0.5", "0.5", "0.25", "1.5", "–"],
        ["imle", "12.5", "25 ± 0.5", "0.5", "0.25", "1.5", "–"],
        ["gaussian", "2,150", "4,300 ± 0.5", "0.5", "0.25", "1.5", "–"],
    ]


def test_charts():
    (distances,) = distance_charts(RECORDS)
    svg = ElementTree.fromstring(distances.svg)
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[0] / widths[1] == pytest.approx(12.5 / 2150, abs=1e-3)
    texts = [node.text for node in svg.iter("text")]
    assert {"imle", "12.5", "gaussian", "2150", "floor 3.25"} <= set(texts)
    motions = motion_charts(RECORDS)
    assert [one.title for one in motions] == ["Motion of imle", "Motion of gaussian"]
    assert all(one.labels == ["generated", "real"] for one in motions)


def test_bars_start_at_zero_and_leave_out_what_cannot_be_drawn():
    svg = ElementTree.fromstring(
        bars([("a", 5.0), ("b", float("nan")), ("c", 0.0), ("d", 10.0)], x_label="x")
    )
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[1] == 0
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)
    assert "b" not in [node.text for node in svg.iter("text")]
    with pytest.raises(ValueError, match="at least one"):
        bars([("a", -1.0), ("b", float("inf"))], x_label="x")


def test_the_page_shows_them(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for name, one in RECORDS.items():
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps(one))
    page = write_report(tmp_path).read_text()
    assert "frechet[lite0], n = 273" in page
    assert "Motion of gaussian" in page
    assert "vglann evaluate" not in page


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"features": 3, "motion": []},
        {"features": {"<b>": 1, "x": {"generated": 7}}, "motion": {"generated": {"steps": "abc"}}},
        {
            "features": {"x": {"generated": {"frechet": "a lot"}, "floor": None}},
            "motion": {"generated": {"steps": [None]}},
        },
        {"features": {"x": {"generated": {"frechet": -1e300}, "floor": {"frechet": -1}}}, "train": 1},
    ],
)
def test_damaged_records_do_no_harm(tmp_path, content):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "reconstruction.json").write_text(json.dumps(content))
    (tmp_path / "evaluation" / "imle.json").write_text(json.dumps(content))
    assert "Evaluation" in write_report(tmp_path).read_text()
