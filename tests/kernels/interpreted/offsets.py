"""Offsets of more than 2^31 elements, kernel by kernel, in the interpreter.

Tables are reserved at their full size and only their ends are written, so they take no memory; only the programs
of the ends run. An offset that wraps around at 32 bits misses them, or the process. `laplacian` takes strides and has
a probe in its own file; `select`, and the dense and flushing steps of `latent_adam`, read whole tables: not probed.
"""

from contextlib import contextmanager

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from vglann_kernels import latent_adam_state, latent_adam_step, latent_gather
from vglann_kernels.batchnorm_relu import kernel as batchnorm_relu
from vglann_kernels.composite import kernel as composite
from vglann_kernels.composite_laplacian import kernel as composite_laplacian
from vglann_kernels.laplacian.pyramid import Pyramid
from vglann_kernels.latent_adam.state import LatentAdamState
from vglann_kernels.nearest import kernel as nearest
from vglann_kernels.nearest.tiles import scan_options
from vglann_kernels.upsample_conv import kernel as upsample_conv
from vglann_kernels.upsample_conv import weight_gradient as upsample_conv_weights
from vglann_kernels.upsample_conv.tiles import weight_gradient_tiles

FAR = 2**31


@contextmanager
def only(module, name, grid, first):
    """Launches of a kernel run `grid` programs, numbered from `first`, instead of all."""
    kernel, plain = getattr(module, name), InterpreterBuilder.create_get_program_id

    class Launched:
        def __getitem__(self, _):
            return kernel[grid]

    def shifted(builder, axis):
        handle = plain(builder, axis)
        return TensorHandle(handle.data + handle.data.dtype.type(first[axis]), handle.dtype)

    setattr(module, name, Launched())
    InterpreterBuilder.create_get_program_id = shifted
    try:
        yield
    finally:
        setattr(module, name, kernel)
        InterpreterBuilder.create_get_program_id = plain


def ending_with(rows, count, dtype=None):
    """A table of `count` rows of which only the last are written, with `rows`."""
    table = torch.empty(count, *rows.shape[1:], dtype=dtype or rows.dtype)
    table[-len(rows) :] = rows
    return table


def test_composite():
    torch.manual_seed(0)
    batch = FAR // (4 * 32 * 32) + 2
    head, background = torch.randn(1, 4, 1, 32, 32).half(), torch.randn(1, 3, 32, 32).half()
    upstream, mean = torch.randn(1, 3, 1, 32, 32).half(), torch.randn(1)
    far_head, far_background = ending_with(head, batch), ending_with(background, batch)
    with only(composite, "_composite_fwd_kernel", (2, 1, 1), (0, 0, batch - 1)):
        video, _ = composite.composite_fwd(far_head, far_background)
    assert torch.equal(video[-1:], composite.composite_fwd(head, background)[0])
    with only(composite, "_composite_bwd_kernel", (2, 1, 1), (0, 0, batch - 1)):
        far = composite.composite_bwd(
            far_head, far_background, ending_with(upstream, batch), ending_with(mean, batch)
        )
    for ours, near in zip(far, composite.composite_bwd(head, background, upstream, mean), strict=True):
        assert torch.equal(ours[-1:], near)


def test_sums_of_parts():
    torch.manual_seed(0)
    batch = FAR // (3 * 32 * 32) + 2
    partials, background = torch.randn(1, 1, 3, 32, 32), torch.empty(1, 3, 32, 32)
    far_partials, far_background = ending_with(partials, batch), torch.empty(batch, 3, 32, 32)
    with only(composite, "_sum_parts_kernel", (1, 3, 1), (0, 0, batch - 1)):
        far = composite.sum_parts(far_partials, far_background)
    assert torch.equal(far[-1:], composite.sum_parts(partials, background))


