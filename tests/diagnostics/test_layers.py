"""Contests of single convolutions: their shapes, what is chosen, and which layer of a training takes it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import new_run, tiny_options
from tuned import AN_ENTRY, CPU
from vglann_kernels.impl import Choice, implementations, using_impl
from vglann_kernels.upsample_conv import op
from vglann_kernels.upsample_conv.op import layer_name

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.diagnostics import contenders, doctor
from vglann_fast.diagnostics import layers as layers_module
from vglann_fast.diagnostics import tune as module
from vglann_fast.diagnostics.contest import Refused, contest
from vglann_fast.diagnostics.layers import Layer, layers_of, prepare_layer
from vglann_fast.diagnostics.tune import tune
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import precision as precision_module
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.measured import as_chosen, choices_of_run
from vglann_fast.glo.train import train
from vglann_fast.glo.training import Training
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.measurements import place, read, write

OPTIONS = tiny_options("modern-2026a", width=2, epochs=1, precision="fp32", data="mmap")
# The layer in which "quick" is quick.
LAYER = "3d 8-4"


@pytest.fixture(autouse=True)
def alone(own_cache, monkeypatch):
    """A cache of its own, threads that the user has set, and few rounds: the clock is exact."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(module, "contest", partial(contest, rounds=3))
    monkeypatch.setattr(doctor, "self_test", lambda: doctor.Finding("self-test", "PASS"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("layers") / "clips", moving_squares(4, 16, 16))


# Seconds in LAYER and in other layers, and factors by which an implementation is wrong, alone and in a training step.
WAYS = {
    "reference": (1.0, 1.0, 1.0, 1.0),
    "quick": (0.1, 1.5, 1.0, 1.0),
    "hasty": (0.01, 0.01, 1.01, 1.01),
    "moody": (0.1, 1.5, 1.0, -1.0),
}


class Convolutions:
    """Implementations that move a clock, and the layers that each has computed.

    reading: seconds that a step reads clips which are not in memory.
    """

    def __init__(self, monkeypatch):
        self.now, self.reading, self.computed, self.in_step = 0.0, 0.0, [], False
        self._monkeypatch, self._plain = monkeypatch, op.IMPLEMENTATIONS["reference"]
        step = Training.train_step

        def counted(training, **given):
            self.now += 0.0 if training.source.name == "resident" else self.reading
            self.in_step = True
            try:
                return step(training, **given)
            finally:
                self.in_step = False

        monkeypatch.setattr(Training, "train_step", counted)
        self.add("reference")

    def add(self, *names):
        for name in names:
            self._monkeypatch.setitem(op.IMPLEMENTATIONS, name, partial(self._convolve, name))
            self._monkeypatch.setitem(implementations("upsample_conv"), name, lambda device: None)

    def _convolve(self, name, x, weight, *rest):
        self.computed.append((name, layer_name(weight)))
        if name not in WAYS:
            raise RuntimeError("out of resource: shared memory")
        here, elsewhere, alone, in_step = WAYS[name]
        self.now += here if layer_name(weight) == LAYER else elsewhere
        y, statistics = self._plain(x, weight, *rest)
        return (in_step if self.in_step else alone) * y, statistics

    def clock(self):
        return self.now

    def taken(self, name):
        return {layer for other, layer in self.computed if other == name}


@pytest.fixture
def convolutions(monkeypatch):
    return Convolutions(monkeypatch)


def tuned(run, convolutions):
    """Tune for a run; returns what was measured."""
    tune(run.path, name="", given={}, device=CPU, minutes=60, clock=convolutions.clock)
    (entry,) = read(place())
    return entry


@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_layers_have_the_shapes_that_the_generator_computes(variant, monkeypatch):
    shapes, plain = {}, op.IMPLEMENTATIONS["reference"]

    def spy(x, weight, bias, *rest):
        shapes[f"upsample_conv {layer_name(weight)}"] = (
            *weight.shape[:2],
            tuple(x.shape[2:]),
            bias is not None,
        )
        return plain(x, weight, bias, *rest)

    monkeypatch.setitem(op.IMPLEMENTATIONS, "reference", spy)
    generator = TwoStreamGenerator(variant, 8, 4, frames=16, size=32)
    generator(torch.randn(2, 8))
    found = layers_of(generator)
    assert {n: (v.channels, v.outputs, v.grid, v.bias) for n, v in found.items()} == shapes
    assert len(found) == 8


def test_each_layer_has_its_contest_and_a_training_takes_the_choice_for_that_layer_alone(
    clips, convolutions, tmp_path, capsys
):
    convolutions.add("quick", "hasty", "failing")
    run = new_run(tmp_path / "run", clips, OPTIONS)
    entry = tuned(run, convolutions)
    layers = {name: found for name, found in entry.contests.items() if name.startswith("upsample_conv")}
    assert len(layers) == 8
    assert {name: found.choice for name, found in layers.items() if found.choice != "reference"} == {
        f"upsample_conv {LAYER}": "quick"
    }
    found = layers[f"upsample_conv {LAYER}"]
    assert found.factors["quick"] == pytest.approx(10.0)
    assert "off float64" in found.left_out["hasty"]
    assert "out of resource" in found.left_out["failing"]
    assert entry.contests["together"].factors["choices"] == pytest.approx(8 / 7.1)

    main(["tune", "--show"])
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["quick", "100.000", "ms", "10.00", "chosen"] for line in lines)
    (line,) = [line for line in lines if line.startswith(f"measured upsample_conv {LAYER}:")]
    assert "quick (10.00 times" in line

    begun = RunDir.new(tmp_path / "begun", run.options)
    convolutions.computed.clear()
    training = train(ClipSet.open(clips, "train"), begun)
    assert (convolutions.taken("quick"), len(convolutions.taken("reference"))) == ({LAYER}, 7)
    # A resume, without what was measured.
    place().unlink()
    kept = RunDir.open(begun.path)
    for kernels, expected in (("auto", {LAYER}), ("reference", set())):
        convolutions.computed.clear()
        with using_impl(kernels), as_chosen(choices_of_run(kept, OPTIONS, CPU)):
            training.generator(torch.randn(2, OPTIONS.latent_dim))
        assert convolutions.taken("quick") == expected
        assert len(convolutions.taken("reference")) == 8 - len(expected)


