"""The whole training step as one CUDA graph: captured once, then replayed with a single launch.

Right by construction, as far as that goes without a GPU: all that changes from step to step lies in tensors that
keep their place (rows of the batch, learning rates, Adam's counters and moments, the guard), gradients are made
inside the graph's own memory, and nothing in the step looks at a value from the host. What it was not tried with is
refused, see `compatibility.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vglann_fast.glo.loader import Batch

Step = Callable[[Batch, bool], tuple[Tensor, Tensor | None]]  # (batch, with_video) -> (loss, video)

WARM_UP = 3  # steps taken eagerly first, on the capturing stream: lazy initialization cannot be captured


class GraphedStep:
    """`step`, eager for its first calls and replayed afterwards. Two graphs: with and without the video.

    The clip table must be the same tensor at every call, and the batches of one size.
    """

    def __init__(self, step: Step, clips: Tensor, batch_size: int) -> None:
        self._step = step
        rows = torch.zeros(batch_size, dtype=torch.int64, device=clips.device)
        self._batch = Batch(clips, rows, rows)  # resident clips: rows of the table are rows of the latents
        self._stream = torch.cuda.Stream(clips.device)
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor | None]]] = {}
        self._calls = {True: 0, False: 0}
        # Only one of the two graphs runs at a time, so their activations can share memory.
        self._pool: Any = None

    def __call__(self, batch: Batch, with_video: bool) -> tuple[Tensor, Tensor | None]:
        """One training step; the tensors it returns are overwritten by the next."""
        if batch.clips is not self._batch.clips or batch.rows.shape != self._batch.rows.shape:
            raise ValueError("batch: a captured step reads one table, in batches of one size")
        current = torch.cuda.current_stream(batch.clips.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._batch.rows.copy_(batch.rows)
            batch.rows.record_stream(self._stream)
            result = self._run(with_video)
        current.wait_stream(self._stream)
        return result

    def forget(self) -> None:
        """Capture again, since the step does something else from now on."""
        self._graphs.clear()
        self._calls = {True: 0, False: 0}

    def _run(self, with_video: bool) -> tuple[Tensor, Tensor | None]:
        if self._calls[with_video] < WARM_UP:
            self._calls[with_video] += 1
            return self._step(self._batch, with_video)
        if with_video not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # Capturing runs nothing: the step counts when it is replayed below.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = self._step(self._batch, with_video)
            self._pool = graph.pool()
            self._graphs[with_video] = (graph, result)
        graph, result = self._graphs[with_video]
        graph.replay()
        return result
