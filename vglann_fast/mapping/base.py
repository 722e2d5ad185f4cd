"""Interface of every mapping from noise to latents, and how it is stored.

A mapping of a run lies in mapping/<kind>/:

    mapping.safetensors   its tensors by name
    mapping.json          {"format": "vglann-mapping", "version": 1, "kind", "latent_dim", "options": {...},
                          "epochs": [row, ...], "gap": record or null}

A row says how one epoch went. "gap", missing in older files, says how near the mapping comes to the latents it was
fitted to and to held-out latents; see `vglann_fast.mapping.generalization`.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.options.aliases import read_mapping
from vglann_fast.options.fields import options_from_json, options_to_json
from vglann_fast.options.mapping import MapOptions
from vglann_fast.options.training import MAXIMA
from vglann_fast.run.files import load_tensors, read_json, save_tensors

MAPPING_FORMAT = ("vglann-mapping", 1)
MAPPING_FILE = "mapping.json"
HALVING_EPOCHS = 50  # of schedule "halve-every-50"

Log = Callable[[dict[str, Any]], None]
Options = TypeVar("Options", bound=MapOptions)


class LatentSampler(ABC, Generic[Options]):
    """A sampler of latents, fitted to the latents of a trained generator.

    Args:
        latent_dim: length of a latent.
        options: of this kind.
        device, dtype: where and in what it computes.
        seed: of the first parameters, where there are such.
    """

    kind: ClassVar[str]
    options_class: ClassVar[type[MapOptions]]

    def __init__(
        self,
        latent_dim: int,
        options: Options,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.latent_dim = latent_dim
        self.options = options
        self.device = torch.device(device)
        self.dtype = dtype
        self.seed = seed
        self.epochs: list[dict[str, Any]] = []
        self.gap: dict[str, Any] | None = None

    @property
    def most_epochs(self) -> int:
        """The most rows that `fit` logs."""
        return getattr(self.options, "epochs", 1)

    @abstractmethod
    def fit(
        self,
        latents: Tensor,
        generator: torch.Generator,
        log: Log | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """Fit to latents [N, d], on the mapping's device.

        `generator` lives there too. `log` receives one row per epoch, {"epoch": from 0, "loss", ...}. `held_out`
        [n, d] are latents to choose by, not to fit. Raises `VglannError` for NaN or too few.
        """

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n new latents [n, d], all randomness from `generator`, which lives on the mapping's device."""

    def log_density(self, latents: Tensor) -> Tensor | None:
        """Log of the density of the directions of samples at the directions of latents [n, d]: [n], in nats above
        the density of directions drawn uniformly. None for a kind that has no density.

        Directions, since a generator divides a latent by its norm.
        """
        return None

    @classmethod
    def sizes(cls, latent_dim: int, options: Options) -> Iterable[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the largest of the `tensors`, lazily; none for a kind that takes memory by no option."""
        return ()

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what has to be stored, by name."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises `KeyError`, `ValueError` or `RuntimeError` for other tensors."""

    def save(self, folder: Path) -> None:
        """Write mapping.safetensors and mapping.json into `folder`."""
        save_tensors(self.tensors(), folder / "mapping.safetensors")
        name, version = MAPPING_FORMAT
        record = {
            "format": name,
            "version": version,
            "kind": self.kind,
            "latent_dim": self.latent_dim,
            "options": options_to_json(self.options),
            "epochs": self.epochs,
            "gap": self.gap,
        }
        (folder / MAPPING_FILE).write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Read what `save` wrote. Raises `VglannError` for a folder that is not such a mapping."""
        try:
            record = read_mapping(read_json(folder / MAPPING_FILE))
            if (record["format"], record["version"], record["kind"]) != (*MAPPING_FORMAT, cls.kind):
                raise ValueError("not a mapping of this kind and version")
            options = options_from_json(cls.options_class, record["options"])
            if type(record["latent_dim"]) is not int or not 1 <= record["latent_dim"] <= MAXIMA["latent_dim"]:
                raise ValueError(f"latents of length {record['latent_dim']!r}")
            tensors = load_tensors(folder / "mapping.safetensors", device)
            _check_tensors(tensors, cls.sizes(record["latent_dim"], options))
            mapping = cls(record["latent_dim"], options, device)
            mapping.restore(tensors)
            mapping.epochs, mapping.gap = record["epochs"], record.get("gap")
        except UnreadableError:
            raise
        except (VglannError, FileNotFoundError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise VglannError(
                f"{folder}: not a mapping that can be read ({error}); run `vglann map` again"
            ) from error
        return mapping

    def check_latents(self, latents: Tensor) -> None:
        """Raise `VglannError` unless `latents` are at least two finite rows of the right length."""
        if latents.ndim != 2 or latents.shape[0] < 2 or latents.shape[1] != self.latent_dim:
            raise VglannError(
                f"latents: expected at least 2 rows of {self.latent_dim}, got {list(latents.shape)}"
            )
        if not torch.isfinite(latents).all():
            raise VglannError(
                "latents: some are NaN or infinite; the training diverged, go back to a checkpoint"
            )

    def note(self, row: dict[str, Any], log: Log | None) -> None:
        """Keep the row of an epoch, and hand it to `log`."""
        self.epochs.append(row)
        if log is not None:
            log(row)


def _check_tensors(tensors: dict[str, Tensor], sizes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Raise ValueError for numbers that are none, and KeyError or ValueError unless the tensors have these sizes:
    before as much memory is taken, for a record may lie, and a file has no more than it has.
    """
    for name, shape in sizes:
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)}, by mapping.json {list(shape)}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")


def learning_rate_factor(schedule: str, epoch: int, epochs: int) -> float:
    """Return the factor of the starting rate in `epoch` of `epochs`, counted from 0."""
    if schedule == "halve-every-50":
        return 0.5 ** (epoch // HALVING_EPOCHS)
    return 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
