"""Several processes working together, as `torchrun` starts them.

In a training process r of W owns the clips r, r + W, r + 2W, ... of the clip set, and their rows of the latent table.
Gradients of latents never leave their process, and no clip is visited twice to make the shares equal. Gradients of
the generator are summed over all processes, together with the loss, in one all-reduce a step. An evaluation deals out
blocks of videos in the same way.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.run.environment import launched

T = TypeVar("T")

log = logging.getLogger("vglann_fast")

MEETING = timedelta(minutes=5)  # for all processes to be started
LAST_WORDS = timedelta(seconds=10)  # for the same, when one has failed before it came to meet them
TIMEOUT = timedelta(minutes=10)  # without a word from another process; writing a checkpoint must fit in


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `size`. `control` carries words between hosts, on the CPU.

    Every method but `owns` and `share` is a collective: all processes call it, in the same order. They raise
    `VglannError` when another process has ended.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    def owns(self, count: int) -> Tensor:
        """The rows of 0..count-1 that belong to this process, ascending, int64."""
        return torch.arange(self.rank, count, self.size)

    def sum_gradients(self, parameters: Iterable[Tensor], loss: Tensor) -> Tensor:
        """Add up the gradients of `parameters` over all processes, in place; returns the sum of `loss` [].

        One buffer, so a loss that is not finite anywhere is seen everywhere at the same step.
        """
        if self.size == 1:
            return loss
        gradients = [p.grad for p in parameters if p.grad is not None]
        # Memory order, not logical order: a channels-last gradient is then read as it lies.
        pieces = [_as_it_lies(gradient) for gradient in gradients]
        buffer = torch.cat([*pieces, loss.detach().to(pieces[0].dtype).reshape(1)])
        with another_process_may_have_ended():
            dist.all_reduce(buffer)
        split = buffer[:-1].split([piece.numel() for piece in pieces])
        torch._foreach_copy_(pieces, list(split))
        return buffer[-1].to(loss.dtype)

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        with another_process_may_have_ended():
            dist.all_reduce(total, group=self.control)
        return total.item() / self.size

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of work for this process: one in every `size`."""
        return items[self.rank :: self.size]

    def gather_shares(self, own: list[T]) -> list[T]:
        """Return the results of all processes for their `share`, in the order of the items, in every process.

        own: objects that pickle can hold, tensors on the CPU among them, one for each item of the share.
        """
        if self.size == 1:
            return own
        lists: list[Any] = [None] * self.size
        with another_process_may_have_ended():
            dist.all_gather_object(lists, own, group=self.control)
        return [lists[place % self.size][place // self.size] for place in range(sum(map(len, lists)))]

    def from_first(self, value: T) -> T:
        """Return the `value` of process 0, in every process: an object that pickle can hold."""
        if self.size == 1:
            return value
        box = [value]
        with another_process_may_have_ended():
            dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def gather_words(self, words: list[str]) -> list[str]:
        """The lists of all processes, one after the other, in every process."""
        if self.size == 1:
            return words
        lists: list[Any] = [None] * self.size
        with another_process_may_have_ended():
            dist.all_gather_object(lists, words, group=self.control)
        return [word for one in lists for word in one]

    def gather_rows(self, own: Tensor, count: int) -> Tensor:
        """Rows [count, ...] of the whole table, in every process, from each process's `own` rows; on the CPU."""
        if self.size == 1:
            return own
        padded = torch.zeros(-(-count // self.size), *own.shape[1:], dtype=own.dtype)
        padded[: len(own)] = own.detach().cpu()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with another_process_may_have_ended():
            dist.all_gather(parts, padded, group=self.control)
        whole = torch.empty(count, *own.shape[1:], dtype=own.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part[: len(range(rank, count, self.size))]
        return whole

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` by the tensors of process 0."""
        if self.size > 1:
            with another_process_may_have_ended():
                for tensor in tensors:
                    dist.broadcast(_as_it_lies(tensor), 0)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            with another_process_may_have_ended():
                dist.barrier(group=self.control)


def suggest_all_gpus(device: torch.device, ranks: Ranks) -> None:
    """Log one line where a training takes one of several GPUs, unless its user has named that one."""
    if device.type != "cuda" or device.index is not None or ranks.size > 1:
        return
    if (count := torch.cuda.device_count()) > 1:
        log.info(
            "one of %d GPUs is used; `torchrun --nproc-per-node %d -m vglann_fast train ...` uses all",
            count,
            count,
        )


class StopAgreement:
    """Lets all processes stop after the same step, without waiting for each other at every step.

    Each step asks "was any of us told to stop?" and hears the answer to the question of the step before.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked: tuple[Tensor, Any] | None = None

    def agreed(self, told: bool) -> bool:
        """Called once a step by every process: whether all of them stop now. Alone: `told`."""
        if self._ranks.size == 1:
            return told
        answer = self.close()
        value = torch.tensor(int(told))
        with another_process_may_have_ended():
            self._asked = value, dist.all_reduce(value, group=self._ranks.control, async_op=True)
        return answer

    def close(self) -> bool:
        """Wait for the last answer; nothing is on its way afterwards."""
        if self._asked is None:
            return False
        value, work = self._asked
        self._asked = None
        with another_process_may_have_ended():
            work.wait()
        return bool(value)


@contextmanager
def joined(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The processes `torchrun` started, as long as the block lasts; without torchrun, this process alone.

    A process that ends or falls silent makes the others raise `VglannError`: at once where its connections
    close, after `timeout` where it hangs.
    """
    size = launched().size
    if size == 1:
        yield Ranks()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, _ = _meeting(MEETING)
        # The store still has the words of an earlier group, and a second one of its name would wait forever.
        name = f"group {next(_groups)}"
        dist.init_process_group(
            backend, timeout=timeout, store=dist.PrefixStore(name, store), rank=rank, world_size=size
        )
    except (ValueError, RuntimeError) as error:
        raise VglannError(
            f"the processes did not find each other: {error}; start them with torchrun"
        ) from error
    try:
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        yield Ranks(dist.get_rank(), size, control)
    except Exception:
        first_to_fail()  # before the others notice: theirs would only be that this one has gone
        raise
    finally:
        dist.destroy_process_group()


_met: list[tuple[Any, int, int]] = []
_groups = itertools.count()


def _meeting(patience: timedelta) -> tuple[Any, int, int]:
    """(store, rank, size): where the processes of this job meet. Raises ValueError or RuntimeError."""
    if not _met:
        _met.append(next(dist.rendezvous("env://", timeout=patience)))
    return _met[0]


@cache
def first_to_fail() -> bool:
    """Return True if this is the first process of the job to fail; asked once, and the answer stays.

    Also True when the store is unreachable: the others may never have come to say anything.
    """
    try:
        return dist.PrefixStore("vglann", _meeting(LAST_WORDS)[0]).add("failed", 1) == 1
    except (ValueError, RuntimeError):
        return True


@contextmanager
def another_process_may_have_ended() -> Iterator[None]:
    """Name the cause of a failed collective: that process's own message is above this one."""
    try:
        yield
    except RuntimeError as error:
        raise VglannError(
            "another process of this job has ended or hangs; its own message is the one to read. "
            f"Continue a training with --resume ({str(error).splitlines()[0][:120]})"
        ) from error


def _as_it_lies(tensor: Tensor) -> Tensor:
    """A dense tensor as a vector in the order of its memory; a view."""
    tensor = tensor.detach()
    strides, sizes = tensor.stride(), tensor.shape
    order = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], -sizes[axis]))
    return tensor.permute(order).view(-1)
