"""Numerics of this process: the one place that touches what PyTorch keeps as global state.

Everything else receives tensors and gives tensors back. `numerics` states, for a block, the algorithms, the products
and the threads, and leaves the process as it found it, also if the caller is a program with settings of its own.

With `deterministic`, equal inputs give equal bits on one machine: our kernels sum in a fixed order, PyTorch's
operations are restricted to those that do too, at some cost in time, and no algorithm is chosen by timing. Another
GPU, another number of CPU threads or another version of PyTorch may still round differently.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vglann_fast.errors import VglannError


@dataclass(frozen=True)
class _Settings:
    """Settings that one block asks for; None leaves a setting as it is."""

    deterministic: bool | None
    tf32: bool | None
    threads: int | None


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_lock = threading.RLock()
_blocks: list[_Settings] = []  # those that are open, in the order they began
_found: list[Any] = []  # the state before the first of them
_seeding = threading.RLock()
_computed = False  # in this process, or in the one it was forked from
_threads_lost = False


def _after_fork() -> None:
    """A forked process has none of the threads that OpenMP has started, and would wait for them for ever."""
    global _threads_lost
    _threads_lost = _computed


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def numerics(
    *, deterministic: bool | None = None, tf32: bool | None = None, threads: int | None = None
) -> Iterator[None]:
    """Compute in a stated way inside the block; usable as a decorator.

    Inside, new tensors are float32 whatever the caller's default dtype is. Afterwards the caller's default dtype,
    random state, algorithms and threads are as they were. Blocks may be nested, and open in several threads at a
    time: the settings are the process's, so the block that began last decides, and the state comes back when the
    last one ends. In a process that was forked after such a block, there is one thread.

    Args:
        deterministic: whether only operations run that give the same bits each time. Where it is true, an
            operation that has no such version raises `VglannError`.
        tf32: whether float32 products on a GPU may be computed in TensorFloat-32.
        threads: CPU threads of an operation.
    """
    global _computed
    _computed = True
    block = _Settings(deterministic, tf32, threads)
    with _lock:
        if not _blocks:
            _found.append(_state())
        _blocks.append(block)
        _apply(block)
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if not deterministic or "deterministic" not in reason:
            raise
        raise VglannError(f"--deterministic: {reason.split('. ')[0]}; leave it out on this device") from error
    finally:
        with _lock:
            # By identity: equal settings of another thread are another block.
            del _blocks[next(i for i, other in enumerate(_blocks) if other is block)]
            _restore(_found[0])
            for other in _blocks:
                _apply(other)
            if not _blocks:
                _restore_random_state(_found.pop())


def threads_given() -> bool:
    """Return True if an open block, or the user's environment, states the CPU threads of an operation."""
    return "OMP_NUM_THREADS" in os.environ or any(block.threads is not None for block in _blocks)


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Yield PyTorch's default CPU generator, seeded; its state comes back at the end of the block.

    First parameters are drawn in such blocks: on the CPU, so that they are the same on every device. Threads take
    turns, because the generator belongs to the process.
    """
    with _seeding, torch.random.fork_rng(devices=[]):
        yield torch.default_generator.manual_seed(seed)


def _gpu_products() -> list[Any]:
    """Return the switches for float32 products on a GPU. The older allow_tf32 cannot be mixed with it."""
    cudnn: Any = torch.backends.cudnn
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]


def _products() -> list[Any]:
    """Return the switches for float32 products, on a GPU and by oneDNN on a CPU."""
    mkldnn: Any = torch.backends.mkldnn
    return [*_gpu_products(), mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "fp32_precision": [module.fp32_precision for module in _products()],
        "threads": torch.get_num_threads(),
        "cublas": os.environ.get(_CUBLAS),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
    }


def _apply(settings: _Settings) -> None:
    torch.set_default_dtype(torch.float32)
    if settings.deterministic is not None:
        if settings.deterministic:
            # cuBLAS reads it when it starts.
            os.environ.setdefault(_CUBLAS, ":4096:8")
        _use_deterministic_algorithms(settings.deterministic, warn_only=False)
        torch.backends.cudnn.deterministic = settings.deterministic
        torch.backends.cudnn.benchmark = False
    if settings.tf32 is not None:
        for module in _products():
            module.fp32_precision = "ieee"
        for module in _gpu_products() if settings.tf32 else ():
            module.fp32_precision = "tf32"
    threads = 1 if _threads_lost else settings.threads
    if threads is not None:
        torch.set_num_threads(threads)


def _use_deterministic_algorithms(mode: bool, warn_only: bool) -> None:
    """Restrict PyTorch to deterministic algorithms or not, if it differs: PyTorch's own call imports its compiler."""
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if (mode, warn_only) != now:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _restore(state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["dtype"])
    _use_deterministic_algorithms(state["deterministic"], state["warn_only"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = state["cudnn"]
    for module, precision in zip(_products(), state["fp32_precision"], strict=True):
        module.fp32_precision = precision
    if state["cublas"] is None:
        os.environ.pop(_CUBLAS, None)
    if torch.get_num_threads() != state["threads"]:
        torch.set_num_threads(state["threads"])


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["random"])
    if state["random_cuda"] is not None:
        torch.cuda.set_rng_state_all(state["random_cuda"])
    elif torch.cuda.is_initialized():
        # The block was the first to use a GPU: nothing was drawn there after the caller's torch.manual_seed.
        torch.cuda.manual_seed_all(torch.initial_seed())
