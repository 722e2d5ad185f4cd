"""average.py: the moving average of the generator, and that a run is used from it."""

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.average import GeneratorAverage
from vglann_fast.glo.batchnorm import latent_batches, recompute_batchnorm
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.train import train


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(6))


def small_generator():
    torch.manual_seed(0)
    return TwoStreamGenerator(latent_dim=8, width=2, frames=16, size=16).channels_last()


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_it_follows_the_formula(decay):
    generator = small_generator()
    average = GeneratorAverage(generator, decay)
    expected = generator.stem.weight.detach().double()
    for step in range(1, 6):
        with torch.no_grad():
            generator.stem.weight.add_(torch.randn_like(generator.stem.weight))
        average.update(torch.tensor(step), torch.tensor(False))
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * generator.stem.weight.detach().double()
    found = average.generator.stem.weight
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    assert not found.requires_grad


def test_a_step_that_is_left_out_does_not_move_it():
    generator = small_generator()
    average = GeneratorAverage(generator, 0.9)
    before = average.generator.stem.weight.clone()
    with torch.no_grad():
        generator.stem.weight.mul_(2)
    average.update(torch.tensor(3), torch.tensor(True))
    assert torch.equal(average.generator.stem.weight, before)


def test_a_finished_run_is_used_from_the_average_with_statistics_of_its_own(clips, tmp_path):
    options = tiny_options("modern", ema=0.9)
    run = new_run(tmp_path / "run", clips, options)
    training = train(ClipSet.open(clips, "train"), run)
    trained = load_trained(run)
    averaged = training.average.generator
    for name, value in averaged.state_dict().items():
        assert torch.equal(trained.generator.state_dict()[name], value), name
    assert not torch.equal(trained.generator.stem.weight, training.generator.stem.weight)
    again = {name: value.clone() for name, value in averaged.state_dict().items()}
    recompute_batchnorm(averaged, latent_batches(training.latents.rows, options.batch_size))
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value, again[name], msg=name)


def test_a_run_that_is_not_finished_gets_statistics_when_it_is_loaded(clips, tmp_path):
    options = tiny_options("modern", ema=0.9)
    run = new_run(tmp_path / "run", clips, options)
    training = new_training(ClipSet.open(clips, "train"), options, run)
    training.loop(max_steps=5)
    trained = load_trained(run)
    expected = training.average.generator
    recompute_batchnorm(expected, latent_batches(training.latents.rows, options.batch_size))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trained.generator.state_dict()[name], value, msg=name)


def test_training_with_an_average_is_the_training_without(clips, tmp_path):
    parts = []
    for ema in (0.0, 0.9):
        run = new_run(tmp_path / str(ema), clips, tiny_options("modern", ema=ema))
        train(ClipSet.open(clips, "train"), run)
        parts.append(run.checkpoints.load()[1])
    assert "average" not in parts[0]
    for part, found in parts[0].items():
        assert all(torch.equal(value, parts[1][part][name]) for name, value in found.items()), part
