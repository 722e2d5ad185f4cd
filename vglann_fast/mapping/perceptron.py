"""A multilayer perceptron and its training, for the mappings drifting and flow matching."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler, learning_rate_factor
from vglann_fast.options.mapping import DriftingOptions, FlowMatchingOptions
from vglann_fast.runtime.numerics import seeded

Options = TypeVar("Options", bound=DriftingOptions | FlowMatchingOptions)


class Perceptron(nn.Module):
    """[B, inputs] -> [B, outputs] through two hidden layers with biases and SiLU."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.linear2(F.silu(self.linear1(x)))))


class PerceptronSampler(LatentSampler[Options]):
    """A mapping whose only tensors are the parameters of a `Perceptron`, trained by AdamW with cosine decay."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __init__(
        self,
        latent_dim: int,
        options: Options,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_dim, options, device, dtype, seed)
        with seeded(seed):
            network = Perceptron(self.inputs(latent_dim, options), options.hidden, latent_dim)
        self.network = network.to(device, dtype)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), options.lr, self.betas,
            weight_decay=options.weight_decay, fused=self.device.type == "cuda",
        )  # fmt: skip

    @staticmethod
    @abstractmethod
    def inputs(latent_dim: int, options: Any) -> int:
        """Return the number of inputs of the network."""

    @abstractmethod
    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss [] of a batch of rows [B, d]; what is random comes from `generator`."""

    def train_epoch(self, rows: Tensor, generator: torch.Generator, epoch: int) -> dict[str, Any]:
        """Take one pass over rows [N, d] in their order, the rest of a batch left out.

        Returns a row for the log with the mean loss. Raises `VglannError` when it is not finite.
        """
        options = self.options
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * learning_rate_factor("cosine", epoch, options.epochs)
        batch = min(options.batch_size, len(rows))
        steps = len(rows) // batch
        # Read once, after the epoch.
        total = torch.zeros((), device=self.device, dtype=self.dtype)
        for some in rows.split(batch)[:steps]:
            loss = self.loss(some, generator)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            total += loss.detach()
        mean = (total / steps).item()
        if not mean < float("inf"):
            raise VglannError(f"{self.kind}: the loss is not finite in epoch {epoch}; lower --lr")
        return {"epoch": epoch, "loss": mean}

    def normal(self, n: int, numbers: int, generator: torch.Generator) -> Tensor:
        """Return standard normal noise [n, numbers]."""
        return torch.randn((n, numbers), generator=generator, device=self.device, dtype=self.dtype)

    @classmethod
    def sizes(cls, latent_dim: int, options: Options) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Return the weights of the three layers."""
        hidden = options.hidden
        yield "linear1.weight", (hidden, cls.inputs(latent_dim, options))
        yield "linear2.weight", (hidden, hidden)
        yield "out.weight", (latent_dim, hidden)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of the network."""
        return self.network.state_dict()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the parameters of the network."""
        self.network.load_state_dict(tensors)
