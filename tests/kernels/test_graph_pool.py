"""The two CUDA graphs of a captured step share memory; shown with stand-ins for what needs a GPU."""

from contextlib import contextmanager, nullcontext
from typing import ClassVar

import pytest
import torch

from vglann_fast.glo.cuda_graph import WARM_UP, GraphedStep
from vglann_fast.glo.loader import Batch


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass


class Graph:
    """Captured into the pool it was given, else into one of its own."""

    captured: ClassVar[list["Graph"]] = []

    def __init__(self):
        self.handle = None

    def pool(self):
        return self.handle

    def replay(self):
        pass


@contextmanager
def capture(graph, pool=None, stream=None):
    Graph.captured.append(graph)
    graph.handle = pool if pool is not None else (0, len(Graph.captured))
    yield


@pytest.fixture
def like_a_gpu(monkeypatch):
    monkeypatch.setattr(Graph, "captured", [])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


@pytest.mark.usefixtures("like_a_gpu")
def test_the_graphs_with_and_without_video_share_a_pool():
    clips, rows = torch.zeros(3, 1), torch.tensor([0, 2])
    step = GraphedStep(lambda batch, with_video: (torch.zeros(()), None), clips, 2)
    for with_video in (True, False):
        for _ in range(WARM_UP + 1):
            step(Batch(clips, rows, rows), with_video)
    first, second = Graph.captured
    assert first.pool() == second.pool() == (0, 1)
