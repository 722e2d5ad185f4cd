"""A variational autoencoder of latents: its decoder maps noise to latents.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2014. Two hidden layers each way; the decoder's output is
divided by its norm, since latents lie on the unit sphere. The loss is summed over a batch, as in the paper's
author's code: squared error + kl_weight * KL(code's distribution || standard normal).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import LatentSampler, Log, learning_rate_factor
from vglann_fast.options.mapping import VaeOptions
from vglann_fast.runtime.numerics import seeded

BETAS = (0.5, 0.999)


class LatentAutoencoder(nn.Module):
    """latents [B, latent_dim] -> the mean and log-variance of their codes [B, noise_dim], and back."""

    def __init__(self, noise_dim: int, hidden: int, latent_dim: int) -> None:
        super().__init__()
        self.encode1 = nn.Linear(latent_dim, hidden)
        self.encode2 = nn.Linear(hidden, hidden)
        self.mean = nn.Linear(hidden, noise_dim)
        self.log_variance = nn.Linear(hidden, noise_dim)
        self.decode1 = nn.Linear(noise_dim, hidden)
        self.decode2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, latent_dim)

    def encode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, noise_dim] of the codes of latents [B, latent_dim]."""
        x = F.relu(self.encode2(F.relu(self.encode1(latents))))
        return self.mean(x), self.log_variance(x)

    def decode(self, codes: Tensor) -> Tensor:
        """Unit rows [B, latent_dim] from codes [B, noise_dim]."""
        return F.normalize(self.out(F.relu(self.decode2(F.relu(self.decode1(codes))))), dim=1)

    def forward(self, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Summed squared error [] and summed divergence [] of latents [B, latent_dim], their codes drawn with
        standard normal `noise` [B, noise_dim]."""
        mean, log_variance = self.encode(latents)
        decoded = self.decode(mean + noise * torch.exp(0.5 * log_variance))
        error = (decoded - latents).square().sum()
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return error, divergence


class VAE(LatentSampler[VaeOptions]):
    """The mapping of kind "vae"; see `vglann_fast.mapping.base.LatentSampler` for what it can do."""

    kind = "vae"
    options_class = VaeOptions

    def __init__(
        self,
        latent_dim: int,
        options: VaeOptions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(latent_dim, options, device, dtype, seed)
        with seeded(seed):
            network = LatentAutoencoder(options.noise_dim, options.hidden, latent_dim)
        self.network = network.to(device, dtype)
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Adam:
        options = self.options
        return torch.optim.Adam(
            self.network.parameters(), options.lr, BETAS,
            weight_decay=options.weight_decay, fused=self.device.type == "cuda",
        )  # fmt: skip

    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Fit to latents [N, d]; the loss of `held_out` [n, d] is in every row."""
        self.check_latents(latents)
        for epoch in range(self.options.epochs):
            order = torch.randperm(len(latents), generator=generator, device=self.device)
            row = self.train_epoch(latents, order, self._noise(len(latents), generator), epoch)
            if held_out is not None:
                with torch.no_grad():
                    error, divergence = self.network(held_out, self._noise(len(held_out), generator))
                loss = (error + self.options.kl_weight * divergence) / len(held_out)
                row["held_out_loss"] = loss.item()
            self.note(row, log)

    def train_epoch(self, latents: Tensor, order: Tensor, noise: Tensor, epoch: int) -> dict[str, Any]:
        """Adam steps over latents [N, d] in `order` (a permutation of N), the rest of a batch left out.

        `noise` [N, noise_dim] is used from the top. Returns a row for the log: the mean over latents of the loss
        and of its two parts. Raises `VglannError` when the loss is not finite.
        """
        options = self.options
        if options.adam_state == "per-epoch":
            self._optimizer = self._new_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * learning_rate_factor(options.schedule, epoch, options.epochs)
        batch = min(options.batch_size, len(latents))
        steps = len(latents) // batch
        total = torch.zeros(2, device=self.device, dtype=self.dtype)  # read once, after the epoch
        for rows, drawn in zip(order.split(batch)[:steps], noise.split(batch)[:steps], strict=True):
            error, divergence = self.network(latents[rows], drawn)
            self._optimizer.zero_grad(set_to_none=True)
            (error + options.kl_weight * divergence).backward()
            self._optimizer.step()
            total += torch.stack((error, divergence)).detach()
        error_mean, divergence_mean = (total / (steps * batch)).tolist()
        loss = error_mean + options.kl_weight * divergence_mean
        if not loss < float("inf"):
            raise VglannError(f"vae: the loss is not finite in epoch {epoch}; lower --lr")
        return {"epoch": epoch, "loss": loss, "squared_error": error_mean, "divergence": divergence_mean}

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        size = (n, self.options.noise_dim)
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d], unit rows: decoded standard normal noise."""
        return self.network.decode(self._noise(n, generator))

    @classmethod
    def sizes(cls, latent_dim: int, options: VaeOptions) -> Iterable[tuple[str, tuple[int, ...]]]:
        """The decoder's layers; the encoder has the same."""
        yield "decode1.weight", (options.hidden, options.noise_dim)
        yield "decode2.weight", (options.hidden, options.hidden)
        yield "out.weight", (latent_dim, options.hidden)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the network."""
        return self.network.state_dict()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the parameters of the network."""
        self.network.load_state_dict(tensors)
