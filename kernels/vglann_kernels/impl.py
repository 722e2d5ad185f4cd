"""The switch between the implementations of each op.

A choice is written `DEFAULT[,OP=NAME...]`, for example `auto`, `reference` or `reference,nearest=triton`.
It can be given at three levels, the nearest one wins:

1. the keyword `impl="triton"` of a call (a single name, no commas);
2. the process default, `use_impl("reference")`, or in the block's own thread `with using_impl("reference")`;
3. the environment variable `VGLANN_KERNELS`, read at each call and never at import.

Without any of them the choice is `auto`: the Triton kernel where it can run, else the reference. CPU tensors
and the ops in `ONLY_WHEN_ASKED` take the reference under `auto`. Only `auto` may fall back: a name asked for
explicitly that cannot run raises and says why, so `VGLANN_KERNELS=triton` makes every fallback an error.

Under `torch.compile` the choice is made once, when the graph is traced.

In a block `with preferring({"nearest": "faiss"})` the choice of `auto` is the implementation named there, if that
can run. An op that computes layers of several sizes takes a choice for each: `{"upsample_conv 3d 128-64": "triton"}`
holds for the layer `3d 128-64` alone, before a choice for the whole op.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Optional

OPS = (
    "composite",
    "laplacian",
    "composite_laplacian",
    "nearest",
    "latent_adam",
    "batchnorm_relu",
    "step_guard",
    "upsample_conv",
)
# Ops for which `auto` takes the reference, wherever their kernel runs, and why.
ONLY_WHEN_ASKED = {"upsample_conv": "the framework's convolution, unless asked for a kernel"}
# Names that every op understands.
DEFAULTS = ("auto", "triton", "reference")
VARIABLE = "VGLANN_KERNELS"

log = logging.getLogger("vglann_kernels")

# device -> None when it can run there, else the reason
WhyNot = Callable[[Any], Optional[str]]

_registered: dict[str, dict[str, WhyNot]] = {op: {} for op in OPS}
_process_default: str | None = None
# (spec,) inside `using_impl`, in the thread of that block alone.
_of_block: ContextVar[tuple[str | None] | None] = ContextVar("vglann_kernels", default=None)
# Implementations that `auto` takes where they can run, in the thread of the block alone.
_preferred: ContextVar[Mapping[str, str]] = ContextVar(
    "vglann_kernels_preferred", default=MappingProxyType({})
)
_reported: set[Choice] = set()


class ImplUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run here; the message says why and what would."""


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for one op: `impl` is the implementation's name, `reason` one readable clause.

    `layer` names the layer if the choice was made for one layer alone.
    """

    op: str
    impl: str
    reason: str
    layer: str = ""

    def __str__(self) -> str:
        return f"{f'{self.op} {self.layer}'.rstrip()}: {self.impl} ({self.reason})"


def register(op: str, name: str, why_not: WhyNot = lambda device: None) -> None:
    """Register an implementation; an op's module calls this. `why_not(device)` is None when it can run."""
    _registered[op][name] = why_not


def implementations(op: str) -> dict[str, WhyNot]:
    """Return the implementations of `op` by name. Loads the op (and so torch)."""
    if op not in _registered:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    import_module(f"{__package__}.{op}.op")
    return _registered[op]


def parse(spec: str) -> dict[str, str]:
    """Return {"": "reference", "nearest": "triton"} for "reference,nearest=triton"; "" holds the default.

    Raises ValueError on an unknown op or name, and on anything given twice.
    """
    names: dict[str, str] = {}
    for item in spec.split(","):
        op, _, name = item.strip().rpartition("=")
        if op in names:
            raise ValueError(f"kernels {spec!r}: {op or 'the default'} is given twice")
        if op == "" and name not in DEFAULTS:
            expected = f"expected {', '.join(DEFAULTS[:-1])} or {DEFAULTS[-1]}, then OP=NAME for single ops"
            raise ValueError(f"kernels {spec!r}: {expected}")
        if op and name != "auto" and name not in implementations(op):
            known = ", ".join(["auto", *implementations(op)])
            raise ValueError(f"kernels {spec!r}: {op} has no implementation {name!r}; it has {known}")
        names[op] = name
    return names


def use_impl(spec: str | None) -> list[Choice]:
    """Set the process default and return its choice for each op on the best device of this machine.

    `spec` as in the head of this file; None restores `VGLANN_KERNELS`. Raises ValueError on a name that
    does not exist and `ImplUnavailable` on one that cannot run here; the default is then left as it was. Inside a
    `using_impl` block the block's choice is set instead.
    """
    global _process_default
    with using_impl(spec) as chosen:
        pass
    if _of_block.get() is None:
        _process_default = spec
    else:
        _of_block.set((spec,))
    return chosen


