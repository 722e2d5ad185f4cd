"""Reading and writing the files of a run: lines, JSON and tensors.

What a user or another program may have put in place of a file is checked before it is read. Tensors are in the format
of safetensors. They are read here, because the library opens a file by its name, which must be UTF-8 for it, and maps
the file, which keeps it from being removed on network file systems.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.os_errors import actionable_os_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAX_HEADER = 100_000_000  # bytes, as safetensors has it
_MAX_DIMENSIONS = 16
# What opening and reading answer where something else has the name, or where the file system finds a file damaged.
_DAMAGE = {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EUCLEAN, errno.EBADMSG}
# Name in the header -> name of the dtype in torch and its size in bytes.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Add a line to a file that has one object a line. One that was torn by a crash ends there and takes no other."""
    with actionable_os_errors(file, file), file.open("ab+") as lines:
        size = lines.seek(0, os.SEEK_END)
        lines.seek(max(0, size - 1))
        torn = lines.read() not in (b"", b"\n")
        lines.write(b"\n" * torn + json.dumps(value).encode() + b"\n")


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file that has one a line; other lines, torn by a crash, are left out."""
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def save_tensors(tensors: Mapping[str, "Tensor"], path: Path) -> None:
    """Write tensors, on any device and in any memory format, as safetensors.

    The library's own writer reports a full disk as an error of its own kind; a plain write gives an `OSError`.
    """
    from safetensors.torch import save

    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: str | Path, device: "torch.device | str" = "cpu") -> dict[str, "Tensor"]:
    """Read a safetensors file. Raises as `open_regular`, and ValueError for a file that is damaged."""
    import torch

    tensors = {}
    with open_regular(path) as file:
        entries, _ = _read_header(file)
        for name, (dtype, shape) in entries.items():
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            # Read in place: a second copy of the largest tensor may not fit in memory.
            raw: Any = tensor.view(-1).view(torch.uint8).numpy()
            if file.readinto(raw) != raw.nbytes:
                raise ValueError(f"{name} ends early")
            tensors[name] = tensor.to(device)
    return tensors


def tensors_header(path: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes and the metadata that a safetensors file declares. Raises as `load_tensors`."""
    with open_regular(path) as file:
        entries, metadata = _read_header(file)
    return {name: shape for name, (_, shape) in entries.items()}, metadata


def _read_header(file: BufferedReader) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Return name -> (dtype, shape) in the order of the data, and the metadata. The file is then at the data.

    Raises ValueError unless the data fill the file exactly, so that a header cannot ask for more memory than that.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError("the header is longer than the file")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        found, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (first, last), shape = entry["data_offsets"], entry["shape"]
            dtype, width = _DTYPES[entry["dtype"]]
            _check_shape(name, shape)
            if first != end or last - first != math.prod(shape) * width:
                raise ValueError(f"{name} does not lie where the header says")
            found[name], end = (dtype, tuple(shape)), last
        if not isinstance(metadata, dict):
            raise ValueError("the metadata are not an object")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header is damaged ({type(error).__name__}: {error})") from error
    if end != size - 8 - length:
        raise ValueError("the file has another size than its header says")
    return found, metadata


def _check_shape(name: str, shape: Any) -> None:
    """Raise ValueError unless torch can make a tensor of this shape."""
    # Multiplying very many or very large numbers would never end.
    whole = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
    if not whole or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"{name} has a damaged shape")
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        raise ValueError(f"{name} is too large")


@contextmanager
def open_regular(path: str | Path) -> Iterator[BufferedReader]:
    """Open a file for reading in the block.

    Raises `FileNotFoundError` where the file is missing, ValueError where something else has its name (reading a
    pipe would block for ever) or the file system finds it damaged, and `UnreadableError` for every other error of the
    operating system in the block.
    """
    try:
        # Without O_NONBLOCK opening a pipe waits for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("not a regular file")
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _DAMAGE:
            raise ValueError(reason) from error
        raise UnreadableError(
            f"{path}: cannot be read ({reason}); see to its disk and its permissions, then run the command again"
        ) from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises `VglannError` that names the file when it is missing, not a regular file or not valid, `UnreadableError` as
    `open_regular`.
    """
    try:
        with open_regular(path) as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise VglannError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:  # not text, not JSON, or nested beyond all bounds
        raise VglannError(f"{path} is not valid JSON: {error}") from error
