"""Measured choices in a training: what takes them, what wins over them, and that a run keeps them."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.experiments.replay import replay
from vglann_fast.glo import measured
from vglann_fast.glo.measured import choices_of_run, training_shapes
from vglann_fast.glo.train import train
from vglann_fast.options.choices import left_open, read_choices, settled
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.measurements import Contest, Entry, machine, place, write
from vglann_fast.runtime.numerics import numerics

CPU = torch.device("cpu")
OPTIONS = tiny_options("modern-2026a", width=2, epochs=1)
CHOICES = {"data": "resident", "memory_format": "contiguous", "threads": "2", "step_guard": "reference"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("measured") / "clips", moving_squares(4, 16, 16))


@pytest.fixture(autouse=True)
def alone(own_cache, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(measured, "allowed", lambda: 2)
    caplog.set_level(logging.INFO)


def keep_choices(choices, **here):
    """Put a measurement of the tiny training into the cache."""
    contests = {
        name: Contest("plain", value, {value: 1.0}, {value: 2.0}, {}) for name, value in choices.items()
    }
    contests["together"] = Contest("defaults", "choices", {"choices": 1.0}, {"choices": 2.0}, {})
    if "threads" in contests:
        contests["threads"] = replace(contests["threads"], default=str(torch.get_num_threads()))
    shapes = training_shapes(OPTIONS, 16, 16, 3)
    write(place(), [Entry({**machine(CPU), **here}, shapes, "2026-01-02T03:04:05+00:00", contests)])


def trained(path, clips, given=(), **changes):
    """Train a new run; returns (the run as it is on disk, its training)."""
    options = replace(OPTIONS, **changes)
    record = {"preset": "modern-2026a", "seed": 0, "clips": str(clips), "train": options_to_json(options)}
    run = RunDir.new(path, {**record, "frames": 16, "size": 16})
    training = train(ClipSet.open(clips, "train"), run, given=given)
    return RunDir.open(path), training


def is_contiguous(training):
    return training.generator.video.conv3.weight.is_contiguous()


def test_a_new_training_takes_what_was_measured_says_so_and_keeps_it(clips, tmp_path, caplog):
    keep_choices(CHOICES)
    run, training = trained(tmp_path / "run", clips)
    assert run.options["measured"]["choices"] == CHOICES
    assert (training.source.name, is_contiguous(training)) == ("resident", True)
    assert run.recorded_environment()["cpu_threads"] == 2
    (line,) = [line for line in caplog.messages if line.startswith("measured here")]
    assert "2026-01-02" in line
    assert "data resident (2.00 times as fast)" in line
    # Options stay as they were given: what the machine decides stands beside them.
    assert run.options["train"]["data"] == "auto"


def test_a_resume_and_a_replay_keep_the_choices_whatever_was_measured_since(clips, tmp_path):
    keep_choices({"memory_format": "contiguous", "data": "resident", "threads": "1"})
    run, _ = trained(tmp_path / "run", clips)
    keep_choices({"memory_format": "channels-last", "data": "mmap", "threads": "2"})
    resumed = train(ClipSet.open(clips, "train"), run, resume=True)
    assert (resumed.source.name, is_contiguous(resumed)) == ("resident", True)
    verdicts = replay(run.path, lambda *_: None)
    assert all(verdict.same for verdict in verdicts), verdicts
    place().unlink()
    assert choices_of_run(RunDir.open(run.path), OPTIONS, CPU)["data"] == "resident"


def test_a_choice_for_an_op_or_layer_that_does_not_exist_is_harmless(clips, tmp_path, monkeypatch, caplog):
    choices = dict.fromkeys(("upsample_conv 9d 3-3", "upsample_conv 3d", "upsample_conv 3d 4-2"), "triton")
    # Version 0.2.0 measured an implementation that is not there any more.
    keep_choices({**choices, "upsample_conv": "narrow", "fusion 3d 4-2": "triton", "data": "resident"})
    run, training = trained(tmp_path / "run", clips)
    assert run.options["measured"]["choices"] == {**choices, "data": "resident"}
    assert "narrow" not in caplog.text
    assert training.source.name == "resident"
    run.options["measured"]["choices"]["upsample_conv"] = "narrow"
    assert "upsample_conv" not in choices_of_run(run, OPTIONS, CPU)
    # What was asked for wins, for every layer.
    for kernels in ("reference", "auto,upsample_conv=reference"):
        monkeypatch.setenv("VGLANN_KERNELS", kernels)
        assert choices_of_run(run, OPTIONS, CPU) == {"data": "resident"}


def test_options_of_the_user_and_deterministic_win(clips, tmp_path):
    keep_choices({**CHOICES, "precision": "bf16", "execution": "compile"})
    with numerics(threads=1):
        run, training = trained(tmp_path / "a", clips, given=("compile",), data="mmap", precision="fp32")
    assert run.options["measured"]["choices"].keys() == {"memory_format", "step_guard"}
    assert (training.source.name, training.precision) == ("mmap", "fp32")
    run, training = trained(tmp_path / "b", clips, deterministic=True)
    assert "measured" not in run.options
    assert not is_contiguous(training)


def test_the_names_that_options_leave_open():
    everything = {"memory_format", "precision", "data", "execution"}
    assert left_open(TrainOptions()) == everything
    assert left_open(TrainOptions(), ["compile"]) == everything - {"execution"}
    assert left_open(TrainOptions(cuda_graph="off")) == everything - {"execution"}
    assert left_open(TrainOptions(compile=True)) == everything - {"execution"}
    assert left_open(TrainOptions(deterministic=True)) == set()
    chosen = settled(TrainOptions(), {"precision": "bf16", "execution": "compile", "data": "pinned"})
    assert chosen == TrainOptions(precision="bf16", compile=True)


@pytest.mark.parametrize("here", [{"device": "Z80"}, {"torch": "1.0"}])
def test_choices_of_another_machine_are_not_taken_and_one_line_says_why(here, clips, tmp_path, caplog):
    keep_choices(CHOICES, **here)
    run, training = trained(tmp_path / "run", clips)
    assert "measured" not in run.options
    assert training.source.name == "mmap"
    (line,) = [line for line in caplog.messages if "tune.json" in line]
    assert "defaults are used" in line
    assert str(run.path) in line


@pytest.mark.parametrize("content", ["{", '{"format": "vglann-tune", "version": 9, "entries": []}'])
def test_a_bad_file_is_one_line_and_the_training_runs_by_the_defaults(content, clips, tmp_path, caplog):
    place().parent.mkdir(parents=True)
    place().write_text(content)
    run, _ = trained(tmp_path / "run", clips)
    assert "measured" not in run.options
    assert len([line for line in caplog.messages if "tune.json" in line]) == 1


@pytest.mark.parametrize(("units", "lines"), [(True, 1), (False, 0)])
def test_where_nothing_was_measured_one_line_says_what_would_if_it_matters(
    units, lines, clips, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(measured, "bfloat16_units", lambda: units)
    run, _ = trained(tmp_path / "run", clips)
    assert len([line for line in caplog.messages if f"`vglann tune {run.path}`" in line]) == lines
    caplog.clear()
    monkeypatch.setenv("VGLANN_TUNE", "off")
    trained(tmp_path / "other", clips)
    assert "vglann tune" not in caplog.text


@pytest.fixture
def run(clips, tmp_path):
    """A run whose choices are to be set."""
    made = new_run(tmp_path / "run", clips, OPTIONS)
    made.options["measured"] = {"machine": machine(CPU), "when": "today", "choices": {}}
    return made


def test_a_run_that_moved_keeps_no_choices_of_the_other_machine_but_its_precision(run, caplog):
    choices = {"data": "resident", "execution": "graph"}
    run.options["measured"]["choices"] = choices
    assert choices_of_run(run, OPTIONS, CPU) == choices
    run.options["measured"]["choices"] = {**choices, "threads": "1024"}
    assert choices_of_run(run, OPTIONS, CPU) == choices
    run.options["measured"]["machine"]["torch"] = "1.0"
    assert choices_of_run(run, OPTIONS, CPU) == {"data": "resident"}
    run.options["measured"]["machine"]["device"] = "Z80"
    assert choices_of_run(run, OPTIONS, CPU) == {}
    run.options["measured"]["choices"] = {**choices, "precision": "bf16"}
    caplog.clear()
    assert choices_of_run(run, OPTIONS, CPU) == {"precision": "bf16"}
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "another machine" in warning.message
    assert "bf16" in warning.message
    # No CPU has it.
    run.options["measured"]["choices"] = {"precision": "fp16"}
    assert choices_of_run(run, OPTIONS, CPU) == {}


def test_several_processes_take_no_choice_of_a_run_but_its_precision(run, caplog):
    run.options["measured"]["choices"] = {"data": "resident", "threads": "2", "precision": "bf16"}
    assert choices_of_run(run, OPTIONS, CPU, ranks=Ranks(0, 2)) == {"precision": "bf16"}
    assert "one process" in caplog.text


def test_a_choice_that_does_not_go_with_a_changed_option_is_dropped(run):
    run.options["measured"]["choices"] = {"execution": "compile", "data": "resident"}
    changed = replace(OPTIONS, checkpoint_activations=True)
    assert choices_of_run(run, OPTIONS, CPU) == {"execution": "compile", "data": "resident"}
    assert choices_of_run(run, changed, CPU) == {"data": "resident"}


@pytest.mark.parametrize(("kernels", "kept"), [("auto", True), ("reference", True), ("triton", False)])
def test_a_kernel_asked_for_by_name_gets_the_format_that_it_needs(kernels, kept, run, monkeypatch):
    run.options["measured"]["choices"] = {"memory_format": "contiguous"}
    monkeypatch.setenv("VGLANN_KERNELS", kernels)
    assert bool(choices_of_run(run, OPTIONS, CPU)) is kept


def test_what_a_resume_does_not_take_stays_away_and_is_recorded(clips, tmp_path):
    both, kept = {"execution": "graph", "data": "resident"}, {"data": "resident"}
    keep_choices(both)
    run, training = trained(tmp_path / "run", clips)
    for given in (["compile"], []):
        train(ClipSet.open(clips, "train"), run, resume=True, given=given)
        run = RunDir.open(run.path)
        assert run.options["measured"]["choices"] == kept
    (resume,) = run.options["resumed"]
    assert (resume["step"], resume["choices"]) == (training.step, [both, kept])


def test_the_threads_that_a_program_has_set_are_not_replaced(clips, tmp_path):
    keep_choices({"threads": "1", "data": "resident"})
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run, _ = trained(tmp_path / "run", clips)
    finally:
        torch.set_num_threads(before)
    assert run.options["measured"]["choices"] == {"data": "resident"}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"machine": {}, "choices": {"precision": "fp8"}},
        {"machine": 3, "choices": {}},
        {"choices": {}},
    ],
)
def test_damaged_choices_of_a_run_are_refused_when_it_is_opened(value, clips, tmp_path):
    run = new_run(tmp_path / "run", clips, OPTIONS)
    (run.path / "options.json").write_text(json.dumps({**run.options, "measured": value}))
    with pytest.raises(VglannError, match="measured missing or damaged"):
        RunDir.open(run.path)


@pytest.mark.parametrize("choices", [None, [{}], [{}, {"data": "moon"}], {"a": {}, "b": {}}])
def test_damaged_choices_of_a_resume_are_refused_when_the_run_is_opened(choices, run):
    resumed = [{"step": 1, "changed": {}, "environment": {}, "choices": choices}]
    (run.path / "options.json").write_text(json.dumps({**run.options, "resumed": resumed}))
    with pytest.raises(VglannError, match="resumed missing or damaged"):
        RunDir.open(run.path)


@pytest.mark.parametrize(
    "value",
    [{"threads": "0"}, {"threads": "1e3"}, {"threads": "2048"}, {"data": "moon"}, {"": "x"}, {"a": 1}, [1]],
)
def test_choices_that_nobody_could_have_made_are_refused(value):
    with pytest.raises(ValueError):
        read_choices(value)
