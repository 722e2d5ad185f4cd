"""The conformance data under tests/golden, and its seeding rule, as torch tensors."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"

_spec = importlib.util.spec_from_file_location("seeded_state", FOLDER / "seeded_state.py")
assert _spec is not None
assert _spec.loader is not None
seeded_state = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(seeded_state)


def golden(name: str) -> dict[str, Tensor]:
    """Tensors of tests/golden/<name>.safetensors."""
    return load_file(FOLDER / f"{name}.safetensors")


def normal(key: str, shape: tuple[int, ...], **kwargs: float) -> Tensor:
    """Seeded float32 noise."""
    return torch.from_numpy(seeded_state.normal(key, shape, **kwargs))


def normal64(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Seeded float64 noise."""
    return seeded_state.normal64(key, shape)


def uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    """Seeded float32 values in [0, 1)."""
    return torch.from_numpy(seeded_state.uniform(key, shape))


def author_generator_state(variant: str, gain: float = 2.0) -> dict[str, Tensor]:
    """Seeded float64 parameters of the author's generator, "orig" or "expanded", under his names."""
    state = {}
    for line in (FOLDER / "keys" / f"generator_{variant}.txt").read_text().splitlines():
        key, shape = line.split("\t")[:2]
        value = torch.from_numpy(seeded_state.seeded_tensor(key, _shape(shape), gain, transposed=True))
        state[key] = value.double() if value.is_floating_point() else value
    return state


def network_state(keys: str, gain: float) -> dict[str, Tensor]:
    """Seeded float32 parameters of a network, under the names and shapes in golden/keys/<keys>.txt."""
    state = {}
    for line in (FOLDER / "keys" / f"{keys}.txt").read_text().splitlines():
        key, shape = line.split("\t")[:2]
        state[key] = torch.from_numpy(seeded_state.seeded_tensor(key, _shape(shape), gain))
    return state


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64."""
    expected = expected.double()
    return ((found.detach().double() - expected).norm() / expected.norm()).item()


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.strip("[]").split(",") if n.strip())