def test_a_layer_that_is_wrong_in_whole_steps_costs_the_layers_choices_and_no_other(
    clips, convolutions, tmp_path, caplog
):
    convolutions.reading = 30.0
    convolutions.add("moody")
    entry = tuned(new_run(tmp_path / "run", clips, replace(OPTIONS, data="auto")), convolutions)
    name = f"upsample_conv {LAYER}"
    assert (entry.choices["data"], entry.choices[name]) == ("resident", "reference")
    assert "whole steps" in entry.contests[name].left_out["moody"]
    assert entry.contests["together"].choice == "choices"
    assert any(name in line and "differs from float32" in line for line in caplog.messages)


def by_default(monkeypatch, name):
    """Make an implementation of the convolutions the default in their contests."""
    plain = contenders.resolve

    def resolve(op, **given):
        return Choice(op, name, "a test") if op == "upsample_conv" else plain(op, **given)

    monkeypatch.setattr(contenders, "resolve", resolve)


def test_layers_whose_defaults_cannot_compute_are_not_kept_where_whole_steps_are_wrong(
    clips, convolutions, tmp_path, monkeypatch
):
    convolutions.reading = 30.0
    convolutions.add("moody", "failing")
    by_default(monkeypatch, "failing")
    write(place(), [AN_ENTRY])
    run = new_run(tmp_path / "run", clips, replace(OPTIONS, data="auto"))
    tune(run.path, name="", given={}, device=CPU, minutes=60, clock=convolutions.clock)
    other, entry = read(place())
    assert other == AN_ENTRY
    assert entry.contests.keys() == {"memory_format", "data", "together"}
    assert entry.choices["data"] == "resident"


