"""The generator's norms and the guard by their kernels in whole training steps."""

import pytest
import torch
from tiny import new_run, tiny_options
from vglann_kernels import impl as switch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import batch_norms, recompute_batchnorm
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.memory import checkpoint_activations

KERNELS = "reference,batchnorm_relu=triton,step_guard=triton"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    return write_clip_folder(folder, moving_squares(6, frames=16, size=32))


def training_of(clips, path, **changes):
    options = tiny_options("modern", optimizer="adam", **changes)
    return new_training(ClipSet.open(clips, "train"), options, new_run(path, clips, options))


@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_steps_with_kernels_are_those_without(clips, tmp_path, variant):
    trained = {}
    for kernels in ("reference", KERNELS):
        with switch.using_impl(kernels):
            training = training_of(clips, tmp_path / kernels, variant=variant)
            losses = [training.train_step()[0].item() for _ in range(3)]
            trained[kernels] = losses, training.generator.state_dict()
    (losses, state), (kernel_losses, kernel_state) = trained.values()
    assert kernel_losses == pytest.approx(losses, rel=1e-4)
    assert list(kernel_state) == list(state)
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(kernel_state[name], value), name
        elif "running" in name:
            torch.testing.assert_close(kernel_state[name], value, rtol=1e-3, atol=1e-4)


def test_a_step_whose_loss_is_not_finite_leaves_statistics_and_weights_as_they_were(clips, tmp_path):
    with switch.using_impl(KERNELS):
        training = training_of(clips, tmp_path / "run")
        training.train_step()
        before = {name: value.clone() for name, value in training.generator.state_dict().items()}
        training.latents.rows[:] = float("nan")
        with pytest.raises(VglannError, match="not finite at step 2"):
            training.train_step()  # the last of its epoch, which looks
    assert training.guard.frozen
    assert training.guard.skip
    assert int(training.guard.step) == 1
    for name, value in training.generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def logits_and_statistics(generator, z):
    head, background = generator.logits(z)
    (head.square().mean() + background.square().mean()).backward()
    statistics = [s for norm in batch_norms(generator) for s in (norm.running_mean, norm.num_batches_tracked)]
    return [head.detach(), *(p.grad for p in generator.parameters()), *statistics]


def new_generator():
    torch.manual_seed(0)
    return TwoStreamGenerator("original", 8, 4, frames=16, size=32).channels_last().train()


def test_activation_checkpointing_changes_no_number():
    results = []
    for checkpointed in (False, True):
        generator = new_generator()
        if checkpointed:
            checkpoint_activations(generator)
        with switch.using_impl(KERNELS):
            results.append(logits_and_statistics(generator, torch.randn(3, 8, requires_grad=True)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_statistics_are_estimated_again_as_without_kernels():
    batches = list(torch.randn(3, 4, 8))
    estimated = []
    for kernels in ("reference", KERNELS):
        generator = new_generator()
        with switch.using_impl(kernels):
            recompute_batchnorm(generator, batches)
            generator.eval()
            estimated.append([*generator.state_dict().values(), *generator.logits(batches[0])])
    for plain, ours in zip(*estimated, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_a_traced_generator_trains_the_same(clips, tmp_path):
    """One graph, whose running statistics share memory with each other."""
    trained = []
    for traced in (False, True):
        with switch.using_impl(KERNELS):
            training = training_of(clips, tmp_path / str(traced))
            if traced:
                training.logits = torch.compile(training.logits, fullgraph=True, backend="aot_eager")
            losses = [training.train_step()[0] for _ in range(3)]
            trained.append([*losses, *training.generator.state_dict().values()])
    for ours, eager in zip(*trained, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
