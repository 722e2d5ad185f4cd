"""Implicit maximum likelihood estimation: a network from noise to latents, fitted by exact nearest neighbours.

Each epoch draws a pool of noise, maps it, finds for every latent the nearest mapped noise vector, and regresses
the network from these noise vectors to their latents. Every latent is matched, so no mode is dropped.
Li and Malik, "Implicit Maximum Likelihood Estimation", 2018; on latents of a generator: Hoshen, Li and Malik,
"Non-Adversarial Image Synthesis with Generative Latent Nearest Neighbors", 2019.
"""

import json
import math
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vglann_kernels import nearest_rows

from vglann_fast.config import MapOptions, options_from_json, options_to_json
from vglann_fast.errors import VglannError
from vglann_fast.mapping.base import Log

BETAS = (0.5, 0.999)
HALVING_EPOCHS = 50
MAPPING_FORMAT = ("vglann-mapping", 1)


def learning_rate_factor(options: MapOptions, epoch: int) -> float:
    """What the starting rate is multiplied by in `epoch`, counted from 0."""
    if options.schedule == "halving":
        return 0.5 ** (epoch // HALVING_EPOCHS)
    return 0.5 * (1.0 + math.cos(math.pi * epoch / options.epochs))


class MappingNetwork(nn.Module):
    """noise [B, noise_dim] -> latents [B, latent_dim]: two hidden layers without biases, BatchNorm and ReLU."""

    def __init__(self, noise_dim: int, hidden: int, latent_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(noise_dim, hidden, bias=False)
        self.norm1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.out = nn.Linear(hidden, latent_dim, bias=False)

    def forward(self, noise: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.linear1(noise)))
        x = F.relu(self.norm2(self.linear2(x)))
        return self.out(x)


class IMLE:
    """The mapping of kind "imle"; see `vglann_fast.mapping.base.Mapping` for the protocol.

    Args:
        latent_dim: length of a latent.
        options: sizes, schedule and the choices in which `paper` and `modern` differ.
        device, dtype: where and in what the network computes.
        seed: of the first parameters.
    """

    kind = "imle"

    def __init__(
        self,
        latent_dim: int,
        options: MapOptions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.latent_dim = latent_dim
        self.options = options
        with torch.random.fork_rng(devices=[]):  # on the CPU: the same parameters on every device
            torch.manual_seed(seed)
            network = MappingNetwork(options.noise_dim, options.hidden, latent_dim)
        self.network = network.to(device, dtype)
        self.epochs: list[dict[str, Any]] = []
        self._optimizer = self._new_optimizer()

    def __call__(self, noise: Tensor) -> Tensor:
        """noise [B, noise_dim] -> latents [B, d], unit rows if `options.normalise`."""
        mapped = self.network(noise)
        return F.normalize(mapped, dim=1) if self.options.normalise else mapped

    def fit(self, latents: Tensor, generator: torch.Generator, log: Log | None = None) -> None:
        """Fit to latents [N, d], N >= 2. Raises `VglannError` for non-finite latents or fewer than two."""
        if latents.ndim != 2 or latents.shape[0] < 2 or latents.shape[1] != self.latent_dim:
            raise VglannError(
                f"latents: expected at least 2 rows of {self.latent_dim}, got {list(latents.shape)}"
            )
        if not torch.isfinite(latents).all():
            raise VglannError(
                "latents: some are NaN or infinite; the training diverged, go back to a checkpoint"
            )
        for epoch in range(self.options.epochs):
            order = torch.randperm(len(latents), generator=generator, device=latents.device)
            row = self.train_epoch(latents, self.draw_pool(len(latents), generator), order, epoch)
            self.epochs.append(row)
            if log is not None:
                log(row)
        self.network.eval()

    def draw_pool(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """The noise of one epoch over n latents: blocks [block, noise_dim], pool_factor * n vectors in all."""
        block = min(self.options.batch_size, n * self.options.pool_factor)
        weight = self.network.out.weight
        return [
            torch.randn(
                block, self.options.noise_dim, generator=generator, device=weight.device, dtype=weight.dtype
            )
            for _ in range(n * self.options.pool_factor // block)
        ]

    def train_epoch(self, latents: Tensor, blocks: list[Tensor], order: Tensor, epoch: int) -> dict[str, Any]:
        """Match latents [N, d] to the mapped `blocks` of noise, then regress in `order` (a permutation of N).

        Returns a row for the log: mean loss of the steps, mean Euclidean distance of the matches, and hubness,
        the number of distinct noise vectors matched over N.
        """
        options = self.options
        if options.adam_state == "per-epoch":
            self._optimizer = self._new_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * learning_rate_factor(options, epoch)
        self.network.train()
        with torch.no_grad():
            mapped = torch.cat([self(block) for block in blocks])
        match, squared = nearest_rows(latents, mapped)
        noise = torch.cat(blocks)[match]
        losses = []
        batch = min(options.batch_size, len(latents))
        for step in range(len(latents) // batch):
            rows = order[step * batch : (step + 1) * batch]
            loss = F.mse_loss(self(noise[rows]), latents[rows])
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            losses.append(loss.detach())
        return {
            "epoch": epoch,
            "loss": torch.stack(losses).mean().item(),
            "match_distance": squared.sqrt().mean().item(),
            "hubness": match.unique().numel() / len(latents),
        }

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n latents [n, d]; with batchnorm="train" in blocks of the batch size, as the author samples."""
        weight = self.network.out.weight
        noise = torch.randn(
            n, self.options.noise_dim, generator=generator, device=weight.device, dtype=weight.dtype
        )
        if self.options.batchnorm == "eval":
            self.network.eval()
            return self(noise)
        if n < 2:
            raise VglannError("-n: this mapping needs at least 2 samples (BatchNorm in train mode)")
        # The running statistics are not those of the samples: keep them as the training left them.
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        self.network.train()
        chunks = torch.tensor_split(noise, -(-n // self.options.batch_size))
        samples = torch.cat([self(chunk) for chunk in chunks])
        for name, buffer in self.network.named_buffers():
            buffer.copy_(buffers[name])
        return samples

    def save(self, folder: Path) -> None:
        """Write mapping.safetensors and mapping.json into `folder`."""
        from safetensors.torch import save_file

        save_file(
            {key: value.cpu().contiguous() for key, value in self.network.state_dict().items()},
            folder / "mapping.safetensors",
        )
        name, version = MAPPING_FORMAT
        record = {
            "format": name,
            "version": version,
            "kind": self.kind,
            "latent_dim": self.latent_dim,
            "options": options_to_json(self.options),
            "epochs": self.epochs,
        }
        (folder / "mapping.json").write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Read what `save` wrote."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            record = json.loads((folder / "mapping.json").read_text())
            if (record["format"], record["version"], record["kind"]) != (*MAPPING_FORMAT, cls.kind):
                raise ValueError("not a mapping of this kind and version")
            mapping = cls(record["latent_dim"], options_from_json(MapOptions, record["options"]), device)
            mapping.network.load_state_dict(load_file(folder / "mapping.safetensors", device=str(device)))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise VglannError(
                f"{folder}: not a mapping that can be read ({error}); run `vglann map` again"
            ) from error
        mapping.epochs = record["epochs"]
        mapping.network.eval()
        return mapping

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            self.network.parameters(), self.options.lr, betas=BETAS, weight_decay=self.options.weight_decay
        )
