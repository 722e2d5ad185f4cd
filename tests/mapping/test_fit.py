"""Fitting any kind of mapping to a run, from the command line to the samples."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vglann_fast.cli.main import main
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import measured
from vglann_fast.mapping import fit
from vglann_fast.mapping.fit import KINDS, fit_mapping, load_mapping
from vglann_fast.mapping.gaussian import Gaussian
from vglann_fast.mapping.generalization import describe_gap, measure_gap
from vglann_fast.mapping.imle import IMLE
from vglann_fast.options.mapping import MAP_KINDS, map_options
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.files import write_json
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.measurements import machine
from vglann_fast.runtime.numerics import numerics

TINY = ["--width", "4", "--latent-dim", "8", "--levels", "2", "--batch-size", "3"]
SHORT = {
    "imle": ["--epochs", "3"],
    "vae": ["--epochs", "3"],
    "gmm": ["--components", "1,2", "--starts", "1"],
    "gaussian": [],
    "flow": ["--epochs", "2", "--transforms", "1"],
    "autoregressive": ["--epochs", "2", "--transforms", "1"],
    "drifting": ["--epochs", "2"],
    "flow-matching": ["--epochs", "2"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of ten clips, preset modern."""
    folder = tmp_path_factory.mktemp("fit")
    clips = write_clip_folder(folder / "clips", moving_squares(10))
    assert main(["train", str(clips), "--out", str(folder / "run"), "--epochs", "1", *TINY]) == 0
    return folder / "run"


def test_every_kind_has_options_in_every_preset():
    assert tuple(KINDS) == MAP_KINDS
    for preset in PRESETS.values():
        assert tuple(preset.map) == MAP_KINDS
        assert all(type(preset.map[kind]) is KINDS[kind].options_class for kind in KINDS)
    assert all(options.holdout_fraction == 0 for options in PRESETS["paper"].map.values())


def test_only_kinds_that_choose_by_latents_set_them_aside_unasked():
    aside = {kind for kind, options in PRESETS["modern"].map.items() if options.holdout_fraction > 0}
    assert aside == {"gmm", "flow", "autoregressive"}


