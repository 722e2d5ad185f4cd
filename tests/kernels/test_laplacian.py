"""`laplacian_pyramid_loss`: its definition, the recorded losses of the paper's code, what it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import golden, uniform
from vglann_kernels import laplacian_pyramid_loss
from vglann_kernels.laplacian import reference


def planes(shape=(2, 3, 9, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]


def by_convolution(x, y, kernel, levels, weights):
    """The loss per plane as it is usually written: two pyramids, padded 2-D convolutions."""

    def pyramid(image):
        for _ in range(levels):
            padded = F.pad(image, [kernel.shape[0] // 2] * 4, mode="replicate")
            low = F.conv2d(padded, kernel[None, None])
            yield image - low
            image = F.avg_pool2d(low, 2)
        yield image

    pairs = zip(weights, pyramid(x.flatten(0, -3)[:, None]), pyramid(y.flatten(0, -3)[:, None]), strict=True)
    return sum(w * (a - b).abs().mean(dim=(1, 2, 3)) for w, a, b in pairs).reshape(x.shape[:-2])


@pytest.mark.parametrize("blur", ["binomial", "gaussian", "paper"])
@pytest.mark.parametrize("levels", [1, 3])
def test_equals_two_pyramids_of_convolutions(blur, levels):
    x, y = planes()
    offsets = torch.arange(-2.0, 3, dtype=torch.float64)
    if blur == "binomial":
        taps = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64)
        kernel = taps[:, None] * taps
    elif blur == "gaussian":
        g = (-(offsets**2) / (2 * 1.5**2)).exp()
        kernel = g[:, None] * g
    else:
        g = (-(offsets**2) / 1.5**2).exp()
        kernel = g[:, None] + g
    weights = [0.5, 2.0, 3.0, 0.25][: levels + 1]
    expected = by_convolution(x, y, kernel / kernel.sum(), levels, weights)
    options = {"levels": levels, "blur": blur, "sigma": 1.5, "level_weights": weights}
    for reduction, reduced in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        loss = laplacian_pyramid_loss(x, y, reduction=reduction, **options)
        torch.testing.assert_close(loss, reduced, rtol=1e-12, atol=0)


def test_gradcheck():
    x, y = (image.requires_grad_() for image in planes((1, 4, 5)))
    for blur in ("binomial", "gaussian", "paper"):
        function = lambda x, y, blur=blur: laplacian_pyramid_loss(x, y, levels=2, blur=blur, reduction="none")  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, y))


@pytest.mark.parametrize("name", ["lap_3x3x64x64", "lap_2x3x33x47"])
def test_recorded_losses_and_gradients(name):
    recorded = golden(name)
    x, y = (recorded[key].double().requires_grad_() for key in ("input", "target"))
    loss = laplacian_pyramid_loss(x, y, blur="paper")
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=2e-7)
    for tensor, key in ((x, "grad.input"), (y, "grad.target")):
        relative = (tensor.grad - recorded[key]).norm() / recorded[key].norm()
        assert relative < 2e-7
    bands = reference.pyramid(x.detach().flatten(0, 1), 3, reference.blur_taps("paper", 2.0))
    for level, band in enumerate(bands):
        torch.testing.assert_close(
            band.float().view(recorded[f"pyr_input.{level}"].shape),
            recorded[f"pyr_input.{level}"],
            rtol=1e-5,
            atol=1e-6,
        )


def test_recorded_loss_of_another_kernel_size():
    recorded = golden("lap_2x3x40x24_k3s1")
    difference = (recorded["input"].double() - recorded["target"].double()).flatten(0, 1)
    bands = reference.pyramid(difference, 2, reference.blur_taps("paper", 1.0, 3))
    assert sum(band.abs().mean() for band in bands).item() == pytest.approx(recorded["loss"].item(), rel=2e-7)


@pytest.mark.parametrize(("size", "sigma"), [(3, 2.0), (5, 1.0), (5, 2.0), (7, 2.0)])
def test_recorded_kernels(size, sigma):
    terms = reference.blur_taps("paper", sigma, size)
    kernel = sum(torch.tensor(a)[:, None] * torch.tensor(b) for a, b in terms)
    recorded = golden("lap_kernels")[f"kernel_size{size}_sigma{sigma:.0f}"][0, 0]
    torch.testing.assert_close(kernel, recorded, rtol=1e-6, atol=0)


def test_recorded_loss_of_a_video():
    recorded = golden("lap_video_loss")
    fake = (2 * uniform("lap.vid.fake", (2, 3, 32, 64, 64)) - 1).double().requires_grad_()
    real = uniform("lap.vid.real", (2, 3, 32, 64, 64)).double()
    per_frame = laplacian_pyramid_loss(fake, real, blur="paper", reduction="none").mean(dim=(0, 1))
    torch.testing.assert_close(per_frame, recorded["per_frame"], rtol=2e-7, atol=0)
    per_frame[:31].sum().backward()
    sample = fake.grad[:, :, [0, 15, 30, 31]]
    assert (sample - recorded["grad.sample"]).norm() / recorded["grad.sample"].norm() < 2e-7


def test_bytes_are_mapped_to_the_target_range():
    x, _ = planes()
    target = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    for low, high in ((-1.0, 1.0), (0.0, 1.0)):
        mapped = low + (high - low) * target.double() / 255
        loss = laplacian_pyramid_loss(x, target, target_range=(low, high))
        torch.testing.assert_close(loss, laplacian_pyramid_loss(x, mapped))


def test_float32_whatever_autocast_says():
    x, y = planes((2, 3, 16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = laplacian_pyramid_loss(x.float(), y.float())
    assert loss.item() == pytest.approx(laplacian_pyramid_loss(x, y).item(), rel=1e-6)


def test_empty_batches():
    nothing = torch.zeros(0, 3, 8, 8)
    assert laplacian_pyramid_loss(nothing, nothing, reduction="none").shape == (0, 3)
    assert laplacian_pyramid_loss(nothing, nothing, reduction="sum") == 0


@pytest.mark.parametrize("whole", [np.int64, np.uint8])
def test_numbers_of_numpy_are_numbers(whole):
    x, y = planes((2, 16, 16))
    options = {"levels": whole(2), "sigma": np.float32(1.5), "l1_weight": np.float64(1), "blur": "gaussian"}
    plain = laplacian_pyramid_loss(x, y, levels=2, sigma=1.5, l1_weight=1.0, blur="gaussian")
    assert laplacian_pyramid_loss(x, y, **options) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": True}, "levels: expected an integer from 1 to 5, got True"),
        ({"levels": 2.0}, "levels: expected an integer from 1 to 5, got 2.0"),
        ({"levels": 0}, "levels: expected an integer from 1 to 5, got 0"),
        ({"levels": -1}, "levels: expected an integer from 1 to 5, got -1"),
        ({"levels": 6}, "got 6"),
        ({"levels": 4}, "levels: a plane of 9x12 does not survive 4 halvings"),
        ({"blur": "box"}, "blur: expected one of binomial, gaussian, paper, got 'box'"),
        ({"sigma": 0.0}, "sigma: expected a positive number of pixels, got 0.0"),
        ({"reduction": "max"}, "reduction: expected one of none, mean, sum, got 'max'"),
        ({"level_weights": [1, 2]}, r"level_weights: expected 4 finite numbers, got \[1, 2\]"),
        ({"target_range": (0.0, float("nan"))}, "target_range: expected two finite numbers"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        laplacian_pyramid_loss(*planes(), **options)


def test_bad_tensors_are_named():
    x, y = planes()
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 3, 9, 12\), got \(2, 3, 9, 11\)"):
        laplacian_pyramid_loss(x, y[..., :11])
    with pytest.raises(ValueError, match="video: expected at least 2 dimensions"):
        laplacian_pyramid_loss(x[0, 0, 0], y[0, 0, 0])
    with pytest.raises(TypeError, match=r"target: expected uint8 or .*, got int64"):
        laplacian_pyramid_loss(x, y.long())


def test_meta_tensors_give_a_meta_loss():
    """Shapes and memory are planned with them."""
    video = torch.empty(2, 3, 32, 32, device="meta", requires_grad=True)
    loss = laplacian_pyramid_loss(video, torch.empty_like(video, requires_grad=False))
    loss.backward()
    assert loss.is_meta
    assert video.grad.shape == video.shape
