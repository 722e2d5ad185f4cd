"""The evaluation of a run in the report, whole and damaged."""

import json
from xml.etree import ElementTree

import pytest

from vglann_fast.report.evaluation import distance_charts, motion_charts, number_tables
from vglann_fast.report.page import write_report
from vglann_fast.report.plots import bars


def figures(distance):
    shares = {"precision": 0.5, "recall": 0.25, "density": 1.5, "coverage": None}
    quarters = {"n": 68, "mean": 2 * distance, "sd": 0.5}
    return {
        "n": 273,
        "dimensions": 100,
        "mmd": distance / 4,
        "frechet": distance,
        "quarters": quarters,
        **shares,
    }


def splits(mmd, coverage):
    return {
        "n": 136,
        "splits": 20,
        "mmd": {"mean": mmd, "sd": 0.25},
        "coverage": {"mean": coverage, "sd": 0.03},
    }


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
    quality, baselines, features, shares = number_tables(RECORDS)
    assert quality[1] == [["training clips", "1,200", "23.46", "–", "0.7", "–", "–", "0.219", "–"]]
    assert baselines[1] == [["training clips", "1,200", "–", "24.2", "exact", "exact", "–", "–"]]
    assert features[0][0] == "frechet[lite0], n = 273"
    assert features[1] == [
        ["real clips (floor)", "0.8125", "3.25", "6.5 ± 0.5 †"],
        ["imle", "3.125", "12.5", "25 ± 0.5 †"],
        ["gaussian", "537.5", "2,150", "4,300 ± 0.5 †"],
    ]
    assert shares[1] == [
        [name, "0.5", "0.25", "1.5", "–"] for name in ("real clips (floor)", "imle", "gaussian")
    ]
    assert features[2] == shares[2] == set()


def with_splits(name, mmd, coverage):
    one = {**RECORDS[name]["features"]["frechet[lite0]"], "truth": splits(0.1, 0.76)}
    one = {**one, "generated": {**one["generated"], "splits": splits(mmd, coverage)}}
    return {"features": {"frechet[lite0]": one}}


def test_the_truth_row_decides_what_is_bold_and_not_the_largest_value():
    records = {"imle": with_splits("imle", 0.9, 0.88), "gaussian": with_splits("gaussian", 0.3, 0.74)}
    _, (head, rows, best) = number_tables(records)
    assert head[0] == "frechet[lite0], 20 splits of n = 136"
    assert [row[0] for row in rows] == ["real against real (truth)", "imle", "gaussian"]
    assert rows[1][head.index("coverage")] == "0.88 ± 0.03"
    assert best == {(2, head.index("kernel distance")), (2, head.index("coverage"))}


def test_a_kernel_distance_below_the_truth_is_not_further_from_it():
    records = {"imle": with_splits("imle", -3.0, 0.8), "gaussian": with_splits("gaussian", 0.6, 0.8)}
    _, (_, _, best) = number_tables(records)
    assert {row for row, column in best if column == 1} == {1}


def test_every_frechet_distance_of_few_videos_is_marked():
    """Also in a record of an earlier version, which has the number of features in its protocol alone, or nowhere."""
    for dimensions, marked in ((136, False), (137, True), (None, True)):
        one = {**RECORDS["imle"]["features"]["frechet[lite0]"]}
        figures_ = {key: value for key, value in one["generated"].items() if key != "dimensions"}
        one = {"generated": figures_, "protocol": {"dimensions": dimensions}}
        ((head, rows, _), _) = number_tables({"imle": {"features": {"x": one}}})
        cell = rows[0][head.index("Fréchet distance")]
        assert cell == ("12.5 †" if marked else "12.5"), dimensions


def test_charts():
    (distances,) = distance_charts(RECORDS)
    svg = ElementTree.fromstring(distances.svg)
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[0] / widths[1] == pytest.approx(3.125 / 537.5, abs=1e-3)
    texts = [node.text for node in svg.iter("text")]
    assert {"imle", "3.125", "gaussian", "537.5", "floor 0.8125"} <= set(texts)
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
