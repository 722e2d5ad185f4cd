"""What every mapping from noise to latents can do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

Log = Callable[[dict[str, Any]], None]


class Mapping(Protocol):
    """A sampler of latents, fitted to the latents of a trained generator.

    A mapping is stored as `mapping.safetensors` (its tensors) and `mapping.json`:
    {"format": "vglann-mapping", "version": 1, "kind", "latent_dim", "options": {...}, "epochs": [row, ...]}.
    """

    kind: str

    def fit(self, latents: Tensor, generator: torch.Generator, log: Log | None = None) -> None:
        """Fit to latents [N, d]; `log` receives one row per epoch. Raises `VglannError` for NaN or too few."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n new latents [n, d], all randomness from `generator`, which lives on the mapping's device."""

    def save(self, folder: Path) -> None:
        """Write mapping.safetensors and mapping.json into `folder`."""

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Read what `save` wrote. Raises `VglannError` for a folder that is not such a mapping."""
