"""Folders that version 0.1.0 wrote are opened, resumed, sampled, replayed and shown under present names.

tests/golden/run-0.1 was made by that version: five clips packed from videos of moving squares; a run of preset paper
(width 2, latents of 8, latent mode catchup) stopped after two of four epochs, then `vglann map` with imle and gmm,
`sample`, `reconstruct` and `evaluate`; and the record of `vglann table`. Videos were removed from it.
"""

import json
import shutil
from pathlib import Path

import pytest

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.mapping.fit import load_mapping
from vglann_fast.options.aliases import ALIASES, read_mapping, read_record, read_run_options
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import TrainOptions
from vglann_fast.report.table_page import read_table, write_table_page
from vglann_fast.run.folder import RunDir

GOLDEN = Path(__file__).parents[1] / "golden" / "run-0.1"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder with clips, run and table, which name each other from there."""
    folder = shutil.copytree(GOLDEN, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def test_the_run_has_present_options(old):
    run = RunDir.open("run")
    train = run.options["train"]
    named = [train[name] for name in ("blur", "perceptual", "schedule", "latent_mode")]
    assert named == ["paper", "paper", "halve-every-tenth", "lazy"]
    assert options_from_json(TrainOptions, train).width == 2


def test_a_resume_finishes_the_run_and_leaves_present_names(old):
    assert main(["train", "--resume", "run", "--lr-generator", "0.0005", "--device", "cpu"]) == 0
    written = json.loads((old / "run" / "options.json").read_text())
    assert written["train"]["latent_mode"] == "lazy"
    assert written["resumed"][0]["changed"] == {"lr_generator": [0.001, 0.0005]}
    state, _ = RunDir.open("run").checkpoints.load()
    assert (state["step"], state["finished"]) == (4, True)
    stages = {row["stage"] for row in RunDir.open("run").logs.metrics("imle")}
    assert stages == {"imle"}
    assert "hubness" not in (old / "run" / "metrics.jsonl").read_text()


def test_what_a_resume_changed_is_read_under_present_names():
    entry = {"step": 3, "changed": {"blur": ["gaussian", "seed"], "levels": [2, 3]}, "environment": {}}
    read = read_run_options({"train": {"schedule": "halving"}, "resumed": [entry, "damaged"]})
    assert read["train"] == {"schedule": "halve-every-tenth"}
    assert read["resumed"][0]["changed"] == {"blur": ["gaussian", "paper"], "levels": [2, 3]}
    assert read["resumed"][1] == "damaged"


def test_mappings_are_loaded_and_sampled(old, capsys):
    mapping = load_mapping(RunDir.open("run"), "imle")
    assert (mapping.options.normalize, mapping.options.holdout_fraction) == (True, 0.4)
    assert mapping.options.schedule == "halve-every-50"
    assert "match_diversity" in mapping.epochs[0]
    for kind in ("imle", "gmm"):
        assert main(["sample", "run", "-n", "2", "--kind", kind, "--device", "cpu"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_replay_repeats_every_command_in_its_history(old, capsys):
    """Digits come from another machine, so the verdicts may differ; the options may not."""
    capsys.readouterr()
    assert main(["replay", "run", "--out", "again", "--device", "cpu"]) in (0, 1)
    verdicts = dict(
        reversed(line.split(": ")[0].split(" ", 1)) for line in capsys.readouterr().out.splitlines()
    )
    made = ["mapping/imle", "mapping/gmm", "media/samples", "media/reconstruction", "checkpoint 2, latents"]
    assert set(made) <= {name for name, verdict in verdicts.items() if verdict in ("SAME", "DIFF")}
    for kind in ("imle", "gmm"):
        records = [
            json.loads(Path(f"{run}/mapping/{kind}/mapping.json").read_text()) for run in ("run", "again")
        ]
        before, after = map(read_mapping, records)
        assert before["options"] == after["options"]


def test_history_and_metrics_have_present_names(old):
    run = RunDir.open("run")
    options = run.logs.history()[0]["options"]
    assert (options["normalize"], options["holdout_fraction"]) == (True, 0.4)
    assert "normalise" not in options
    assert [row["match_diversity"] for row in run.logs.metrics("imle")] == [1.0, 1.0]


def test_the_report_shows_what_the_records_say(old):
    record = json.loads((old / "run/media/reconstruction/reconstruction.json").read_text())
    assert main(["report", "run"]) == 0
    page = (old / "run" / "report" / "index.html").read_text()
    assert f"{record['psnr']:.2f}" in page
    assert "Motion of imle" in page
    assert "match_diversity" in page
    assert "Files that could not be shown" not in page


def test_the_table_is_read_and_written_again(old):
    problems = []
    table = read_table(old / "table", problems)
    record = table.records["l1"]["gaussian"]
    assert "energy" in record["motion"]["generated"]
    write_table_page(old / "table")
    text = (old / "table" / "table.md").read_text()
    assert "damaged" not in text
    assert "gaussian" in text
    assert not problems


def test_the_clip_folder_is_read(old):
    assert [len(ClipSet.open("clips", split)) for split in ("train", "test")] == [3, 2]


def test_records_are_renamed_at_any_depth_and_however_deep():
    deep = value = {}
    for _ in range(5000):
        value["made"] = [{}]
        value = value["made"][0]
    value["hubness"] = 1
    read = read_record(deep)
    for _ in range(5000):
        read = read["generated"][0]
    assert read == {"match_diversity": 1}


def test_an_entry_says_up_to_which_version_a_name_was_written():
    for entry in ALIASES:
        assert entry.until.split(".") <= ["0", "1", "0"]
        assert entry.old != entry.new
    assert len({(entry.scope, entry.old) for entry in ALIASES}) == len(ALIASES)