def test_composite_laplacian(monkeypatch):
    """The last frames of the last video, and the last clip of the table."""
    torch.manual_seed(0)
    frames, batch = 64, FAR // (4 * 64 * 32 * 32) + 2
    count = FAR // (3 * 64 * 32 * 32) + 2
    head, background = torch.randn(1, 4, frames, 32, 32).half(), torch.randn(1, 3, 32, 32).half()
    clip = torch.randint(0, 256, (1, 3, frames, 32, 32), dtype=torch.uint8)
    options = Pyramid(3, "binomial", 2.0, (1.0,) * 4, (-1.0, 1.0), "none")
    rest = (frames, 0.1, options, 1.0, True, False)
    monkeypatch.setattr(composite_laplacian, "frames_of_a_program", lambda *_: 4)
    name, groups = "_composite_laplacian_kernel", frames // 4
    with only(composite_laplacian, name, (1, 1), (groups - 1, 0)):
        near = composite_laplacian.composite_laplacian_fwd(head, background, clip, torch.tensor([0]), *rest)
    index = ending_with(torch.tensor([count - 1]), batch)
    with only(composite_laplacian, name, (1, 1), (groups - 1, batch - 1)):
        far = composite_laplacian.composite_laplacian_fwd(
            ending_with(head, batch), ending_with(background, batch), ending_with(clip, count), index, *rest
        )
    # Loss by plane and gradient by the logits; those by the background are summed by another kernel, see below.
    for ours, exact in zip(far[:2], near[:2], strict=True):
        assert torch.equal(ours[-1, :, -4:], exact[0, :, -4:])
    assert near[1][0, :, -4:].any()


def test_sums_of_composite_laplacian():
    torch.manual_seed(0)
    batch = FAR // (4 * 32 * 32) + 2
    scratch, losses, masks = torch.randn(1, 1, 4, 1024), torch.randn(3), torch.randn(1)
    options = {"AREA": 1024, "WITH_GRAD": True, "BLOCK": 1024}

    def sums(x, grid):
        gradient, loss = torch.empty(len(x), 3, 1024), torch.empty(())
        launch = composite_laplacian._sums_kernel[grid]
        launch(x, losses, masks, gradient, loss, 1, 3, 1, 0.5, 0.5, 1024, 1, **options)
        return gradient[-1]

    far = ending_with(scratch, batch)
    near = sums(scratch, (1, 3, 1))
    with only(composite_laplacian, "_sums_kernel", (1, 3, 1), (0, 0, batch - 1)):
        assert torch.equal(sums(far, None), near)
    assert torch.equal(near, scratch[0, 0, :3])


