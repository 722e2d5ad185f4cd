"""The mappings of a run side by side in the report, and an ablation beside it."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.mapping import fit
from vglann_fast.report.mappings import compare_mappings
from vglann_fast.report.page import write_report
from vglann_fast.report.plots import Series, scatter


class Drawn:
    """A mapping that draws given rows, in their order."""

    def __init__(self, rows):
        self.rows = rows

    def sample(self, n, generator):
        return self.rows.expand(n, -1) if len(self.rows) == 1 else self.rows[:n]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of nine latents with two mappings."""
    folder = tmp_path_factory.mktemp("mapped")
    clips = write_clip_folder(folder / "clips", moving_squares(9))
    run = new_run(folder / "run", clips, tiny_options(latent_init="sphere"))
    new_training(ClipSet.open(clips, "train"), tiny_options(latent_init="sphere"), run).loop(max_steps=1)
    for kind, *more in (("gaussian",), ("vae", "--epochs", "2")):
        assert main(["map", str(run.path), "--kind", kind, "--preset", "demo", *more]) == 0
    return run.path


def test_the_latents_themselves_and_a_single_point(run, monkeypatch):
    latents = load_trained(fit.RunDir.open(run)).latents
    drawn = {"gaussian": Drawn(3 * latents), "vae": Drawn(latents[4:5])}
    monkeypatch.setattr(fit, "load_mapping", lambda run, kind: drawn[kind])
    found = compare_mappings(run, ["gaussian", "vae", "never fitted"], [])
    same, point = found.mappings["gaussian"], found.mappings["vae"]
    assert (same.coverage, same.match_diversity) == (1, 1)
    np.testing.assert_allclose(same.points, found.latents, atol=1e-6)
    assert point.match_diversity == pytest.approx(1 / 9)
    assert point.coverage < 1
    assert np.ptp(point.points, axis=0).max() < 1e-12

    # the axes, by the eigenvectors of the covariance
    rows = F.normalize(latents.double(), dim=1)
    values = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    assert found.shares == pytest.approx((values[:2] / values.sum()).tolist())
    assert found.latents.var(0, ddof=1) == pytest.approx(values[:2].numpy())


def test_a_mapping_that_cannot_be_read_is_named(run):
    file = run / "mapping" / "vae" / "mapping.safetensors"
    whole = file.read_bytes()
    problems = []
    try:
        file.write_bytes(b"no tensors")
        assert list(compare_mappings(run, ["gaussian", "vae"], problems).mappings) == ["gaussian"]
    finally:
        file.write_bytes(whole)
    assert "mapping/vae" in problems[0]


def test_the_page_compares_them(run):
    page = write_report(run).read_text()
    assert page.count('class="series series-1 cloud"') == 2
    assert "% of the variance" in page
    assert '<th scope="row">vae</th>' in page


def test_a_scatter_has_one_unit_for_both_axes():
    points = Series("a", [0, 3, 0, float("nan"), 1e40], [0, 0, 3, 1, 1])
    svg = ElementTree.fromstring(scatter([points], x_label="x", y_label="y"))
    (x0, y0), (x1, y1), (x2, y2) = ((float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle"))
    assert (y1, x2) == (y0, x0)
    assert x1 - x0 == pytest.approx(y0 - y2, abs=0.2)
    wide = ElementTree.fromstring(scatter([points], x_label="x", y_label="y", cover=[(-30, 0), (30, 0)]))
    first, second = (float(c.get("cx")) for c in list(wide.iter("circle"))[:2])
    assert second - first < 0.2 * (x1 - x0)
    for same in ([0.5], [0.5, 0.5]):  # no extent at all
        assert "circle" in scatter([Series("a", same, same)], x_label="x", y_label="y")
    assert scatter([Series("a", range(5000), range(5000))], x_label="x", y_label="y").count("<circle") <= 400
    with pytest.raises(ValueError, match="at least one"):
        scatter([Series("a", [], [])], x_label="x", y_label="y")


def ablation_run(row, seed, psnr, regime="short"):
    return {
        "row": row,
        "regime": regime,
        "seed": seed,
        "psnr": psnr,
        "psnr_last_frame": psnr - 2,
        "ssim": 0.5,
    }


def test_an_ablation_beside_the_run_is_shown(tmp_path):
    run = tmp_path / "modern"
    run.mkdir()
    assert "Ablation" not in write_report(run).read_text()
    rows = [ablation_run("paper", 0, 16.0), ablation_run("paper", 1, 17.0), ablation_run("<modern>", 0, 20.5)]
    (tmp_path / "ablation.json").write_text(
        json.dumps({"runs": [*rows, ablation_run("paper", 0, 15.25, "long")]})
    )
    page = write_report(run).read_text()
    assert "Ablation" in page
    assert "<td>2</td><td>16.5 (16 to 17)</td><td>14.5 (14 to 15)</td><td>0.5 (0.5 to 0.5)</td>" in page
    assert "&lt;modern&gt;" in page
    assert "long epochs" in page
    (tmp_path / "ablation.json").write_text(json.dumps({"runs": [3, {"row": 1, "psnr": "x"}]}))
    assert "Ablation" in write_report(run).read_text()
