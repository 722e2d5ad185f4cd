"""Run folders: what is written is whole, and what is read is checked."""

import errno
import json

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import new_generator
from vglann_fast.run import destinations
from vglann_fast.run.destinations import atomic_dir, atomic_file
from vglann_fast.run.files import read_json, write_json
from vglann_fast.run.folder import RunDir


def test_open_finds_what_create_wrote(tmp_path):
    options = {"preset": "demo", "seed": 0, "clips": "c", "frames": 32, "size": 64, "train": {"epochs": 3}}
    made = RunDir.new(tmp_path / "run", options).begin()
    opened = RunDir.open(tmp_path / "run")
    assert opened.options == made.options
    assert opened.options["train"] == {"epochs": 3}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    with pytest.raises(VglannError, match="--resume"):
        RunDir.new(tmp_path / "run", {})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"format": "other"}',
        '{"format": "vglann-run", "version": 99}',
        '{"format": "vglann-run", "version": 1}',
    ],
)
def test_open_refuses_what_is_no_run(tmp_path, content):
    (tmp_path / "options.json").write_text(content)
    with pytest.raises(VglannError, match=r"options\.json"):
        RunDir.open(tmp_path)
    with pytest.raises(VglannError, match="is not a run"):
        RunDir.open(tmp_path / "nowhere")


VALUES = [None, True, -1, 0, 2**63, 1e400, float("nan"), "", "gan", [], {}, [[]]]


def test_damaged_options_are_refused_or_harmless(tmp_path):
    """Every value of options.json, and of its options, replaced by something else: one line, or a generator."""
    from vglann_fast.glo.checkpoint import load_trained

    clips = write_clip_folder(tmp_path / "clips", moving_squares(2))
    run = new_run(tmp_path / "run", clips, tiny_options())
    generator = new_generator(tiny_options(), 16, 32)
    parts = {"generator": generator.state_dict(), "latents": {"rows": torch.ones(2, 8)}}
    run.checkpoints.save(1, parts, {"ids": ["a", "b"]})
    whole = {**run.options, "resumed": [{"step": 1, "changed": {}, "environment": {}}]}
    places = [(whole, name) for name in whole] + [(whole["train"], name) for name in whole["train"]]
    refused = 0
    for holder, name in places:
        right = holder[name]
        for value in [*VALUES, *([[{}]] if name == "resumed" else [])]:
            holder[name] = value
            (run.path / "options.json").write_text(json.dumps(whole))
            try:
                load_trained(RunDir.open(run.path))
            except VglannError:
                refused += 1
        holder[name] = right
    assert refused > 0.8 * len(VALUES) * len(places)


def test_metrics_are_read_by_stage_and_a_torn_line_is_left_out(tmp_path):
    run = RunDir.new(tmp_path / "run", {}).begin()
    for step in (1, 2, 3):
        run.logs.add({"stage": "glo", "step": step, "loss": 0.5})
    run.logs.add({"stage": "imle", "step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "glo", "st')
    assert [row["step"] for row in run.logs.metrics("glo")] == [1, 2, 3]
    run.logs.drop_metrics("glo", after_step=2)
    assert [row["step"] for row in run.logs.metrics("glo")] == [1, 2]
    assert len(run.logs.metrics("imle")) == 1


def test_checkpoints_keep_tensors_in_any_layout_and_only_the_newest(tmp_path):
    run = RunDir.new(tmp_path / "run", {}).begin()
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for step in (1, 2, 3):
        run.checkpoints.save(step, {"part": {"weight": weight * step}}, {"ids": ["ü"]}, keep=2)
    names = sorted(folder.name for folder in (run.path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]
    state, parts = run.checkpoints.load()
    assert state["ids"] == ["ü"]
    assert torch.equal(parts["part"]["weight"], weight * 3)


@pytest.mark.parametrize("name", ["../../options", "part.bin"])
def test_a_checkpoint_cannot_name_files_outside_itself(tmp_path, name):
    run = RunDir.new(tmp_path / "run", {}).begin()
    folder = run.checkpoints.save(1, {"part": {"x": torch.ones(1)}}, {"ids": []})
    state = json.loads((folder / "state.json").read_text())
    state["sha256"] = {name: "0"}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(VglannError, match="bad file name"):
        run.checkpoints.load()


@pytest.mark.parametrize(
    "change", [{"ids": 3}, {"ids": [1]}, {"step": "x"}, {"sha256": []}, {"format": None}]
)
def test_a_damaged_state_is_named(tmp_path, change):
    run = RunDir.new(tmp_path / "run", {}).begin()
    folder = run.checkpoints.save(1, {"part": {"x": torch.ones(1)}}, {"ids": ["a"]})
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(VglannError, match="step-00000001 is damaged"):
        run.checkpoints.load()


def test_atomic_file_replaces_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "file"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_atomic_dir_replaces_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_dir(target) as temporary:
            (temporary / "file").write_text(content)
    with pytest.raises(RuntimeError), atomic_dir(target) as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_full_or_read_only_disk_is_one_line(tmp_path, monkeypatch, number, message):
    def fail(path):
        raise OSError(number, "no")

    monkeypatch.setattr(destinations, "flush", fail)
    with pytest.raises(VglannError, match=message):
        write_json(tmp_path / "file", {})
    run = RunDir(tmp_path, {})
    with pytest.raises(VglannError, match=message):
        run.checkpoints.save(1, {"part": {"x": torch.ones(1)}}, {})
    assert not list(tmp_path.glob(".tmp-*"))
    assert not (tmp_path / "checkpoints").exists()


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(VglannError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(VglannError, match=r"none\.json is missing"):
        read_json(tmp_path / "none.json")
