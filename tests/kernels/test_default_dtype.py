"""The ops in a program whose default dtype is not float32."""

import ast
from pathlib import Path

import pytest
import torch
import vglann_kernels
from vglann_kernels import (
    batch_norm_relu,
    composite_laplacian_loss,
    guard_step,
    laplacian_pyramid_loss,
    latent_adam_state,
    latent_adam_step,
    latent_gather,
    mask_composite,
    nearest_rows,
    upsample_convolution_statistics,
)

FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "linspace", "eye"}


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator, dtype=torch.float32) for shape in shapes]


def one_step_of_adam():
    latents, gradient = tensors((6, 4), (2, 4))
    state, index = latent_adam_state(latents), torch.tensor([1, 4])
    latent_adam_step(latents, state, index, gradient, lr=RATE)
    return latents, latent_gather(latents, state, index, lr=RATE)


def guarded():
    flags = {name: torch.tensor(False) for name in ("frozen", "mine", "skip")}
    found_inf = torch.tensor(0.0, dtype=torch.float32)
    index = torch.tensor([1, 4])
    guard_step(RATE, RATE, index, **flags, step=torch.tensor(0), rows=index.clone(), found_inf=found_inf)
    return (found_inf,)


def upsampled():
    x, weight = tensors((2, 3, 4, 4), (3, 2, 4, 4))
    y, statistics = upsample_convolution_statistics(x, weight)
    return y, statistics.parts


VIDEO, TARGET, HEAD, BACKGROUND, QUERIES, ROWS = tensors(
    (2, 3, 16, 16), (2, 3, 16, 16), (2, 4, 2, 16, 16), (2, 3, 16, 16), (5, 8), (30, 8)
)
VECTORS = tensors((3,), (3,))
CLIPS = torch.zeros(2, 3, 2, 16, 16, dtype=torch.uint8)
RATE = torch.tensor(0.1, dtype=torch.float32)
OPS = {
    "nearest": lambda: nearest_rows(QUERIES, ROWS, impl="reference"),
    "nearest by faiss": lambda: nearest_rows(QUERIES, ROWS, impl="faiss"),
    "composite": lambda: mask_composite(HEAD, BACKGROUND),
    "laplacian": lambda: (laplacian_pyramid_loss(VIDEO, TARGET, levels=2),),
    "composite and laplacian": lambda: composite_laplacian_loss(
        HEAD, BACKGROUND, CLIPS, torch.tensor([1, 0]), levels=2, return_video=True
    ),
    "latent_adam": one_step_of_adam,
    "batchnorm_relu": lambda: (batch_norm_relu(VIDEO, *VECTORS),),
    "step_guard": guarded,
    "upsample_conv": upsampled,
}


@pytest.fixture
def change_default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_an_op_gives_the_same_bits_under_any_default_dtype(op, dtype, change_default_dtype):
    expected = OPS[op]()
    change_default_dtype(dtype)
    for result, usual in zip(OPS[op](), expected, strict=True):
        assert result.dtype == usual.dtype
        assert torch.equal(result, usual)


def factory_calls(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if name.startswith("torch.") and name.removeprefix("torch.") in FACTORIES:
                yield node


def test_every_buffer_of_an_op_names_its_dtype():
    """Also on the way through a GPU, which the test above may not have."""
    folder = Path(vglann_kernels.__file__).parent
    calls = [(file, call) for file in folder.glob("*/*.py") for call in factory_calls(file)]
    assert len(calls) >= 10
    for file, call in calls:
        # torch.full of integers is int64 under any default.
        whole = call.func.attr == "full"
        assert whole or any(word.arg == "dtype" for word in call.keywords), f"{file}:{call.lineno}"
