"""For tests in the interpreter: count the bytes kernels move, and poison memory before they write it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class Traffic:
    """Counts the bytes loaded and stored by kernels inside a `with` block.

    `bytes` counts every access. `unique` counts an address once for its loads and once for its stores, and its
    loads not at all where the kernels stored it before: what a cache that holds everything leaves for memory.
    """

    def __enter__(self) -> "Traffic":
        from triton.runtime import interpreter

        self.bytes, self._time, self._seen = 0, 0, {"load": [], "store": []}
        self._builder = interpreter.InterpreterBuilder
        self._load, self._store = self._builder.create_masked_load, self._builder.create_masked_store
        count, load, store = self._count, self._load, self._store

        def counted_load(builder, ptrs, mask, *rest):
            count("load", ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            count("store", ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        self._builder.create_masked_load, self._builder.create_masked_store = counted_load, counted_store
        return self

    def __exit__(self, *exception: object) -> None:
        self._builder.create_masked_load, self._builder.create_masked_store = self._load, self._store

    def _count(self, kind, ptrs, mask) -> None:
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        at = np.asarray(ptrs.data)[np.asarray(mask.data, dtype=bool)].ravel().astype(np.int64)
        self.bytes += at.size * width
        self._time += 1
        self._seen[kind].append((at, np.full(at.size, width), np.full(at.size, self._time)))

    @property
    def unique(self) -> int:
        first = {}
        for kind, parts in self._seen.items():
            at, width, time = (
                np.concatenate([part[i] for part in parts] or [np.zeros(0, int)]) for i in range(3)
            )
            at, place = np.unique(at, return_index=True)  # the first access of each address
            first[kind] = at, width[place], time[place]
        at, width, time = first["load"]
        stored, stored_width, stored_time = first["store"]
        if stored.size:
            place = np.searchsorted(stored, at).clip(max=stored.size - 1)
            width = width[(stored[place] != at) | (stored_time[place] > time)]
        return int(width.sum() + stored_width.sum())


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised floating tensors hold NaN inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
