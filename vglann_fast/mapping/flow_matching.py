"""Flow matching: a network that says how noise moves to latents, followed in a few steps when sampling.

Lipman, Chen, Ben-Hamu, Nickel and Le, "Flow Matching for Generative Modeling", 2023; Liu, Gong and Liu, "Flow
Straight and Fast", 2023. From standard normal noise a to a latent b leads the straight path x(t) = (1 - t) a + t b.
The network v(x, t) is fitted to b - a by squared error, with t uniform in [0, 1]. Samples follow dx/dt = v from t = 0
to t = 1.

Latents are multiplied by √d, which makes their numbers as large as the numbers of the noise. Samples are divided by
their norms.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler, Log, learning_rate_factor
from vglann_fast.mapping.perceptron import Perceptron, perceptron_sizes
from vglann_fast.options.mapping import FlowMatchingOptions
from vglann_fast.runtime.numerics import seeded

FREQUENCIES = 4  # of t: cos and sin of pi t, 2 pi t, ...


class FlowMatching(LatentSampler[FlowMatchingOptions]):
    """The mapping of kind "flow-matching"; see `LatentSampler` for its interface."""

    kind = "flow-matching"
    options_class = FlowMatchingOptions

    def __init__(
        self,
        latent_dim: int,
        options: FlowMatchingOptions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_dim, options, device, dtype, seed)
        with seeded(seed):
            network = Perceptron(latent_dim + 2 * FREQUENCIES, options.hidden, latent_dim)
        self.network = network.to(device, dtype)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), options.lr,
            weight_decay=options.weight_decay, fused=self.device.type == "cuda",
        )  # fmt: skip

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
                    row["held_out_loss"] = self._loss(unseen, generator).item()
            self.note(row, log)

    def train_epoch(self, points: Tensor, generator: torch.Generator, epoch: int) -> dict[str, Any]:
        """One pass over points [N, d] in their order, the rest of a batch left out.

        Returns a row for the log with the mean loss. Raises `VglannError` when it is not finite.
        """
        options = self.options
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * learning_rate_factor("cosine", epoch, options.epochs)
        batch = min(options.batch_size, len(points))
        steps = len(points) // batch
        total = torch.zeros((), device=self.device, dtype=self.dtype)  # read once, after the epoch
        for rows in points.split(batch)[:steps]:
            loss = self._loss(rows, generator)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            total += loss.detach()
        mean = (total / steps).item()
        if not mean < float("inf"):
            raise VglannError(f"flow-matching: the loss is not finite in epoch {epoch}; lower --lr")
        return {"epoch": epoch, "loss": mean}

    def _loss(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error [] of the velocity at a random time on the path from noise to each point [B, d]."""
        noise = self._noise(len(points), generator)
        t = torch.rand(len(points), 1, generator=generator, device=self.device, dtype=self.dtype)
        return F.mse_loss(self.velocity(torch.lerp(noise, points, t), t), points - noise)

    def _scaled(self, latents: Tensor) -> Tensor:
        return F.normalize(latents.to(self.dtype), dim=1) * math.sqrt(self.latent_dim)

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        size = (n, self.latent_dim)
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d], unit rows; one evaluation of the network a step by Euler's rule, two by Heun's."""
        return F.normalize(self.follow(self._noise(n, generator)), dim=1)

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

    @classmethod
    def sizes(cls, latent_dim: int, options: FlowMatchingOptions) -> Iterable[tuple[str, tuple[int, ...]]]:
        """The three layers."""
        return perceptron_sizes(latent_dim + 2 * FREQUENCIES, options.hidden, latent_dim)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the network."""
        return self.network.state_dict()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the parameters of the network."""
        self.network.load_state_dict(tensors)
