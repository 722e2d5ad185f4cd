"""The kernels of row-sparse Adam in the interpreter, and a twin training."""

import pytest
import torch
from counted import Traffic, poisoned
from vglann_kernels import (
    composite_laplacian_loss,
    latent_adam_state,
    latent_adam_step,
    latent_flush,
    latent_gather,
    verify,
)
from vglann_kernels.latent_adam import kernel


def test_against_float64():
    for line in verify.latent_adam(verify.Shapes(batch=5, device="cpu")):
        assert line.ok, str(line)


def test_lazy_follows_torch_adam():
    torch.manual_seed(0)
    table, lr = torch.randn(12, 5) / 10, torch.tensor(0.01)
    theirs = torch.nn.Parameter(table.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.5, 0.999))
    state = latent_adam_state(table, "lazy")
    for step in range(24):
        index, grad = torch.randint(0, 12, (3,)), torch.randn(3, 5)
        z = latent_gather(table, state, index, lr=lr, impl="triton")
        torch.testing.assert_close(z, theirs.detach()[index], rtol=0, atol=5e-7)
        theirs.grad = torch.zeros_like(theirs).index_add_(0, index, grad)
        optimizer.step()
        latent_adam_step(table, state, index, grad, lr=lr, impl="triton")
        if step == 12:
            latent_flush(table, state, lr=lr, impl="triton")
            lr, optimizer.param_groups[0]["lr"] = lr / 2, 0.005
    latent_flush(table, state, lr=lr, impl="triton")
    torch.testing.assert_close(table, theirs.detach(), rtol=0, atol=5e-7)
    assert state.arrived == 0
    assert state.step == 24


@pytest.mark.parametrize("mode", ["sparse", "lazy", "dense"])
def test_skip_and_duplicates_and_untouched_rows(mode):
    torch.manual_seed(0)
    table, index = torch.randn(9, 3), torch.tensor([4, 4, 2, 4])
    state, before, lr = latent_adam_state(table, mode), table.clone(), torch.tensor(0.1)
    latent_adam_step(table, state, index, torch.ones(4, 3), lr=lr, skip=torch.tensor(True), impl="triton")
    assert torch.equal(table, before)
    assert not any(x.any() for x in state.tensors().values())
    expected, theirs = before.clone(), latent_adam_state(before, mode)
    grad = torch.randn(4, 3).bfloat16()
    latent_adam_step(table, state, index, grad, lr=lr, skip=torch.tensor(False), impl="triton")
    latent_adam_step(expected, theirs, index, grad, lr=lr, impl="reference")
    torch.testing.assert_close(table, expected)
    assert torch.equal(table[[0, 1, 3, 5, 6, 7, 8]], before[[0, 1, 3, 5, 6, 7, 8]])
    assert torch.equal(state.row_step, theirs.row_step)


