"""Launches executed by ttsem, which gives each operation of the compiler's IR its meaning: no GPU is needed.

`executed(stage, target)` replaces launches inside a `with` block. Triton compiles each of them for the target as far
as `stage`, "ttir" (before layouts) or "ttgir" (with them, and all passes of the target). ttsem executes that module
on copies of the tensors, and stops at an access outside them, at an operation without a defined result, and at two
lanes that store different values in one place. Memory that nobody wrote is NaN. Programs of one launch that touch the
same bytes, one of them writing, are a race: `Launches.races` names their buffers.

ttsem (MIT, https://github.com/alepot55/ttsem) is pinned by `make proof`: this file replaces some of its functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

VERSION = "0.1.0"


@dataclass
class Launches:
    """The launches of one block, how many had several programs, and (kernel, buffer) of their races.

    `unchecked` launches touched too much memory to be searched for races.
    """

    count: int = 0
    several: int = 0
    unchecked: int = 0
    races: set[tuple[str, str]] = field(default_factory=set)


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of float32 arrays, rounded once.

    The product is exact in float64. The sum is rounded to odd there: where it is not exact and its last bit is 0, it
    moves one step towards the exact sum. Rounding that to float32 is right (Boldo and Melquiond 2008).
    """
    with np.errstate(all="ignore"):
        product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, dtype=np.float64)
        total = np.asarray(product + c)
        part = total - product
        error = (product - (total - part)) + (c - part)
        even = (np.atleast_1d(total).view(np.int64) & 1 == 0).reshape(total.shape)
        moved = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        inexact = even & (error != 0) & np.isfinite(error)
        return np.where(inexact, moved, total).astype(np.float32)


def hard_cases() -> list[Any]:
    """Return float32 arrays a, b, c: sums close to 0 or to the middle of two float32, special values, and others."""
    numbers = np.random.default_rng(0).standard_normal((3, 600)).astype(np.float32)
    near = np.array([4097, 4097, 2.0**-30], np.float32)
    special = np.array([0.0, -0.0, 1.0, -1e-45, 1e-38, 3e38, np.inf, np.nan], np.float32)
    cube = np.stack(np.meshgrid(special, special, special)).reshape(3, -1)
    # Sums that nearly cancel, and that are close to the middle of two float32.
    close = np.stack([numbers[0], numbers[1], -(numbers[0] * numbers[1])])
    middle = np.stack([numbers[0], np.full(600, 2.0**-24, np.float32), np.abs(numbers[0]) * 3])
    return list(np.concatenate([numbers, near[:, None], cube, close, middle], axis=1))


@contextmanager
def executed(stage: str, target: int, seen: Any = None) -> Iterator[Launches]:
    """Execute every launch of the block by the IR of `stage` for `target`; the device "cuda" is the CPU.

    `seen(kernel, operation, addresses, mask, itemsize)` is called for each load, store and asynchronous copy.
    Raises ImportError without ttsem, its `KernelFault` at an access or an operation as above, and its `Unjudged`
    where it gives an operation no meaning.
    """
    from ttsem import harness, mlir, ops, sanitize

    launches, texts, modules = Launches(), {}, {}
    latest: list[Any] = []
    record_launch, execute, parse = harness.record_launch, harness.execute, mlir.parse
    find_race, slow_fma = sanitize.pidraces.find_race, ops.OPS["math.fma"]

    def recorded(*arguments: Any) -> Any:
        launch = record_launch(*arguments)
        launches.count += 1
        launches.several += int(np.prod([int(n) for n in launch.record.grid])) > 1
        return launch

    def ir(record: Any, _: str, gpu: Any) -> str:
        """The module after `stage`: ttsem's own function compiles to machine code and takes minutes."""
        _, *key = harness._specialize(record.fn, record.args, record.kwargs, gpu)
        name = f"{record.fn_name} {key} {record.kwargs}"
        if name not in texts:
            texts[name] = mlir.to_generic(harness._stage_text(record, stage, gpu))
        return texts[name]

    def parsed(text: str) -> Any:
        if text not in modules:
            modules[text] = parse(text)
        return modules[text]

    def executing(record: Any, *arguments: Any, **options: Any) -> Any:
        latest[:] = [record]
        return execute(record, *arguments, **options)

    def all_races(log: Any) -> None:
        """ttsem reports one race of a launch. Its buffer is taken out of the log until no race is left."""
        (record,) = latest
        spans = {name: (base, base + record.pre[name].nbytes) for name, base in record.bases.items()}
        while race := find_race(log):
            first, last = next(s for s in spans.values() if s[0] <= race.address < s[1])
            names = [name for name, span in spans.items() if span == (first, last)]
            launches.races.add((record.fn_name, "/".join(sorted(names))))
            log = sanitize._without_protocol_buffers(log, [(first, last)])

    def fused(interpreter: Any, operation: Any, arguments: list[Any]) -> list[Any]:
        if operation.result_types[0].scalar.name != "f32":
            return slow_fma(interpreter, operation, arguments)
        return [fma(*arguments[:3])]

    def access(name: str, place: int) -> Any:
        """The operation `name`, whose mask is operand number `place`."""
        plain = ops.OPS[name]

        def counted(interpreter: Any, operation: Any, arguments: list[Any]) -> Any:
            results = plain(interpreter, operation, arguments)
            # A copy fills shared memory, its operand 1; a store writes operand 1.
            values = (
                np.asarray(results[0]) if name == "tt.load" else getattr(arguments[1], "data", arguments[1])
            )
            mask = arguments[place] if len(arguments) > place else None
            seen(latest[0].fn_name, operation, arguments[0], mask, np.asarray(values).dtype.itemsize)
            return results

        return counted

    # A division within two rounding steps, which ttsem does not know: executed as the exact one.
    replaced = {"math.fma": fused, "tt.approx_divf": ops.OPS["arith.divf"]}
    if seen is not None:
        places = {"tt.load": 1, "tt.store": 2, "ttg.async_copy_global_to_local": 2}
        replaced |= {name: access(name, place) for name, place in places.items()}
    free = (1 << 34, 1 << 34)
    with ExitStack() as stack:
        for owner, name, value in (
            (harness, "record_launch", recorded),
            (harness, "ir_for_launch", ir),
            (harness, "execute", executing),
            (harness.mlir, "parse", parsed),
            (sanitize.pidraces, "find_race", all_races),
            (torch.cuda, "mem_get_info", lambda device=None: free),
            (torch.cuda, "memory_reserved", lambda device=None: 0),
            (torch.cuda, "memory_allocated", lambda device=None: 0),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(patch.dict(ops.OPS, replaced))
        mlir.enable_generic_printing()
        session = stack.enter_context(sanitize.session(target, "proof"))
        yield launches
        launches.unchecked = session.races_unchecked


def disagreements() -> int:
    """Return on how many of the hard cases `fma` differs from ttsem's own, which is exact and slow."""
    from ttsem import ops

    a, b, c = hard_cases()
    slow = [ops._fma_scalar(*map(float, row), ops._FMA_FORMATS["f32"]) for row in zip(a, b, c, strict=True)]
    ours, theirs = fma(a, b, c), np.array(slow, np.float32)
    same = (ours.view(np.int32) == theirs.view(np.int32)) | (np.isnan(ours) & np.isnan(theirs))
    return int((~same).sum())
