"""Compare every Triton kernel but `nearest`'s with float64 on this machine: `python -m vglann_kernels.verify`.

    python -m vglann_kernels.verify [--batch 4] [--frames 8] [--size 64] [--blur binomial] [--levels 3]
                                    [--latent-dim 100] [--device cuda]

prints one line per op, dtype, layout and quantity: the kernel's error, the reference's own error in the same
dtype, the limit, and whether the kernel keeps it. Errors are relative L2, ||x - exact|| / ||exact||, against
the reference in float64 on the same inputs. The limit is twice the reference's error plus 8 float32 rounding
steps (1e-6): what a different order of float32 sums may cost. Gradients of an L1 loss may besides have a few
signs turned, see `turned_signs`. Exits with 1 when a line is over its limit, with 2 when no kernel can run here.

`report` with `impl="reference"` compares the reference alone, in each dtype, against itself in float64: all that
can be shown where Triton does not run. Its limit is 16 rounding steps of the case's dtype.
 On a machine without a GPU it runs under TRITON_INTERPRET=1 (slow; without
bfloat16, which the interpreter does not compute right). Needs torch, triton and numpy only.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .composite.op import mask_composite
from .composite_laplacian.op import composite_laplacian_loss
from .laplacian.op import laplacian_pyramid_loss
from .latent_adam.op import latent_adam_step, latent_flush, latent_gather
from .latent_adam.state import latent_adam_state
from .launch import interpreted, why_no_triton


@dataclass(frozen=True)
class Line:
    """One compared quantity; `ok` is error <= limit (NaN is not ok)."""

    op: str
    case: str
    quantity: str
    error: float
    reference_error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        numbers = f"{self.error:9.2e} {self.reference_error:9.2e} {self.limit:9.2e}"
        return f"{self.op:20} {self.case:34} {self.quantity:16} {numbers}  {verdict}"


@dataclass(frozen=True)
class Shapes:
    """What is verified: `batch` videos of `frames` frames of `size` x `size`, latents, and the loss's options.

    `impl` is what is compared with float64: "triton", or "reference" alone.
    """

    batch: int = 4
    frames: int = 8
    size: int = 64
    levels: int = 3
    blur: str = "binomial"
    latent_dim: int = 100
    device: str = "cuda"
    impl: str = "triton"


def relative_l2(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||; the plain norm of the difference where `exact` is 0."""
    x, exact = x.detach(), exact.detach().double()
    return float((x.double() - exact).norm() / (exact.norm() if exact.norm() > 0 else 1))


def turned_signs(count: int, step: float = torch.finfo(torch.float32).eps) -> float:
    """Relative L2 error allowed for signs of an L1 gradient with `count` elements.

    A band of the difference that is within rounding of 0 may come out on the other side of it, and the gradient
    jumps there. Such are the bands within some 8 float32 rounding steps or, where the video is rounded to `step` on
    the way, a share of step / 16: `expected` elements, 3 standard deviations more at most, of which each changes the
    L2 norm by about 3 parts in sqrt(count). 0 for planes so few that none is expected.
    """
    expected = max(8 * torch.finfo(torch.float32).eps, step / 16) * count
    return 3 * math.sqrt(math.floor(expected + 3 * math.sqrt(expected)) / count)


def lines(
    op: str, case: str, names: str, impl: str, run: Callable[[str, Any], list[Tensor]]
) -> Iterator[Line]:
    """`run(impl, float64 or None)` gives the quantities `names`; compares `impl`, reference and exact."""
    exact, reference = run("reference", torch.float64), run("reference", None)
    step = max(torch.finfo(value.dtype).eps for value in reference)
    compared = reference if impl == "reference" else run(impl, None)
    for name, good, plain, ours in zip(names.split(), exact, reference, compared, strict=True):
        own = relative_l2(plain, good)
        limit = 16 * step if impl == "reference" else 2 * own + 8 * torch.finfo(torch.float32).eps
        if name.startswith("grad") and op == "laplacian":
            limit += turned_signs(good.numel())
        elif name.startswith("grad") and op == "composite_laplacian":
            limit += turned_signs(good.numel(), step)
        yield Line(op, case, name, relative_l2(ours, good), own, limit)


def _dtypes() -> list[torch.dtype]:
    half = [torch.float16] if interpreted() else [torch.bfloat16, torch.float16]
    return [torch.float32, *half]