@pytest.mark.parametrize("compared", [2, 4, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_duplicates_wherever_they_lie_in_a_batch(compared, dtype, monkeypatch):
    """Many times the same row, in one block of compared places and across several; the rest of the table is NaN."""
    monkeypatch.setattr(kernel, "MAX_COMPARED", compared)
    torch.manual_seed(0)
    index = torch.tensor([7, 1, 7, 3, 3, 7, 1, 5, 7, 0, 7])
    grad = torch.randn(len(index), 5).to(dtype)
    table = torch.full((9, 5), float("nan"))
    table[index] = torch.randn(9, 5)[index]
    exact, state = table.double(), latent_adam_state(table)
    reference = latent_adam_state(exact)
    lr = torch.tensor(0.1)
    for _ in range(2):
        latent_adam_step(table, state, index, grad, lr=lr, retraction="sphere", impl="triton")
        latent_adam_step(exact, reference, index, grad, lr=lr, retraction="sphere", impl="reference")
    torch.testing.assert_close(table.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(state.exp_avg.double(), reference.exp_avg, rtol=1e-5, atol=1e-7)
    assert torch.equal(state.row_step, reference.row_step)


def test_a_bad_index_that_nobody_checked_is_masked():
    table = torch.randn(4, 3)
    state, before, bad = latent_adam_state(table, "sparse"), table.clone(), torch.tensor([1, 2**40, -3])
    op = torch.ops.vglann_kernels
    tables = (table, state.exp_avg, state.exp_avg_sq, state.row_step, state.step)
    read = op.latent_gather(*tables, bad, None, (0.5, 0.999), 1e-8, False)
    assert read.isnan().all(dim=1).tolist() == [False, True, True]
    op.latent_adam_step(
        *tables,
        state.arrived,
        bad,
        torch.ones(3, 3),
        torch.tensor(0.1),
        (0.5, 0.999),
        1e-8,
        "sparse",
        None,
        None,
    )
    assert (table != before).any(dim=1).tolist() == [False, True, False, False]


def test_a_step_touches_the_batch_and_no_more():
    table = torch.randn(1000, 100)
    state, index = latent_adam_state(table, "sparse"), torch.arange(8) * 100
    with poisoned(), Traffic() as moved:
        latent_adam_step(table, state, index, torch.randn(8, 100), lr=torch.tensor(0.1), impl="triton")
    assert moved.unique <= 1.05 * 8 * (100 * 4 * 7 + 8 * 3)


def test_opcheck():
    table = torch.randn(6, 3)
    state, index = latent_adam_state(table, "lazy"), torch.tensor([1, 4])
    tables = (table, state.exp_avg, state.exp_avg_sq, state.row_step, state.step)
    rates, op = ((0.5, 0.999), 1e-8), torch.ops.vglann_kernels
    lr = torch.tensor(0.1)
    torch.library.opcheck(op.latent_gather.default, (*tables, index, lr, *rates, True))
    step = (*tables, state.arrived, index, torch.ones(2, 3), lr, *rates, "lazy", None, None)
    torch.library.opcheck(op.latent_adam_step.default, step)
    torch.library.opcheck(op.latent_flush.default, (*tables, lr, *rates))


@pytest.mark.parametrize("mode", ["sparse", "lazy", "dense"])
def test_traces_into_one_graph(mode):
    torch.manual_seed(0)
    index, lr = torch.tensor([1, 4, 1]), torch.tensor(0.1)
    start, grad = torch.randn(6, 3), torch.randn(3, 3)

    def two_steps(table, state):
        for _ in range(2):
            z = latent_gather(table, state, index, lr=lr, impl="triton")
            latent_adam_step(table, state, index, grad + z, lr=lr, impl="triton")
        return table

    tables = []
    for function in (two_steps, torch.compile(two_steps, fullgraph=True, backend="aot_eager")):
        table = start.clone()
        tables.append(function(table, latent_adam_state(table, mode)))
    assert not torch.equal(tables[0], start)
    torch.testing.assert_close(*tables)


def test_twin_training():
    """4 steps of a tiny generator, all ops by kernel and all by reference: the same losses, latents, weights."""
    torch.manual_seed(0)
    clips = torch.randint(0, 256, (4, 3, 1, 32, 32), dtype=torch.uint8)
    start, weights = torch.nn.functional.normalize(torch.randn(4, 6)), torch.randn(6, 7 * 64) / 3
    batches = [torch.randint(0, 4, (2,)) for _ in range(4)]
    runs = {}
    for impl in ("triton", "reference"):
        table, w = start.clone(), weights.clone().requires_grad_()
        state, losses = latent_adam_state(table, "sparse"), []
        for index in batches:
            z = latent_gather(table, state, index, impl=impl).requires_grad_()
            small = (z @ w).view(2, 7, 1, 8, 8)
            large = small.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
            loss = composite_laplacian_loss(
                large[:, :4], large[:, 4:, 0], clips, index, mask_weight=0.1, impl=impl
            )
            loss.backward()
            latent_adam_step(
                table, state, index, z.grad, lr=torch.tensor(0.01), retraction="sphere", impl=impl
            )
            with torch.no_grad():
                w -= 20 * w.grad
            w.grad = None
            losses.append(loss.item())
        runs[impl] = torch.tensor(losses), table, w.detach()
    for ours, theirs in zip(runs["triton"], runs["reference"], strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert runs["triton"][0][-1] < runs["triton"][0][0]