@pytest.mark.parametrize("ends", ["no time", "killed"])
def test_choices_for_layers_do_not_count_before_whole_steps_were_checked(
    ends, clips, convolutions, tmp_path, caplog
):
    convolutions.add("quick")
    run = new_run(tmp_path / "run", clips, OPTIONS)

    def clock():
        # The layers of the background come after LAYER.
        over = any(layer.startswith("2d") for layer in convolutions.taken("quick"))
        if over and ends == "killed":
            raise KeyboardInterrupt
        return float("inf") if over else convolutions.now

    try:
        tune(run.path, name="", given={}, device=CPU, minutes=60, clock=clock)
    except KeyboardInterrupt:
        assert ends == "killed"
    else:
        assert f"upsample_conv {LAYER}" in caplog.text
    (entry,) = read(place())
    assert entry.choices == {"memory_format": "channels-last"}


def test_a_layer_whose_default_is_wrong_and_stays_ends_the_tune_and_names_the_option(
    clips, convolutions, tmp_path, monkeypatch, caplog
):
    convolutions.add("hasty")
    by_default(monkeypatch, "hasty")
    entry = tuned(new_run(tmp_path / "run", clips, OPTIONS), convolutions)
    (layer,) = entry.contests.keys() - {"memory_format"}
    assert "off float64" in entry.contests[layer].left_out["hasty"]
    (line,) = [line for line in caplog.messages if line.startswith(layer)]
    assert "--kernels auto,upsample_conv=reference" in line
    assert f"upsample_conv {LAYER}" in line


def test_kernels_are_not_tried_where_the_format_is_one_that_they_do_not_take(
    clips, convolutions, tmp_path, monkeypatch, caplog
):
    form = {True: 1.0, False: 30.0}
    step = Training.train_step

    def counted(training, **given):
        convolutions.now += form[training.generator.video.conv3.weight.is_contiguous()]
        return step(training, **given)

    monkeypatch.setattr(Training, "train_step", counted)
    convolutions.add("triton")
    entry = tuned(new_run(tmp_path / "run", clips, OPTIONS), convolutions)
    assert entry.contests["memory_format"].choice == "contiguous"
    assert entry.contests.keys() == {"memory_format", "together"}
    assert not convolutions.taken("triton")
    assert "left out" not in caplog.text


def test_at_real_sizes_the_framework_s_convolution_is_right_and_a_wrong_one_is_not(convolutions):
    layer = Layer(2, 2, (8, 16, 16), True)
    prepare_layer(layer, "reference", 15, OPTIONS, {}, CPU)
    convolutions.add("hasty")
    with pytest.raises(Refused, match=r"y: 0\.01 off"):
        prepare_layer(layer, "hasty", 15, OPTIONS, {}, CPU)


@pytest.mark.parametrize("form", ["channels-last", "contiguous"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_what_is_checked_is_computed_as_what_is_timed(form, precision, convolutions, monkeypatch):
    seen = []

    def convolve(x, weight, *rest):
        products = torch.backends.cudnn.conv.fp32_precision
        formats = x.is_contiguous(), weight.is_contiguous()
        seen.append((x.dtype, weight.dtype, formats, torch.is_autocast_enabled("cpu"), products))
        return plain(x, weight, *rest)

    plain = op.IMPLEMENTATIONS["reference"]
    convolutions.add("spied")
    monkeypatch.setitem(op.IMPLEMENTATIONS, "spied", convolve)
    monkeypatch.setattr(layers_module, "resolve_precision", lambda *given: precision)
    monkeypatch.setattr(precision_module, "resolve_precision", lambda *given: precision)
    lap = prepare_layer(Layer(2, 2, (2, 2), True), "spied", 2, OPTIONS, {"memory_format": form}, CPU)
    lap(1)
    # It was compared, warmed up and timed.
    assert len(seen) >= 3
    assert len(set(seen)) == 1
    assert seen[0][2] == (form == "contiguous",) * 2
    assert (seen[0][-1] == "tf32") == (precision == "tf32")
