"""The backward passes in the interpreter: data they must not move."""

import pytest
import torch
from counted import Traffic
from tiny import tiny_options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vglann_kernels import (
    batch_norm_relu,
    composite_laplacian_loss,
    laplacian_pyramid_loss,
    mask_composite,
    upsample_convolution,
)
from vglann_kernels import impl as switch
from vglann_kernels.batchnorm_relu import op as batchnorm_relu
from vglann_kernels.laplacian import kernel
from vglann_kernels.upsample_conv.kernel import tiles_of

from vglann_fast.glo.loader import Batch
from vglann_fast.glo.losses import glo_loss


class TensorWork(TorchDispatchMode):
    """Notes (name, most values of a tensor) of every operation of PyTorch's own on more than one value.

    Views move none. What a launcher calls is not seen: test_launch_options.py does.
    """

    def __enter__(self):
        self.operations = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        if operation.namespace != "vglann_kernels" and not operation.is_view and max(sizes, default=0) > 1:
            self.operations.append((operation.name(), max(sizes)))
        return result


class NoTensorWork(TensorWork):
    """Fails at its end if there was such an operation."""

    def __exit__(self, *exception):
        super().__exit__(*exception)
        assert self.operations == []


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    head, background = torch.randn(2, 4, 1, 32, 32), torch.randn(2, 3, 32, 32)
    clips = torch.randint(0, 256, (3, 3, 1, 32, 32), dtype=torch.uint8)
    leaves = [x.to(dtype).requires_grad_() for x in (head, background)]
    return *leaves, clips, torch.tensor([2, 0])


def losses():
    """Pairs (scalar, leaves) of every loss."""
    head, background, clips, index = inputs()
    yield laplacian_pyramid_loss(head[:, :3], clips[index], impl="triton"), [head]
    for with_video in (False, True):
        options = {"mask_weight": 0.1, "return_video": with_video, "impl": "triton"}
        result = composite_laplacian_loss(head, background, clips, index, **options)
        yield result[0] if with_video else result, [head, background]


def test_a_backward_pass_makes_no_tensor_beside_its_gradients():
    torch.manual_seed(0)
    video = torch.randn(2, 32, 32, requires_grad=True)
    target = torch.randint(0, 256, video.shape, dtype=torch.uint8)
    loss = laplacian_pyramid_loss(video, target, impl="triton")
    with NoTensorWork():
        torch.autograd.grad(loss, video)
    for loss, leaves in list(losses())[1:]:
        with NoTensorWork():
            torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("few_rows", [10**9, 0], ids=["one program", "several programs"])
def test_the_backward_pass_of_a_norm_makes_no_tensor_beside_its_gradients(few_rows, monkeypatch):
    monkeypatch.setattr(batchnorm_relu, "FEW_ROWS", few_rows)
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), *(torch.ones(5, requires_grad=True) for _ in range(2))]
    y = batch_norm_relu(*leaves, impl="triton")
    upstream = torch.ones_like(y)
    with NoTensorWork():
        torch.autograd.grad(y, leaves, upstream)


def test_the_backward_pass_of_a_convolution_adds_up_its_sums_by_channel_and_no_more():
    x = torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    bias, scale, shift = (torch.ones(size, requires_grad=True) for size in (2, 3, 3))
    y = upsample_convolution(x, weight, impl="triton")
    upstream = torch.ones_like(y)
    with NoTensorWork():
        torch.autograd.grad(y, (x, weight), upstream)
    leaves = (x, weight, bias, scale, shift)
    y = upsample_convolution(*leaves[:3], scale=scale, shift=shift, impl="triton")
    with TensorWork() as work:
        torch.autograd.grad(y, leaves, upstream)
    # Of scale and shift: one part a tile; of the bias: the four inner of the 16 places.
    assert work.operations == [("aten::sum.dim_IntList", size) for size in (tiles_of(x) * 2 * 3, 4 * 2)]