def test_batchnorm_relu(monkeypatch):
    """As many programs as x has tiles of rows; the one with the last tile runs."""
    torch.manual_seed(0)
    channels, tile = 64, 256
    count = FAR // (tile * channels) + 2
    monkeypatch.setattr(batchnorm_relu, "STATISTICS_TILE", tile * channels)
    monkeypatch.setattr(batchnorm_relu, "FORWARD_TILE", tile * channels // 2)
    monkeypatch.setattr(batchnorm_relu, "GRADIENT_TILE", tile * channels)
    # For x as many as tiles, else one.
    monkeypatch.setattr(
        batchnorm_relu, "parts_of", lambda values: max(1, values.numel() // (tile * channels))
    )
    near, near_grad = torch.randn(2, tile, channels, 1, 1).half()
    x, grad = (ending_with(value, count * tile) for value in (near, near_grad))
    weight, bias = torch.rand(channels), torch.randn(channels)
    with only(batchnorm_relu, "_statistics_kernel", (1, 1), (0, count - 1)):
        partials = batchnorm_relu.statistics(x)[-1:].clone()
    torch.testing.assert_close(partials[0, 0], near.float().mean(0).flatten(), rtol=1e-4, atol=1e-6)
    running = (torch.zeros(channels), torch.ones(channels), None)
    with only(batchnorm_relu, "_forward_kernel", (1, 2), (0, 2 * count - 2)):
        y = batchnorm_relu.forward(x, weight, bias, None, *running, 1, False, 0.1, 1e-5)[0]
    expected, mean, invstd = batchnorm_relu.forward(near, weight, bias, None, *running, 1, False, 0.1, 1e-5)
    assert torch.equal(y[-tile:], expected)
    saved = (weight, bias, mean, invstd)
    with only(batchnorm_relu, "_gradient_sums_kernel", (1, 1), (0, count - 1)):
        sums = batchnorm_relu.gradient_sums(x, grad, *saved)[-1:].clone()
    with only(batchnorm_relu, "_backward_kernel", (1, 1), (0, count - 1)):
        grad_x = batchnorm_relu.backward(x, grad, *saved, sums, 1, True)[0]
    near_sums = batchnorm_relu.gradient_sums(near, near_grad, *saved)
    assert torch.equal(sums, near_sums)
    # Of all rows of x; only the last tile adds to the sums.
    mask = expected > 0
    masked = near_grad.float() * mask
    normalized = (near.float() - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
    plain, product = (value.view(1, -1, 1, 1) / len(x) for value in near_sums[0])
    exact = (masked - plain - normalized * product) * (weight * invstd).view(1, -1, 1, 1)
    torch.testing.assert_close(grad_x[-tile:].float(), exact, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["sparse", "lazy"])
def test_latent_adam(mode):
    torch.manual_seed(0)
    rows, count = torch.randn(2, 128), FAR // 128 + 2
    index, grad, lr = torch.tensor([0, 1]), torch.randn(2, 128), torch.tensor(0.1)
    near, small = rows.clone(), latent_adam_state(rows, mode)
    table = ending_with(rows, count)
    tables = {name: ending_with(x, count) for name, x in small.tensors().items() if x.ndim}
    state = LatentAdamState(mode=mode, **tables, step=small.step.clone(), arrived=small.arrived.clone())
    for _ in range(2):
        latent_adam_step(near, small, index, grad, lr=lr, impl="triton")
        latent_adam_step(table, state, index + count - 2, grad, lr=lr, impl="triton")
        read = latent_gather(table, state, index + count - 2, lr=lr, impl="triton")
        assert torch.equal(read, latent_gather(near, small, index, lr=lr, impl="triton"))
    assert torch.equal(table[-2:], near)
    assert not torch.equal(near, rows)


def test_upsample_conv():
    """The last 8 of many images, which are one tile; of the weights' gradient the last share of the positions."""
    torch.manual_seed(0)

    def last(values):
        return values.contiguous(memory_format=torch.channels_last)

    def far(values, count):
        table = torch.empty(count, *values.shape[1:], dtype=values.dtype, memory_format=torch.channels_last)
        table[-len(values) :] = values
        return table

    count = FAR // (16 * 64) + 8
    x, upstream = (last(torch.randn(8, n, k, k).half()) for n, k in ((64, 4), (16, 8)))
    weight = last(torch.randn(64, 16, 4, 4).half())
    far_x, far_upstream = far(x, count), far(upstream, count)
    tile = count * 16 // 128 - 1
    with only(upsample_conv, "_forward_kernel", (4, 1), (4 * tile, 0)):
        y, _ = upsample_conv.forward(far_x, weight, None, None, None, False)
    assert torch.equal(y[-8:], upsample_conv.forward(x, weight, None, None, None, False)[0])
    with only(upsample_conv, "_input_gradient_kernel", (1, 1), (tile, 0)):
        grad_x, _ = upsample_conv.input_gradient(far_upstream, weight, far_x, None, None)
    assert torch.equal(grad_x[-8:], upsample_conv.input_gradient(upstream, weight, x, None, None)[0])
    options = weight_gradient_tiles(2, 64, 16, False)
    found = []
    for images, gradient, shares in ((x, upstream, 1), (far_x, far_upstream, 2)):
        partials, positions = torch.empty(2, 64, 16, 16), images.numel() // 64
        # All positions but 128 would be the first share, which does not run.
        each = positions - 128 if shares == 2 else positions
        rest = (positions, each, 1, 4, 4, 64, 16)
        with only(upsample_conv_weights, "_weight_gradient_kernel", (2, 1, 1), (0, 0, shares - 1)):
            launch = upsample_conv_weights._weight_gradient_kernel[None]
            launch(gradient, images, None, None, partials, *rest, SUMS=0, PRECISION="ieee", **options)
        found.append(partials[shares - 1])
    assert torch.equal(*found)
    assert found[0].any()


def test_nearest():
    torch.manual_seed(0)
    count = FAR // 128 + 256
    rows, queries = torch.randn(256, 128), torch.randn(3, 128)
    offset = torch.zeros(128, dtype=torch.float64)
    table = ending_with(rows, count)
    groups = count // 128
    with only(nearest, "_pack_kernel", (2,), (groups - 2,)):
        far = nearest.Packed(table, offset, 0, 1, count, False)
    near = nearest.Packed(rows, offset, 0, 1, 256, False)
    assert torch.equal(far.high[-256:], near.high)
    assert torch.equal(far.numbers[:, -2:], near.numbers)
    q = nearest.Packed(queries, offset, 0, 1, 256, True)
    options = scan_options((9, 0), q.high.shape[1], 1)
    per_program = nearest.PER_PROGRAM
    with only(nearest, "_scan_kernel", (1, 1), (0, (groups - 1) // per_program)):
        maxima = nearest.scan(q, far, 1, options)
    assert torch.equal(maxima[-2:], nearest.scan(q, near, 1, options))
    slots = torch.tensor([[groups - 1, groups - 2]] * 3, dtype=torch.int32)
    found = nearest.decide(queries, table, slots, torch.full((3,), 2, dtype=torch.int32))
    few = nearest.decide(queries, rows, slots - groups + 2, torch.full((3,), 2, dtype=torch.int32))
    assert torch.equal(found[0][:, :1], few[0][:, :1] + count - 256)
