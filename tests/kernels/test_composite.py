"""`mask_composite`: its definition, its gradient, what it refuses. The kernel: interpreted/composite.py."""

import pytest
import torch
from vglann_kernels import mask_composite


def logits(shape=(2, 3, 5, 4), dtype=torch.float64, **kwargs):
    batch, frames, height, width = shape
    torch.manual_seed(0)
    head = torch.randn(batch, 4, frames, height, width, dtype=dtype, **kwargs)
    return head, torch.randn(batch, 3, height, width, dtype=dtype, **kwargs)


def test_each_pixel_is_the_mix_written_out():
    head, background = logits()
    video, mask_mean = mask_composite(head, background)
    for b, c, t, h, w in ((0, 0, 0, 0, 0), (1, 2, 2, 4, 3), (0, 1, 1, 3, 2)):
        m = 1 / (1 + (-head[b, 3, t, h, w]).exp())
        mixed = m * head[b, c, t, h, w].tanh() + (1 - m) * background[b, c, h, w].tanh()
        assert video[b, c, t, h, w].item() == pytest.approx(mixed.item(), abs=1e-15)
    torch.testing.assert_close(mask_mean, head[:, 3].sigmoid().mean(dim=(1, 2, 3)))


def test_gradcheck():
    inputs = [x.requires_grad_() for x in logits((1, 2, 2, 3))]
    assert torch.autograd.gradcheck(mask_composite, inputs)


def test_dtypes_out():
    for dtype, mean_dtype in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        video, mask_mean = mask_composite(*logits(dtype=dtype))
        assert (video.dtype, mask_mean.dtype) == (dtype, mean_dtype)


def test_half_precision_is_computed_in_float32():
    head, background = logits(dtype=torch.bfloat16)
    exact = mask_composite(head.double(), background.double())[0]
    torch.testing.assert_close(mask_composite(head, background)[0], exact.bfloat16())


def test_saturated_logits_and_nan():
    head, background = logits((1, 1, 1, 3))
    head[0, :, 0, 0] = torch.tensor(
        [[1e4, 0, 0], [-1e4, 0, 0], [float("inf"), 0, 0], [1e4, -1e4, float("nan")]]
    )
    video = mask_composite(head, background)[0][0, :, 0, 0]
    assert video[:, 0].tolist() == [1, -1, 1]
    torch.testing.assert_close(video[:, 1], background[0, :, 0, 1].tanh())
    assert video[:, 2].isnan().all()


def test_an_empty_batch():
    video, mask_mean = mask_composite(torch.zeros(0, 4, 2, 3, 3), torch.zeros(0, 3, 3, 3))
    assert (video.shape, mask_mean.shape) == ((0, 3, 2, 3, 3), (0,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, b: (h[0], b), ValueError, r"head: expected shape \(B, 4, T, H, W\), got \(4, 3, 5, 4\)"),
        (lambda h, b: (h[:, :3], b), ValueError, r"head: expected shape \(B, 4, T, H, W\), got \(2, 3"),
        (
            lambda h, b: (h, b[:1]),
            ValueError,
            r"background: expected shape \(2, 3, 5, 4\), got \(1, 3, 5, 4\)",
        ),
        (lambda h, b: (h, b.float()), TypeError, "background: expected float64, got float32"),
        (lambda h, b: (h.int(), b), TypeError, "head: expected float32 or .*, got int32"),
        (lambda h, b: (h.numpy(), b), TypeError, "head: expected a tensor, got ndarray"),
        (lambda h, b: (h, b.to("meta")), ValueError, "background: expected device cpu .*, got meta"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        mask_composite(*change(*logits()))


def test_traces_into_one_graph():
    inputs = [x.requires_grad_() for x in logits(dtype=torch.float32)]
    traced = torch.compile(mask_composite, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(traced(*inputs), mask_composite(*inputs), strict=True):
        torch.testing.assert_close(ours, plain)
