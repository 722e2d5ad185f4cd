"""muon.py: orthogonal updates against their definition in float64, and what an update leaves alone."""

import pytest
import torch

from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.muon import COEFFICIENTS, STEPS, Muon, matrix_parameters, orthogonalized

SHAPES = [(8, 4, 4, 4), (16, 8, 4, 4, 4), (8, 2, 4, 4, 4), (2, 1, 4, 4)]


def weights_like(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def as_matrix(weight):
    return weight.flatten(1).double()


def polar_factor(matrix):
    """(M M^T)^(-1/2) M, the orthogonal matrix nearest to M."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T @ matrix


def newton_schulz(matrix):
    """The iteration as Jordan et al. write it, on the whole matrix."""
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_iterations_on_gram_matrices_are_those_on_the_whole_matrix():
    weights = weights_like(SHAPES)
    for weight, found in zip(weights, orthogonalized(weights), strict=True):
        assert found.shape == weight.shape
        torch.testing.assert_close(as_matrix(found), newton_schulz(as_matrix(weight)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_the_result_is_close_to_the_polar_factor_whatever_the_scale(scale):
    for weight, found in zip(
        weights_like(SHAPES), orthogonalized([scale * w for w in weights_like(SHAPES)]), strict=True
    ):
        nearest, ours = polar_factor(as_matrix(weight)), as_matrix(found)
        assert (nearest * ours).sum() / (nearest.norm() * ours.norm()) > 0.97
        assert ours.norm().item() == pytest.approx(nearest.norm().item(), rel=0.3)


def test_a_memory_format_changes_nothing_but_rounding():
    (plain,) = weights_like([(8, 4, 4, 4, 4)])
    (found,) = orthogonalized([plain])
    (other,) = orthogonalized([plain.contiguous(memory_format=torch.channels_last_3d)])
    torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-4)


def test_a_gradient_of_zeros_gives_no_update():
    (found,) = orthogonalized([torch.zeros(8, 4, 4, 4)])
    assert torch.equal(found, torch.zeros(8, 4, 4, 4))


def test_it_trains_the_transposed_convolutions_of_both_streams_without_heads():
    names = matrix_parameters(TwoStreamGenerator(width=2, frames=16, size=16))
    assert set(names) == {f"{s}.conv{i}.weight" for s in ("video", "background") for i in (2, 3, 4)}


def muon_with_gradients(seed=0):
    weights = {f"w{i}": weight.requires_grad_() for i, weight in enumerate(weights_like(SHAPES))}
    for weight, gradient in zip(weights.values(), weights_like(SHAPES, seed=seed + 1), strict=True):
        weight.grad = gradient
    return weights, Muon(weights, 0.01)


def test_two_updates_follow_the_formula():
    weights, muon = muon_with_gradients()
    expected = {name: weight.detach().double() for name, weight in weights.items()}
    momentum = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for _ in range(2):
        for name, weight in weights.items():
            momentum[name] = 0.9 * momentum[name] + 0.1 * weight.grad.double()
            ahead = (0.9 * momentum[name] + 0.1 * weight.grad.double()).flatten(1)
            update = newton_schulz(ahead).view(weight.shape)
            expected[name] -= 0.01 * 0.2 * ahead.shape[1] ** 0.5 * update
        muon.step(torch.tensor(False))
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach().double(), expected[name], atol=1e-5, rtol=1e-4)


def test_an_update_has_a_fifth_of_the_rate_as_its_root_mean_square():
    weights, muon = muon_with_gradients()
    before = [weight.detach().clone() for weight in weights.values()]
    muon.lr.fill_(0.5)
    muon.step(torch.tensor(False))
    for old, new in zip(before, weights.values(), strict=True):
        assert (new - old).square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.35)


def test_a_step_that_is_left_out_changes_nothing_even_if_gradients_are_nan():
    weights, muon = muon_with_gradients()
    muon.step(torch.tensor(False))
    before = [tensor.detach().clone() for tensor in (*weights.values(), *muon.tensors().values())]
    for weight in weights.values():
        weight.grad.fill_(float("nan"))
    muon.step(torch.tensor(True))
    after = (*weights.values(), *muon.tensors().values())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_parameters_without_gradients_stay_and_keep_their_momentum():
    weights, muon = muon_with_gradients()
    muon.step(torch.tensor(False))
    weights["w1"].grad = None
    before = weights["w1"].detach().clone(), muon.momentum["w1"].clone(), weights["w0"].detach().clone()
    muon.step(torch.tensor(False))
    assert torch.equal(weights["w1"], before[0])
    assert torch.equal(muon.momentum["w1"], before[1])
    assert not torch.equal(weights["w0"], before[2])
