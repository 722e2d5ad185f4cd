"""The regression steps of IMLE: from matched noise to latents, without a word from the device between them.

On a GPU one step is captured in a CUDA graph and replayed, since a step of so small a network is some 40 launches
of almost nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETAS = (0.5, 0.999)
WARM_UP_STEPS = 3  # before a capture, as torch.cuda.graph asks for


class Regression:
    """Adam steps that fit `forward` to pairs of noise and latents.

    Args:
        network: whose parameters are trained and whose buffers change with it.
        forward: noise [B,k] -> latents [B,d], through the network.
        lr, weight_decay: of Adam; the rate can be changed between runs.
    """

    def __init__(
        self, network: nn.Module, forward: Callable[[Tensor], Tensor], lr: float, weight_decay: float
    ) -> None:
        self.network, self.forward = network, forward
        device = next(network.parameters()).device
        self._on_gpu = device.type == "cuda"
        rate = torch.tensor(lr, device=device) if self._on_gpu else lr  # a graph reads its rate from memory
        self.optimizer = torch.optim.Adam(
            network.parameters(), rate, betas=BETAS, weight_decay=weight_decay,
            capturable=self._on_gpu, fused=self._on_gpu,
        )  # fmt: skip
        self._graph: tuple[torch.cuda.CUDAGraph, tuple[int, ...], dict[str, Tensor]] | None = None

    def set_rate(self, lr: float) -> None:
        """The learning rate of the steps that follow."""
        for group in self.optimizer.param_groups:
            if self._on_gpu:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def restart(self) -> None:
        """Adam as it was before its first step."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def run(self, noise: Tensor, latents: Tensor, order: Tensor, batch: int) -> Tensor:
        """One pass over the pairs (noise [N,k], latents [N,d]) in `order` [N], the rest of a batch left out.

        Returns the mean loss [], still on the device.
        """
        steps = len(latents) // batch
        table = {"noise": noise, "latents": latents, "order": order}
        if not self._on_gpu:
            table |= self._counters(batch, noise)
            for _ in range(steps):
                self._step(table)
            return table["loss"] / steps
        graph, table = self._captured(table, batch)
        for _ in range(steps):
            graph.replay()
        return table["loss"] / steps

    def _counters(self, batch: int, noise: Tensor) -> dict[str, Tensor]:
        """The places in `order` of the next batch, and the sum of the losses."""
        return {"places": torch.arange(batch, device=noise.device), "loss": noise.new_zeros(())}

    def _step(self, table: dict[str, Tensor]) -> None:
        rows = table["order"].index_select(0, table["places"])
        loss = F.mse_loss(self.forward(table["noise"][rows]), table["latents"][rows])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        table["loss"] += loss.detach()
        table["places"] += len(table["places"])

    def _captured(
        self, table: dict[str, Tensor], batch: int
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        """The graph of a step and the tensors it works on, filled from `table`; captured once a shape."""
        sizes = (*table["noise"].shape, *table["latents"].shape, batch)
        fresh = table | self._counters(batch, table["noise"])
        if self._graph is None or self._graph[1] != sizes:
            own = {name: value.clone() for name, value in fresh.items()}
            graph = torch.cuda.CUDAGraph()
            with self.nothing_happened():
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_STEPS):
                        own["places"].copy_(fresh["places"])
                        self._step(own)
                torch.cuda.current_stream().wait_stream(stream)
                own["places"].copy_(fresh["places"])
                self.optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(graph):
                    self._step(own)
            self._graph = graph, sizes, own
        graph, _, own = self._graph
        for name, value in fresh.items():
            own[name].copy_(value)
        return graph, own

    @contextmanager
    def nothing_happened(self) -> Iterator[None]:
        """After the block the parameters, the buffers and Adam's state hold what they held before it."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        states = {p: {k: v.clone() for k, v in state.items()} for p, state in self.optimizer.state.items()}
        yield
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for parameter, state in self.optimizer.state.items():
                for name, value in state.items():
                    value.copy_(states[parameter][name]) if parameter in states else value.zero_()
