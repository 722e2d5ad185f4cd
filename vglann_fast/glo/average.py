"""An exponential moving average of the generator's parameters, from which a run is evaluated and sampled."""

import copy

import torch
from torch import Tensor

from vglann_fast.glo.generator import TwoStreamGenerator


class GeneratorAverage:
    """A second generator that averages the parameters of `generator`; it is not trained and draws no gradients.

    After step k the average moves by 1 - min(decay, (1 + k) / (10 + k)) of the way, which soon forgets the start. Its
    BatchNorm statistics are re-estimated where it is used.
    """

    def __init__(self, generator: TwoStreamGenerator, decay: float) -> None:
        self.decay = decay
        self.generator = copy.deepcopy(generator).requires_grad_(False)
        self._followed: list[Tensor] = list(generator.parameters())
        self._averages: list[Tensor] = list(self.generator.parameters())

    @torch.no_grad()
    def update(self, step: Tensor, skip: Tensor) -> None:
        """Follow the parameters after step number `step` []; nothing moves where `skip` [] is true."""
        weight = 1 - ((1 + step) / (10 + step)).clamp(max=self.decay)
        weight = weight.to(self._averages[0].dtype).masked_fill(skip, 0.0)
        differences = torch._foreach_sub(self._followed, self._averages)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(self._averages, list(differences))