@contextmanager
def using_impl(spec: str | None) -> Iterator[list[Choice]]:
    """Choose implementations for a `with` block, in the thread of the block alone; blocks may be nested."""
    if spec is not None:
        parse(spec)
    token = _of_block.set((spec,))
    try:
        chosen = choices()
        for choice in chosen:
            _report(choice)
        yield chosen
    finally:
        _of_block.reset(token)


@contextmanager
def preferring(names: Mapping[str, str]) -> Iterator[None]:
    """Let `auto` take these implementations in a `with` block, by op or layer, where they exist and can run.

    For choices that were measured: unlike a name that was asked for, one that cannot run here is passed over.
    """
    token = _preferred.set(dict(names))
    try:
        yield
    finally:
        _preferred.reset(token)


def choices(device: Any = None) -> list[Choice]:
    """Return the choice for every op on `device` (default: the current CUDA device, else the CPU)."""
    return [resolve(op, device=device) for op in OPS]


def requested(op: str, impl: str | None = None) -> tuple[str, str]:
    """Return (name, source of the name) for one op: keyword, process default, environment, or `auto`."""
    if impl is not None:
        return impl, "impl="
    block = _of_block.get()
    default = _process_default if block is None else block[0]
    if default is not None:
        spec, source = default, "use_impl"
    else:
        spec, source = os.environ.get(VARIABLE, ""), VARIABLE
    if not spec:
        return "auto", "default"
    names = parse(spec)
    if op in names:
        return names[op], source
    return names.get("", "auto"), source


def resolve(
    op: str, impl: str | None = None, device: Any = None, unsupported: str | None = None, layer: str = ""
) -> Choice:
    """Return the implementation that runs `op` on `device`, and the reason.

    `unsupported` is the op's own reason why its Triton kernel does not take these arguments (None: it does).
    `layer` says what a layer computes, in the op's own words, for a choice that holds for such layers alone.
    Raises ValueError for a name the op does not have or arguments that an explicit `triton` does not take,
    and `ImplUnavailable` for a name that cannot run on the device.
    """
    import torch

    known = implementations(op)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    name, source = requested(op, impl)
    if name == "auto":
        return _automatic(op, device, unsupported, known, layer)
    if name not in known:
        raise ValueError(f"{op}: no implementation {name!r} ({source}); it has {', '.join(['auto', *known])}")
    why_not = known[name](device)
    if why_not:
        raise ImplUnavailable(f"{op}: {name} ({source}) cannot run: {why_not}; 'reference' runs everywhere")
    if name == "triton" and unsupported:
        raise ValueError(f"{op}: triton ({source}): {unsupported}; 'reference' takes it")
    return Choice(op, name, f"asked for by {source}")


def _automatic(op: str, device: Any, unsupported: str | None, known: dict[str, WhyNot], layer: str) -> Choice:
    usual = _usual(op, device, unsupported, known)
    for of_layer in (layer, ""):
        preferred = _preferred.get().get(f"{op} {of_layer}".rstrip(), "")
        refused = preferred == "triton" and unsupported
        if preferred in known and not refused and not known[preferred](device):
            if preferred == usual.impl:
                return usual
            return Choice(op, preferred, "measured to be the fastest here", of_layer)
    return usual


def _usual(op: str, device: Any, unsupported: str | None, known: dict[str, WhyNot]) -> Choice:
    """Return the choice where nothing was measured."""
    if device.type == "cpu":
        return Choice(op, "reference", "CPU tensors")
    if op in ONLY_WHEN_ASKED:
        return Choice(op, "reference", ONLY_WHEN_ASKED[op])
    if "triton" not in known:
        return Choice(op, "reference", "this op has no Triton kernel")
    why_not = known["triton"](device) or unsupported
    if why_not:
        return Choice(op, "reference", why_not)
    return Choice(op, "triton", f"runs on {device}")


def chosen(op: str, impl: str | None, device: Any, unsupported: str | None = None, layer: str = "") -> str:
    """Return `resolve(...).impl`, for the ops: reports each new choice once, to the logger `vglann_kernels`.

    Under `torch.compile` its result is a constant, so nothing is logged from inside a graph.
    """
    choice = resolve(op, impl, device, unsupported, layer)
    _report(choice)
    return choice.impl


# torch.compiler.assume_constant_result does the same, but imports torch._dynamo, which takes a second.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _report(choice: Choice) -> None:
    if choice in _reported:
        return
    _reported.add(choice)
    log.info("%s", choice)
