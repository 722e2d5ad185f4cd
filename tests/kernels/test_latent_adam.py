"""Adam over a table of latents: each mode against torch.optim.Adam, and what is refused."""

import pytest
import torch
from vglann_kernels import latent_adam_state, latent_adam_step, latent_flush, latent_gather

BETAS = (0.5, 0.999)


def batches(steps, rows=30, width=7, batch=6, dtype=torch.float64, seed=0):
    """(index, gradient) pairs; duplicates occur, and gradients of very different sizes."""
    torch.manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(0, rows, (batch,))
        yield index, torch.randn(batch, width, dtype=dtype) * 10 ** torch.randn(batch, 1, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-7)])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_dense_and_lazy_follow_torch_adam(mode, dtype, tolerance):
    table = torch.randn(30, 7, dtype=torch.float64).to(dtype) / 10
    theirs = torch.nn.Parameter(table.clone())
    rates = {"betas": BETAS, "eps": 1e-8}
    optimizer = torch.optim.Adam([theirs], lr=0.01, **rates)
    state, lr = latent_adam_state(table, mode), torch.tensor(0.01, dtype=dtype)
    for step, (index, grad) in enumerate(batches(300, dtype=dtype)):
        z = latent_gather(table, state, index, lr=lr, **rates)
        torch.testing.assert_close(z, theirs.detach()[index], rtol=0, atol=tolerance)
        theirs.grad = torch.zeros_like(theirs).index_add_(0, index, grad)
        optimizer.step()
        latent_adam_step(table, state, index, grad, lr=lr, **rates)
        if step in (90, 200):  # the learning rate changes
            latent_flush(table, state, lr=lr, **rates)
            lr = lr * 0.5
            optimizer.param_groups[0]["lr"] = lr.item()
    latent_flush(table, state, lr=lr, **rates)
    torch.testing.assert_close(table, theirs.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_lazy_with_other_betas(beta1):
    table = torch.randn(30, 7, dtype=torch.float64)
    dense, lr, rates = table.clone(), torch.tensor(0.01, dtype=torch.float64), {"betas": (beta1, 0.99)}
    states = latent_adam_state(table, "lazy"), latent_adam_state(dense, "dense")
    for index, grad in batches(30):
        for latents, state in zip((table, dense), states, strict=True):
            latent_adam_step(latents, state, index, grad, lr=lr, **rates)
    latent_flush(table, states[0], lr=lr, **rates)
    torch.testing.assert_close(table, dense, rtol=0, atol=1e-14)


def test_a_row_visited_t_times_equals_torch_adam_on_that_row_alone():
    table = torch.randn(30, 7, dtype=torch.float64)
    before = table.clone()
    state, lr = latent_adam_state(table, "sparse"), torch.tensor(0.01, dtype=torch.float64)
    alone = {row: torch.nn.Parameter(before[row].clone()) for row in range(25)}
    optimizers = {row: torch.optim.Adam([p], lr=0.01, betas=BETAS) for row, p in alone.items()}
    visits = torch.zeros(30, dtype=torch.int64)
    for index, grad in batches(60, rows=25):
        latent_adam_step(table, state, index, grad, lr=lr, betas=BETAS, retraction=None)
        for row in index.unique().tolist():
            alone[row].grad = grad[index == row].sum(dim=0)
            optimizers[row].step()
            visits[row] += 1
    for row, parameter in alone.items():
        torch.testing.assert_close(table[row], parameter.detach(), rtol=0, atol=1e-14)
    assert torch.equal(table[25:], before[25:])  # bit for bit: never in a batch
    assert torch.equal(state.row_step, visits)


def test_retractions():
    for retraction, norms in (("sphere", torch.ones(4)), ("ball", torch.tensor([0.3, 0.9, 1.0, 1.0]))):
        table = torch.nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64)) * torch.tensor(
            [[0.3], [0.9], [1], [4]]
        )
        state, none = latent_adam_state(table, "sparse"), torch.zeros(4, 5, dtype=torch.float64)
        lr = torch.tensor(0.01, dtype=torch.float64)
        latent_adam_step(table, state, torch.arange(4), none, lr=lr, retraction=retraction)
        torch.testing.assert_close(table.norm(dim=1), norms.double())


