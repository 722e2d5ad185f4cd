"""Compare the ops with float64 on this machine: `python -m vglann_kernels.verify`.

    python -m vglann_kernels.verify [--batch 4] [--frames 8] [--size 64] [--blur binomial] [--levels 3]
                                    [--latent-dim 100] [--device cuda] [--op OP ...] [--dtype DTYPE] [--impl triton]

prints one line per op, dtype, layout and quantity: the kernel's error, the reference's own error in the same
dtype, the limit, and whether the kernel keeps it. Errors are relative L2, ||x - exact|| / ||exact||, against
the reference in float64 on the same inputs. The limit is twice the reference's error plus 8 float32 rounding
steps (1e-6): what a different order of float32 sums may cost. The gradient of an L1 loss jumps where a band of
the difference is 0, so its values that hang on a band within float32 rounding of 0 are left out; the line says
how many, see `undecided`. `nearest` must agree in every row, with every implementation that can run here: 400 queries
in 10,000 rows, 20 in 500 on a CPU. Exits with 1 when a line is over its limit, with 2 when no kernel can run here.

`--impl reference` compares the reference alone, in each dtype, against itself in float64: all that
can be shown where Triton does not run. Its limit is 16 rounding steps of the case's dtype.
On a machine without a GPU it runs under TRITON_INTERPRET=1 (slow; without bfloat16, which the interpreter does
not compute right: `proof` does, by the compiler's IR). Needs torch, triton and numpy only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import impl as switch
from .batchnorm_relu.op import batch_norm_relu
from .comparison import Line, Shapes, lines, relative_l2
from .comparison import dtypes as _dtypes
from .comparison import gradients_of as _gradients
from .comparison import leaf as _leaf
from .composite.op import mask_composite
from .composite.reference import mask_composite as exact_composite
from .composite_laplacian.op import composite_laplacian_loss
from .laplacian.op import laplacian_pyramid_loss
from .laplacian.pyramid import BLURS, FORMER_BLURS, blur_name
from .laplacian.reference import blur_taps, pyramid
from .latent_adam.op import latent_adam_step, latent_flush, latent_gather
from .latent_adam.state import latent_adam_state
from .launch import interpreted, why_no_triton
from .nearest.op import IMPLEMENTATIONS, nearest_rows
from .step_guard.op import guard_step
from .verify_convolution import upsample_conv


def undecided(
    difference: Tensor, leaves: list[Tensor], shapes: Shapes, bound: float, pixels: bool = False
) -> list[Tensor]:
    """For each leaf, which values of its gradient a band within `bound` of 0 reaches: its sign decides them.

    difference  float64 [..., H, W], made of the `leaves`
    pixels      the difference itself is a band, too, as with `l1_weight`

    The pyramid and all that leads to it are differentiable in float64, so a sum of the bands in question, by random
    weights that let no two of them cancel, has a gradient exactly where one of them reaches.
    """
    planes = difference.flatten(0, -3)
    bands = [
        *pyramid(planes, shapes.levels, blur_taps(blur_name(shapes.blur), 2.0)),
        *([planes] if pixels else []),
    ]
    near = [torch.rand_like(band) * (band.detach().abs() <= bound) * band for band in bands]
    reached = torch.autograd.grad(torch.stack([part.sum() for part in near]).sum(), leaves)
    return [gradient != 0 for gradient in reached]


def sign_bound(largest: float) -> float:
    """Return the error that a kernel may have in a band of a difference of two planes of values up to `largest`.

    8 float32 rounding steps of the difference: sums in another order, and activations within 7 steps.
    """
    return 8 * torch.finfo(torch.float32).eps * 2 * largest


def _logits(shapes: Shapes, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    b, t, n = shapes.batch, shapes.frames, shapes.size
    head, background = torch.randn(b, 4, t, n, n), torch.randn(b, 3, n, n)
    if last:
        head = head.to(memory_format=torch.channels_last_3d)
        background = background.to(memory_format=torch.channels_last)
    return head.to(shapes.device, dtype), background.to(shapes.device, dtype)


def _clips(shapes: Shapes) -> Tensor:
    shape = (shapes.batch + 3, 3, shapes.frames, shapes.size, shapes.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(shapes.device)


def _name(dtype: torch.dtype, last: bool) -> str:
    return f"{str(dtype).removeprefix('torch.')} {'channels-last' if last else 'contiguous'}"


def composite(shapes: Shapes) -> Iterator[Line]:
    """`mask_composite`, its outputs and both gradients."""
    for dtype in _dtypes(shapes):
        for last in (False, True):
            head, background = _logits(shapes, dtype, last)
            upstream = torch.randn(head[:, :3].shape, device=head.device).to(dtype)

            def run(impl: str, exact: Any, inputs: Any = (head, background, upstream)) -> list[Tensor]:
                h, b = _leaf(inputs[0], exact), _leaf(inputs[1], exact)
                video, mean = mask_composite(h, b, impl=impl)
                torch.autograd.backward([video, mean.sum()], [inputs[2].to(video.dtype), None])
                return [video, mean, *_gradients(h, b)]

            names = "video mask_mean grad_head grad_background"
            yield from lines("composite", _name(dtype, last), names, shapes.impl, run)


def laplacian(shapes: Shapes) -> Iterator[Line]:
    """`laplacian_pyramid_loss` with a uint8 and a floating target: loss and gradients."""
    options: dict[str, Any] = {"levels": shapes.levels, "blur": shapes.blur}
    for dtype in _dtypes(shapes):
        for last in (False, True):
            video = _logits(shapes, dtype, last)[0][:, :3].tanh()
            target = _clips(shapes)[: shapes.batch]

            def run(impl: str, exact: Any, video: Any = video, target: Any = target) -> list[Tensor]:
                x = _leaf(video, exact)
                loss = laplacian_pyramid_loss(x, target, impl=impl, reduction="sum", **options)
                loss.backward()
                return [loss, *_gradients(x)]

            x = _leaf(video, torch.float64)
            bound = sign_bound(1.0)
            (out,) = undecided(x - _in_range(target), [x], shapes, bound)
            case = f"{_name(dtype, last)} uint8"
            yield from lines("laplacian", case, "loss grad_video", shapes.impl, run, {"grad_video": out})
    if torch.float32 not in _dtypes(shapes):
        return
    video, other = (torch.randn(2, 3, shapes.size, shapes.size).to(shapes.device) for _ in range(2))

    def run_float(impl: str, exact: Any) -> list[Tensor]:
        x, y = _leaf(video, exact), _leaf(other, exact)
        loss = laplacian_pyramid_loss(x, y, impl=impl, reduction="none", **options)
        loss.backward(torch.arange(6.0, device=loss.device).reshape(2, 3).to(loss.dtype))
        return [loss, *_gradients(x, y)]

    x, y = _leaf(video, torch.float64), _leaf(other, torch.float64)
    bound = sign_bound(float(torch.stack([video, other]).abs().max()))
    ignored = dict(zip(("grad_video", "grad_target"), undecided(x - y, [x, y], shapes, bound), strict=True))
    names, case = "loss grad_video grad_target", "float32 float target, per plane"
    yield from lines("laplacian", case, names, shapes.impl, run_float, ignored)

    options |= {"l1_weight": 0.5, "l2_weight": 2.0}
    reached = undecided(x - y, [x, y], shapes, bound, pixels=True)
    ignored = dict(zip(("grad_video", "grad_target"), reached, strict=True))
    yield from lines("laplacian", f"{case}, l1 and l2", names, shapes.impl, run_float, ignored)


def _in_range(clips: Tensor) -> Tensor:
    """uint8 as float64 in [-1, 1]."""
    return clips.double() * (2 / 255) - 1


def composite_laplacian(shapes: Shapes) -> Iterator[Line]:
    """`composite_laplacian_loss` with the mask prior: loss and both gradients.

    The reference alone is compared in float32: in half precision it is its two parts, compared above, and the video
    it rounds between them decides signs that float64 has otherwise.
    """
    options: dict[str, Any] = {"levels": shapes.levels, "blur": shapes.blur}
    options |= {"mask_weight": 0.1, "reduction": "sum"}
    clips = _clips(shapes)
    index = torch.randint(0, len(clips), (shapes.batch,), device=clips.device)
    for dtype in _dtypes(shapes) if shapes.impl != "reference" else [torch.float32]:
        for last in (False, True):
            head, background = _logits(shapes, dtype, last)

            def run(impl: str, exact: Any, inputs: Any = (head, background)) -> list[Tensor]:
                h, b = _leaf(inputs[0], exact), _leaf(inputs[1], exact)
                loss = composite_laplacian_loss(h, b, clips, index, impl=impl, **options)
                assert isinstance(loss, Tensor)
                loss.backward()
                return [loss, *_gradients(h, b)]

            leaves = [_leaf(head, torch.float64), _leaf(background, torch.float64)]
            difference = exact_composite(leaves[0], leaves[1])[0] - _in_range(clips[index])
            out = undecided(difference, leaves, shapes, sign_bound(1.0))
            ignored = dict(zip(("grad_head", "grad_background"), out, strict=True))
            names = "loss grad_head grad_background"
            yield from lines("composite_laplacian", _name(dtype, last), names, shapes.impl, run, ignored)


def batchnorm_relu(shapes: Shapes) -> Iterator[Line]:
    """`batch_norm_relu` in training on a video and on an image: output, gradients, running statistics.

    The upstream gradient is 0 where rounding decides the ReLU, which would turn whole values.
    """
    # 4,608 rows by default, and 576: more than one program takes alone, and fewer.
    batch, frames, channels, n = min(shapes.batch, 4), min(shapes.frames, 8), 72, shapes.size // 5
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    for dtype in _dtypes(shapes):
        for grid in ((frames, n, n), (n, n)):
            form = torch.channels_last if len(grid) == 2 else torch.channels_last_3d
            x = (torch.randn(batch, channels, *grid) + 0.5).to(dtype)
            before = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
            upstream = torch.randn(x.shape).to(dtype).masked_fill(before.abs() < 1e-3, 0.0)
            x, upstream = (value.to(shapes.device).contiguous(memory_format=form) for value in (x, upstream))
            vectors = weight.to(shapes.device), bias.to(shapes.device)

            def run(impl: str, exact: Any, inputs: Any = (x, *vectors, upstream)) -> list[Tensor]:
                leaves = [_leaf(value, exact) for value in inputs[:3]]
                running = [torch.full_like(leaf, 0.5).detach() for leaf in leaves[1:]]
                counter = torch.zeros_like(running[0][0], dtype=torch.int64)
                x, weight, bias = leaves
                y = batch_norm_relu(x, weight, bias, running[0], running[1], counter, impl=impl)
                y.backward(inputs[3].to(y.dtype))
                return [y, *_gradients(*leaves), *running]

            names = "y grad_x grad_weight grad_bias running_mean running_var"
            case = f"{str(dtype).removeprefix('torch.')} {'image' if len(grid) == 2 else 'video'}"
            yield from lines("batchnorm_relu", case, names, shapes.impl, run)


def latent_adam(shapes: Shapes) -> Iterator[Line]:
    """Ten steps in each mode, duplicates in the batch: rows as gathered, table and second moment.

    The gradients have the one dtype of `shapes`; the table is float32.
    """
    device, rows, width = shapes.device, 3 * shapes.batch + 2, shapes.latent_dim
    start = torch.randn(rows, width, device=device) / 10
    batches = [torch.randint(0, rows, (shapes.batch,), device=device) for _ in range(10)]
    dtype = getattr(torch, shapes.dtype or "float32")
    gradients = [torch.randn(shapes.batch, width, device=device).to(dtype) for _ in range(10)]

    for mode, retraction in (("sparse", "sphere"), ("sparse", "ball"), ("lazy", None), ("dense", None)):

        def run(impl: str, exact: Any, mode: str = mode, retraction: Any = retraction) -> list[Tensor]:
            table = start.to(exact or torch.float32, copy=True)
            state = latent_adam_state(table, mode)
            lr = torch.tensor(0.01, device=device, dtype=table.dtype)
            for index, grad in zip(batches, gradients, strict=True):
                latent_adam_step(table, state, index, grad, lr=lr, retraction=retraction, impl=impl)
            read = latent_gather(table, state, batches[0], lr=lr, impl=impl)
            latent_flush(table, state, lr=lr, impl=impl)
            return [read, table, state.exp_avg_sq]

        names = "gathered table second_moment"
        yield from lines("latent_adam", f"{mode} {retraction or ''}", names, shapes.impl, run)


def step_guard(shapes: Shapes) -> Iterator[Line]:
    """`guard_step` over a step that counts, one that is not finite and one after it: how many results differ."""
    losses = [torch.tensor(loss, device=shapes.device) for loss in (1.0, float("nan"), 1.0)]
    index = torch.arange(shapes.batch, device=shapes.device)
    first = torch.randint(-(2**31), 2**31, (5000,), dtype=torch.int32, device=shapes.device)

    def run(impl: str, _: Any) -> list[Tensor]:
        flags = {name: torch.zeros_like(index[0], dtype=torch.bool) for name in ("frozen", "mine", "skip")}
        numbers = {"step": torch.zeros_like(index[0]), "found_inf": torch.zeros_like(losses[0])}
        tensors = {
            **flags,
            **numbers,
            "rows": torch.zeros_like(index),
            "words": first.clone(),
            "kept": first + 1,
        }
        for loss in losses:
            guard_step(loss, loss, index + 1, **tensors, impl=impl)
            tensors["words"].mul_(3)
        return [torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])]

    yield from lines("step_guard", "three steps", "all", shapes.impl, run)


def nearest(shapes: Shapes) -> Iterator[Line]:
    """`nearest_rows` on rows made to mislead fast arithmetic: the share of wrong rows, and the distances."""
    d, device = shapes.latent_dim, torch.device(shapes.device)
    m = shapes.rows if device.type == "cuda" else 500
    n = m // 25
    unit = torch.nn.functional.normalize(torch.randn(n + m, d), dim=1)
    queries, database = unit[:n], unit[n:]
    centers = unit[torch.arange(n + m) % 5]
    cases = {"unit rows": (queries, database), "offset 1000": (queries + 1000, database + 1000)}
    for spread in (1e-2, 1e-4, 1e-6):
        rows = centers + spread * torch.randn(n + m, d)
        cases[f"clusters of {spread:g}"] = (rows[:n], rows[n:])
    cases["norms 1e-6 to 1e6"] = (queries, database * 10.0 ** torch.linspace(-6, 6, m)[:, None])
    cases["ties"] = (queries, torch.cat([database[:400], queries, queries, database[400:]]))
    tried = [name for name in IMPLEMENTATIONS if not switch.implementations("nearest")[name](device)]
    for case, pair in cases.items():
        q, c = (x.to(device) for x in pair)
        distance = torch.stack([(row.double() - c.double()).square().sum(dim=1) for row in q])  # [N,M]
        best = distance.amin(dim=1)
        lowest = (distance == best[:, None]).int().argmax(dim=1)
        for impl in tried:
            index, squared = nearest_rows(q, c, impl=impl)
            wrong = (index != lowest).double().mean().item()
            yield Line("nearest", f"{impl}, {case}", "wrong rows", wrong, 0.0, 0.0)
            yield Line("nearest", f"{impl}, {case}", "distance", relative_l2(squared, best), 0.0, 1e-6)


OPS = {
    op.__name__: op
    for op in (
        composite,
        laplacian,
        composite_laplacian,
        latent_adam,
        nearest,
        batchnorm_relu,
        step_guard,
        upsample_conv,
    )
}


def verify(shapes: Shapes, ops: Sequence[str] = tuple(OPS)) -> Iterator[Line]:
    """Every op of `ops` at these shapes. Raises nothing: a kernel that fails to run ends with its own error."""
    torch.manual_seed(shapes.seed)
    for op in ops:
        yield from OPS[op](shapes)


def report(shapes: Shapes, ops: Sequence[str] = tuple(OPS)) -> int:
    """Print the comparison at these shapes; returns how many lines are over their limit."""
    print(f"{'op':20} {'case':34} {'quantity':16} {'error':>9} {'reference':>9} {'limit':>9}")
    wrong = 0
    for line in verify(shapes, ops):
        print(line, flush=True)
        wrong += not line.ok
    if interpreted():
        print(
            "bfloat16: not here, the interpreter computes it wrong; python -m vglann_kernels.proof compares it"
        )
    print(f"{wrong} wrong" if wrong else "all within their limits")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vglann_kernels.verify")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("batch", "frames", "size", "levels", "latent_dim", "seed"):
        default = getattr(Shapes, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=default, help=f"default {default}")
    parser.add_argument("--blur", default="binomial", choices=(*BLURS, *FORMER_BLURS))
    parser.add_argument("--impl", default="triton", choices=("triton", "reference"), help="default triton")
    parser.add_argument(
        "--dtype", default="", choices=("float32", "bfloat16", "float16"), help="default: all"
    )
    parser.add_argument("--op", nargs="+", default=tuple(OPS), choices=tuple(OPS), help="default: all")
    values = vars(parser.parse_args(arguments))
    ops, shapes = values.pop("op"), Shapes(**values)
    why = why_no_triton(torch.device(shapes.device)) if shapes.impl == "triton" else None
    if why:
        print(f"verify: no Triton kernel runs here: {why}", file=sys.stderr)
        return 2
    return 1 if report(shapes, ops) else 0


if __name__ == "__main__":
    sys.exit(main())
