"""The multilayer perceptron of the mappings that need no normalization: drifting and flow matching."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """[B, inputs] -> [B, outputs] through two hidden layers with biases and SiLU."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.linear2(F.silu(self.linear1(x)))))


def perceptron_sizes(inputs: int, hidden: int, outputs: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the weights of a `Perceptron`."""
    yield "linear1.weight", (hidden, inputs)
    yield "linear2.weight", (hidden, hidden)
    yield "out.weight", (outputs, hidden)