@pytest.mark.parametrize(("few", "threads"), [(4096, 4), (10, 6)])
def test_a_fit_to_few_latents_takes_few_threads(run, monkeypatch, few, threads):
    monkeypatch.setattr(fit, "FEW_LATENTS", few)
    seen, whole = [], Gaussian.fit
    monkeypatch.setattr(
        Gaussian, "fit", lambda *a, **k: seen.append(torch.get_num_threads()) or whole(*a, **k)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        fit_mapping(run, "gaussian", PRESETS["modern"].map["gaussian"])
        assert (seen, torch.get_num_threads()) == ([threads], 6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("deterministic", "processes", "taken"), [(False, 1, True), (True, 1, False), (False, 2, False)]
)
def test_a_fit_takes_the_measured_threads_of_the_run_unless_it_must_not(
    run, tmp_path, monkeypatch, deterministic, processes, taken
):
    copy = RunDir.open(shutil.copytree(run, tmp_path / "run"))
    before = torch.get_num_threads()
    choices = {"threads": str(before + 1)}
    copy.options["measured"] = {"machine": machine(torch.device("cpu")), "when": "today", "choices": choices}
    write_json(copy.path / "options.json", copy.options)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(measured, "allowed", lambda: before + 1)
    monkeypatch.setattr(fit, "FEW_LATENTS", 0)
    seen = []

    def stopped(*args, **options):
        seen.append(torch.get_num_threads())
        raise InterruptedError

    monkeypatch.setattr(IMLE, "fit", stopped)
    with numerics(deterministic=deterministic), pytest.raises(InterruptedError):
        fit_mapping(copy.path, "imle", PRESETS["modern"].map["imle"], ranks=Ranks(0, processes))
    assert seen == [before + taken]


def test_nothing_set_aside_still_tells_the_distance(run, capsys):
    assert main(["map", str(run), "--kind", "gaussian"]) == 0
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.startswith("distance to the nearest of 4096 samples: ")
    assert "from latents it was fitted to" in line
    assert "held out" not in line
    gap = json.loads((run / "mapping" / "gaussian" / "mapping.json").read_text())["gap"]
    assert (gap["fitted"]["latents"], gap["held_out"]) == (10, None)


@pytest.mark.parametrize("kind", SHORT)
def test_every_kind_maps_and_samples(run, kind, capsys):
    if kind in ("flow", "autoregressive"):
        pytest.importorskip("zuko")
    assert main(["map", str(run), "--kind", kind, "--holdout-fraction", "0.2", *SHORT[kind]]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"fitted: {run / 'mapping' / kind}"
    assert "2 held out (gap " in said[-2]
    record = json.loads((run / "mapping" / kind / "mapping.json").read_text())
    assert record["kind"] == kind
    assert record["options"]["holdout_fraction"] == 0.2
    parts = [record["gap"][name] for name in ("fitted", "held_out")]
    assert [part["latents"] for part in parts] == [8, 2]
    assert all(0 < part["distance"] < 2 for part in parts)
    has_density = kind in ("gmm", "flow", "autoregressive")  # eight latents in eight dimensions: no gaussian
    assert all((part["nll"] is not None) == has_density for part in parts)
    rows = RunDir.open(run).logs.metrics(kind)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= len(record["epochs"]) >= 1

    assert main(["sample", str(run), "--kind", kind, "-n", "3", "--seed", "1"]) == 0
    samples = run / "media" / "samples"
    assert json.loads((samples / "samples.json").read_text())["mapping"] == kind
    assert np.isfinite(np.load(samples / "latents.npy")).all()


def test_the_same_seed_fits_the_same(run, tmp_path):
    samples = []
    for name in ("first", "second"):
        copy = shutil.copytree(run, tmp_path / name)
        options = map_options(PRESETS["modern"].map, "gmm", {"components": "1,2"})
        fit_mapping(copy, "gmm", options, seed=4)
        samples.append(load_mapping(RunDir.open(copy), "gmm").sample(5, torch.Generator().manual_seed(0)))
    assert torch.equal(*samples)


def test_a_mapping_of_an_earlier_version_loads(run):
    """Before other kinds there was no `holdout_fraction` among the options, and no "gap"."""
    assert main(["map", str(run), "--preset", "paper", "--epochs", "2"]) == 0
    file = run / "mapping" / "imle" / "mapping.json"
    record = json.loads(file.read_text())
    del record["gap"], record["options"]["holdout_fraction"]
    file.write_text(json.dumps(record))
    mapping = load_mapping(RunDir.open(run), "imle")
    assert mapping.gap is None
    assert mapping.sample(4, torch.Generator().manual_seed(0)).shape == (4, 8)


MISTAKES = {
    "an option of another kind": (
        ["--kind", "gaussian", "--epochs", "3"],
        "--epochs is not an option of gaussian; it applies to imle",
    ),
    "an option of one other kind": (
        ["--kind", "vae", "--pool-factor", "3"],
        "--pool-factor is not an option of vae; it applies to imle",
    ),
    "an unknown kind": (
        ["--kind", "gan"],
        "flow, autoregressive, drifting or flow-matching, got 'gan'",
    ),
    "all set aside": (["--holdout-fraction", "1"], "--holdout-fraction: expected 0 to below 1, got 1.0"),
    "too much set aside": (["--holdout-fraction", "0.9"], "leaves fewer than 2 of 10 latents"),
    "a component too many": (["--kind", "gmm", "--components", "10"], "more than there are latents, 9"),
    "the paper's mixture": (["--kind", "gmm", "--preset", "paper"], "--components 100: more than there are"),
    "a negative weight": (["--kind", "vae", "--kl-weight", "-1"], "--kl-weight: expected 0 or more"),
    "one bin": (["--kind", "flow", "--bins", "1"], "--bins: expected at least 2"),
    "no step to a sample": (["--kind", "flow-matching", "--steps", "0"], "--steps: expected 1 to"),
    "another solver": (["--kind", "flow-matching", "--solver", "rk4"], "--solver: expected euler or heun"),
    "a temperature of 0": (["--kind", "drifting", "--temperatures", "1,0"], "--temperatures: expected"),
    "a negative temperature": (["--kind", "drifting", "--temperatures", "-1"], "--temperatures: expected"),
    "a temperature that is not a number": (
        ["--kind", "drifting", "--temperatures", "nan"],
        "--temperatures: expected",
    ),
    "no temperature": (["--kind", "drifting", "--temperatures", ""], "--temperatures: expected"),
    "no steps": (["--kind", "autoregressive", "--transforms", "0"], "--transforms: expected 1 to"),
    "a batch of one": (["--kind", "vae", "--batch-size", "1"], "--batch-size: expected at least 2"),
    "a rate of nothing": (["--kind", "flow", "--lr", "0"], "--lr: expected a positive number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(run, name, capsys):
    arguments, message = MISTAKES[name]
    assert main(["map", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_dry_run_shows_the_options_of_the_kind(run, capsys):
    assert main(["map", str(run), "--kind", "vae", "--preset", "paper", "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "vae"
    assert shown["adam_state"] == "per-epoch"
    assert "pool_factor" not in shown


@pytest.mark.parametrize("kind", ["vae", "drifting", "flow-matching"])
def test_other_kinds_do_not_share_their_work(run, kind):
    options = PRESETS["modern"].map[kind]
    with pytest.raises(VglannError, match=f"--kind {kind}: only imle runs in several processes"):
        fit_mapping(run, kind, options, ranks=Ranks(0, 2))


class ByHeart:
    """A mapping that gives back the latents it has seen."""

    def __init__(self, latents):
        self.latents = latents

    def sample(self, n, generator):
        return self.latents[torch.randint(len(self.latents), (n,), generator=generator)]

    def log_density(self, latents):
        return None


def test_the_gap_shows_what_was_learnt_by_heart():
    latents = F.normalize(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    record = measure_gap(
        ByHeart(3 * latents[:50]), latents[:50], latents[50:], torch.Generator().manual_seed(0)
    )
    assert record["fitted"]["distance"] < 1e-3
    nearest = torch.cdist(latents[50:], latents[:50]).min(1).values.mean().item()
    assert record["held_out"]["distance"] == pytest.approx(nearest, rel=1e-4)
    assert f"{nearest:.4g} from 10 held out (gap +{nearest:.3g})" in describe_gap(record)
    alone = measure_gap(ByHeart(latents), latents, None, torch.Generator().manual_seed(0))
    assert alone["held_out"] is None
    assert "held out" not in describe_gap(alone)
