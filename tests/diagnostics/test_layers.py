"""Contests of single convolutions: their shapes, what is chosen, and which layer of a training takes it."""

from functools import partial

import pytest
import torch
from tiny import new_run, tiny_options
from vglann_kernels.impl import implementations, using_impl
from vglann_kernels.upsample_conv import op
from vglann_kernels.upsample_conv.op import layer_of

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.diagnostics import doctor
from vglann_fast.diagnostics import tune as module
from vglann_fast.diagnostics.contest import contest
from vglann_fast.diagnostics.layers import layers_of
from vglann_fast.diagnostics.tune import tune
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.measured import as_chosen, choices_of_run
from vglann_fast.glo.train import train
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.measurements import place, read

CPU = torch.device("cpu")
OPTIONS = tiny_options("modern-2026a", width=2, epochs=1, precision="fp32", data="mmap")
# The layer in which "quick" is quick.
LAYER = "3d 8-4"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, threads that the user has set, and few rounds: the clock is exact."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VGLANN_TUNE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(module, "contest", partial(contest, rounds=3))
    monkeypatch.setattr(doctor, "self_test", lambda: doctor.Finding("self-test", "PASS"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("layers") / "clips", moving_squares(4, 16, 16))


class Convolutions:
    """Implementations that move a clock, and the layers that each has computed."""

    def __init__(self, monkeypatch):
        self.now, self.computed = 0.0, []
        plain = op.IMPLEMENTATIONS["reference"]

        def add(name, seconds, factor=1.0):
            def convolve(x, weight, *rest):
                self.now += seconds(layer_of(weight))
                self.computed.append((name, layer_of(weight)))
                y, statistics = plain(x, weight, *rest)
                return factor * y, statistics

            monkeypatch.setitem(op.IMPLEMENTATIONS, name, convolve)
            monkeypatch.setitem(implementations("upsample_conv"), name, lambda device: None)

        def fail(*given):
            raise RuntimeError("an illegal memory access")

        add("reference", lambda layer: 1.0)
        add("quick", lambda layer: 0.1 if layer == LAYER else 1.5)
        add("hasty", lambda layer: 0.01, factor=1.01)
        add("failing", lambda layer: 0.0)
        monkeypatch.setitem(op.IMPLEMENTATIONS, "failing", fail)

    def clock(self):
        return self.now

    def taken(self, name):
        return {layer for other, layer in self.computed if other == name}


@pytest.fixture
def convolutions(monkeypatch):
    return Convolutions(monkeypatch)


@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_layers_have_the_shapes_that_the_generator_computes(variant, monkeypatch):
    shapes, plain = {}, op.IMPLEMENTATIONS["reference"]

    def spy(x, weight, bias, *rest):
        shapes[f"upsample_conv {layer_of(weight)}"] = (
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
    run = new_run(tmp_path / "run", clips, OPTIONS)
    tune(run.path, name="", given={}, device=CPU, minutes=60, clock=convolutions.clock)
    (entry,) = read(place())
    layers = {name: found for name, found in entry.contests.items() if name.startswith("upsample_conv")}
    assert len(layers) == 8
    assert {name: found.choice for name, found in layers.items() if found.choice != "reference"} == {
        f"upsample_conv {LAYER}": "quick"
    }
    found = layers[f"upsample_conv {LAYER}"]
    assert found.factors["quick"] == pytest.approx(10.0)
    assert "off float64" in found.left_out["hasty"]
    assert "illegal memory access" in found.left_out["failing"]
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