@pytest.mark.parametrize("output", [0, 1])
def test_an_unused_output_of_the_composite_costs_nothing(output):
    head, background, *_ = inputs()
    gradients = []
    for impl in ("triton", "reference"):
        outputs = mask_composite(head, background, impl=impl)
        scalar = outputs[output].sum()
        if impl == "reference":
            gradients.append(torch.autograd.grad(scalar, (head, background), allow_unused=True))
            continue
        upstream = torch.ones_like(outputs[output])
        with NoTensorWork():
            gradients.append(torch.autograd.grad(outputs[output], (head, background), upstream))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if exact is None else exact)


def test_an_unused_video_spreads_no_nan():
    head, background, *_ = inputs()
    with torch.no_grad():
        head[0, 0, 0, 0, 0] = background[1, 0, 0, 0] = float("nan")
    mask_composite(head, background, impl="triton")[1].sum().backward()
    assert head.grad.isfinite().all()
    assert not background.grad.any()


def test_float16_under_compile_as_the_first_use_of_its_weights():
    head, background, clips, index = inputs(torch.float16)
    weights = (0.123, 0.456, 0.789, 0.321)

    def function(h):
        return laplacian_pyramid_loss(h[:, :3], clips[index], level_weights=weights, impl="triton")

    torch.compile(function, fullgraph=True, backend="aot_eager")(head).backward()
    traced, head.grad = head.grad, None
    function(head).backward()
    torch.testing.assert_close(traced, head.grad, rtol=2e-3, atol=0)
    options = {"level_weights": weights, "impl": "triton"}
    joint = lambda h, b: composite_laplacian_loss(h, b, clips, index, **options)  # noqa: E731
    torch.compile(joint, fullgraph=True, backend="aot_eager")(head, background).backward()


def test_a_factor_of_one_touches_no_gradient_and_others_take_few_programs():
    for loss, leaves in losses():
        with Traffic() as moved:
            torch.autograd.grad(loss, leaves)
        # Each program reads the upstream gradient.
        assert moved.bytes <= 4 * 8
    for loss, leaves in losses():
        with Traffic() as moved:
            torch.autograd.grad(3 * loss, leaves)
        assert moved.unique >= 4 * leaves[0].numel()


@pytest.mark.parametrize("count", [1, 4096, 4097, 100_000])
def test_scaling_covers_every_value_once(count):
    torch.manual_seed(0)
    gradients = [torch.randn(count, 1), torch.randn(2 * count, 1)]
    expected = [gradient * 0.75 for gradient in gradients]
    kernel.scale_gradients(gradients, torch.tensor(0.5), 1.5)
    for ours, exact in zip(gradients, expected, strict=True):
        assert torch.equal(ours, exact)


def test_a_gradient_is_not_derived_again():
    head, background, clips, index = inputs()
    loss = composite_laplacian_loss(head, background, clips, index, impl="triton")
    grad, _ = torch.autograd.grad(loss, (head, background), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_a_saved_table_of_latents_that_is_written_fails_in_backward():
    from vglann_kernels import latent_adam_state, latent_adam_step

    table = torch.randn(4, 3)
    weight = torch.ones(3, requires_grad=True)
    product = (table * weight).sum()
    rows, grad = torch.tensor([1]), torch.ones(1, 3)
    latent_adam_step(table, latent_adam_state(table), rows, grad, lr=torch.tensor(0.1), impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_the_loss_of_a_training_step_needs_no_scaling(preset):
    """Preset `paper` sums over frames: the factor is in the weights of the levels."""
    head = torch.randn(2, 4, 3, 32, 32, requires_grad=True)
    background = torch.randn(2, 3, 32, 32, requires_grad=True)
    clips, index = torch.randint(0, 256, (3, 3, 3, 32, 32), dtype=torch.uint8), torch.tensor([2, 0])
    with switch.using_impl("triton"):
        options = tiny_options(preset, levels=2)
        loss, _ = glo_loss(head, background, Batch(clips, index, index), options, with_video=False)
        with Traffic() as moved:
            loss.backward()
    assert moved.bytes <= 4 * 8