def _leaf(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.detach().to(dtype or x.dtype).requires_grad_()


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
    for dtype in _dtypes():
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


def _gradients(*leaves: Tensor) -> list[Tensor]:
    for leaf in leaves:
        assert leaf.grad is not None
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def laplacian(shapes: Shapes) -> Iterator[Line]:
    """`laplacian_pyramid_loss` with a uint8 and a floating target: loss and gradients."""
    options: dict[str, Any] = {"levels": shapes.levels, "blur": shapes.blur}
    for dtype in _dtypes():
        for last in (False, True):
            video = _logits(shapes, dtype, last)[0][:, :3].tanh()
            target = _clips(shapes)[: shapes.batch]

            def run(impl: str, exact: Any, video: Any = video, target: Any = target) -> list[Tensor]:
                x = _leaf(video, exact)
                loss = laplacian_pyramid_loss(x, target, impl=impl, reduction="sum", **options)
                loss.backward()
                return [loss, *_gradients(x)]

            yield from lines("laplacian", f"{_name(dtype, last)} uint8", "loss grad_video", shapes.impl, run)
    video, other = (torch.randn(2, 3, shapes.size, shapes.size).to(shapes.device) for _ in range(2))

    def run_float(impl: str, exact: Any) -> list[Tensor]:
        x, y = _leaf(video, exact), _leaf(other, exact)
        loss = laplacian_pyramid_loss(x, y, impl=impl, reduction="none", **options)
        loss.backward(torch.arange(6.0, device=loss.device).reshape(2, 3).to(loss.dtype))
        return [loss, *_gradients(x, y)]

    names = "loss grad_video grad_target"
    yield from lines("laplacian", "float32 float target, per plane", names, shapes.impl, run_float)


def composite_laplacian(shapes: Shapes) -> Iterator[Line]:
    """`composite_laplacian_loss` with the mask prior: loss and both gradients."""
    options: dict[str, Any] = {"levels": shapes.levels, "blur": shapes.blur}
    options |= {"mask_weight": 0.1, "reduction": "sum"}
    clips = _clips(shapes)
    index = torch.randint(0, len(clips), (shapes.batch,), device=clips.device)
    for dtype in _dtypes():
        for last in (False, True):
            head, background = _logits(shapes, dtype, last)

            def run(impl: str, exact: Any, inputs: Any = (head, background)) -> list[Tensor]:
                h, b = _leaf(inputs[0], exact), _leaf(inputs[1], exact)
                loss = composite_laplacian_loss(h, b, clips, index, impl=impl, **options)
                assert isinstance(loss, Tensor)
                loss.backward()
                return [loss, *_gradients(h, b)]

            names = "loss grad_head grad_background"
            yield from lines("composite_laplacian", _name(dtype, last), names, shapes.impl, run)


def latent_adam(shapes: Shapes) -> Iterator[Line]:
    """Ten steps in each mode, duplicates in the batch: rows as gathered, table and second moment."""
    device, rows, width = shapes.device, 3 * shapes.batch + 2, shapes.latent_dim
    start = torch.randn(rows, width, device=device) / 10
    batches = [torch.randint(0, rows, (shapes.batch,), device=device) for _ in range(10)]
    gradients = [torch.randn(shapes.batch, width, device=device) for _ in range(10)]

    for mode, retraction in (("row", "sphere"), ("row", "ball"), ("catchup", None), ("dense", None)):

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


def verify(shapes: Shapes) -> Iterator[Line]:
    """Every op at these shapes. Raises nothing: a kernel that fails to run ends with its own error."""
    torch.manual_seed(0)
    for op in (composite, laplacian, composite_laplacian, latent_adam):
        yield from op(shapes)


def report(shapes: Shapes) -> int:
    """Print the comparison at these shapes; returns how many lines are over their limit."""
    print(f"{'op':20} {'case':34} {'quantity':16} {'error':>9} {'reference':>9} {'limit':>9}")
    wrong = 0
    for line in verify(shapes):
        print(line, flush=True)
        wrong += not line.ok
    if interpreted():
        print("bfloat16: not shown, the interpreter does not compute it right")
    print(f"{wrong} wrong" if wrong else "all within their limits")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vglann_kernels.verify")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("batch", "frames", "size", "levels", "latent_dim"):
        default = getattr(Shapes, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=default, help=f"default {default}")
    parser.add_argument("--blur", default="binomial", choices=("binomial", "gaussian", "seed"))
    shapes = Shapes(**vars(parser.parse_args(arguments)))
    why = why_no_triton(torch.device(shapes.device))
    if why:
        print(f"verify: no Triton kernel runs here: {why}", file=sys.stderr)
        return 2
    return 1 if report(shapes) else 0


if __name__ == "__main__":
    sys.exit(main())
