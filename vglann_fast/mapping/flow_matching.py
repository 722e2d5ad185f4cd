"""Flow matching: a network that says how noise moves to latents, followed in a few steps when sampling.

Lipman, Chen, Ben-Hamu, Nickel and Le, "Flow Matching for Generative Modeling", 2023; Liu, Gong and Liu, "Flow
Straight and Fast", 2023. From standard normal noise a to a latent b leads the straight path x(t) = (1 - t) a + t b.
The network v(x, t) is fitted to b - a by squared error, with t uniform in [0, 1]. Samples follow dx/dt = v from t = 0
to t = 1.

Latents are multiplied by √d, which makes their numbers as large as the numbers of the noise. Samples are divided by
their norms.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.mapping.base import Log
from vglann_fast.mapping.perceptron import PerceptronSampler
from vglann_fast.options.mapping import FlowMatchingOptions

FREQUENCIES = 4  # of t: cos and sin of pi t, 2 pi t, ...


class FlowMatching(PerceptronSampler[FlowMatchingOptions]):
    """The mapping of kind "flow-matching"; see `LatentSampler` for its interface."""

    kind = "flow-matching"
    options_class = FlowMatchingOptions

    @staticmethod
    def inputs(latent_dim: int, options: FlowMatchingOptions) -> int:
        """Return the numbers of a point and its time."""
        return latent_dim + 2 * FREQUENCIES

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t): points [B, d] at times [B, 1] -> [B, d]."""
        angle = t * math.pi * torch.arange(1, FREQUENCIES + 1, device=x.device, dtype=x.dtype)
        return self.network(torch.cat([x, angle.cos(), angle.sin()], dim=1))

    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Fit to the directions of latents [N, d]; the loss of `held_out` [n, d] is in every row."""
        self.check_latents(latents)
        points = self._scaled(latents)
        unseen = None if held_out is None else self._scaled(held_out)
        for epoch in range(self.options.epochs):
            order = torch.randperm(len(points), generator=generator, device=self.device)
            row = self.train_epoch(points[order], generator, epoch)
            if unseen is not None:
                with torch.no_grad():
                    row["held_out_loss"] = self.loss(unseen, generator).item()
            self.note(row, log)

    def loss(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean squared error [] of the velocity on the path to each point [B, d], at a random time."""
        noise = self.normal(len(points), self.latent_dim, generator)
        t = torch.rand(len(points), 1, generator=generator, device=self.device, dtype=self.dtype)
        return F.mse_loss(self.velocity(torch.lerp(noise, points, t), t), points - noise)

    def _scaled(self, latents: Tensor) -> Tensor:
        return F.normalize(latents.to(self.dtype), dim=1) * math.sqrt(self.latent_dim)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d], unit rows; one evaluation of the network a step by Euler's rule, two by Heun's."""
        return F.normalize(self.follow(self.normal(n, self.latent_dim, generator)), dim=1)

    def follow(self, x: Tensor) -> Tensor:
        """Points [n, d] at time 0 -> the same at time 1."""
        length = 1.0 / self.options.steps
        for step in range(self.options.steps):
            t = torch.full((len(x), 1), step * length, device=x.device, dtype=x.dtype)
            velocity = self.velocity(x, t)
            if self.options.solver == "heun":
                velocity = 0.5 * (velocity + self.velocity(x + length * velocity, t + length))
            x = x + length * velocity
        return x