@pytest.mark.parametrize("mode", ["sparse", "lazy", "dense"])
def test_a_skipped_step_changes_nothing_at_all(mode):
    table, lr = torch.randn(30, 7), torch.tensor(0.01)
    state = latent_adam_state(table, mode)
    (index, grad), (other, _) = batches(2, dtype=torch.float32)
    latent_adam_step(table, state, index, grad, lr=lr, skip=torch.tensor(False))
    before = [x.clone() for x in (table, *state.tensors().values())]
    latent_adam_step(table, state, other, grad * float("nan"), lr=lr, skip=torch.tensor(True))
    for now, then in zip((table, *state.tensors().values()), before, strict=True):
        assert torch.equal(now, then)


def test_a_bad_gradient_stays_in_its_row():
    table, lr = torch.randn(5, 3), torch.tensor(0.01)
    state = latent_adam_state(table, "sparse")
    grad = torch.tensor([[float("nan")] * 3, [1.0] * 3])
    latent_adam_step(table, state, torch.tensor([4, 2]), grad, lr=lr)
    assert table[4].isnan().all()
    assert table[:4].isfinite().all()


@pytest.mark.parametrize("mode", ["sparse", "lazy", "dense"])
def test_resuming_from_a_checkpoint_is_exact(mode):
    def run(table, state, pairs):
        for index, grad in pairs:
            latent_adam_step(table, state, index, grad, lr=torch.tensor(0.01, dtype=table.dtype))

    pairs = list(batches(10))
    straight = torch.randn(30, 7, dtype=torch.float64)
    resumed = straight.clone()
    run(straight, latent_adam_state(straight, mode), pairs)
    first = latent_adam_state(resumed, mode)
    run(resumed, first, pairs[:5])
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second = latent_adam_state(resumed, mode)
    second.load(saved)
    run(resumed, second, pairs[5:])
    assert torch.equal(straight, resumed)
    with pytest.raises(ValueError, match="'row_step' is missing"):
        second.load({name: saved[name] for name in ("exp_avg", "exp_avg_sq", "step")})
    with pytest.raises(ValueError, match=r"exp_avg: expected shape \(30, 7\), got \(7, 30\)"):
        second.load({**saved, "exp_avg": saved["exp_avg"].T})


def test_an_empty_batch():
    table, nothing = torch.randn(5, 3), torch.zeros(0, dtype=torch.int64)
    state = latent_adam_state(table, "lazy")
    latent_adam_step(table, state, nothing, torch.zeros(0, 3), lr=torch.tensor(0.1))
    assert state.step == 1
    assert latent_gather(table, state, nothing, lr=torch.tensor(0.1)).shape == (0, 3)


def good(**changes):
    table = torch.zeros(5, 3)
    arguments = {
        "latents": table, "state": latent_adam_state(table, "sparse"), "index": torch.tensor([1, 2]),
        "grad": torch.zeros(2, 3), "lr": torch.tensor(0.1),
    }  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"index": torch.tensor([1, 5])},
            ValueError,
            r"index: expected values in \[0, 5\), got values from 1 to 5",
        ),
        ({"index": torch.tensor([-1, 2])}, ValueError, "got values from -1 to 2"),
        ({"index": torch.tensor([1, 2]).int()}, TypeError, "index: expected int64, got int32"),
        ({"grad": torch.zeros(3, 3)}, ValueError, r"grad: expected shape \(2, 3\), got \(3, 3\)"),
        ({"lr": 0.1}, TypeError, "lr: expected a tensor, got float"),
        ({"lr": torch.zeros(1)}, ValueError, r"lr: expected shape \(\), got \(1,\)"),
        ({"latents": torch.zeros(6, 3)}, ValueError, r"latents: expected shape \(5, 3\), got \(6, 3\)"),
        ({"betas": (1.0, 0.9)}, ValueError, "betas: expected"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number"),
        ({"mode": "dense"}, ValueError, "mode: the state was made for 'sparse', got 'dense'"),
        ({"retraction": "cube"}, ValueError, "retraction: expected"),
        ({"skip": torch.tensor(1)}, TypeError, "skip: expected bool, got int64"),
    ],
)
def test_bad_input_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        latent_adam_step(**good(**changes))


def test_lazy_refuses_what_it_cannot_do():
    state = latent_adam_state(torch.zeros(5, 3), "lazy")
    with pytest.raises(ValueError, match="retraction: only in sparse mode"):
        latent_adam_step(**good(state=state, retraction="sphere"))
    with pytest.raises(ValueError, match="series to converge"):
        latent_adam_step(**good(state=state, betas=(0.99, 0.9)))
    with pytest.raises(ValueError, match="lr: latent_gather needs it"):
        latent_gather(torch.zeros(5, 3), state, torch.tensor([1]))
    with pytest.raises(ValueError, match="mode: expected one of"):
        latent_adam_state(torch.zeros(5, 3), "rows")
