"""Checkpoint files of other people's PyTorch code, read without running anything that is in them.

The one place that calls torch.load.
"""

import lzma
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vglann_fast.errors import VglannError

MAX_BYTES = 2**31  # of a weight file, also when unpacked; VGG16 with its classifier takes 2^29
# What reading a broken zip raises.
BAD_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError, EOFError, OSError, ValueError,
           OverflowError, MemoryError)  # fmt: skip
# All that a state dict needs. PyTorch's own list has more, some of which makes gigabytes of a few bytes.
_PLAIN = re.compile(
    r"collections (OrderedDict|defaultdict)|_codecs encode|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.nn\.parameter Parameter|torch (\w+Storage|Size|device|b?float\w*|double|half|u?int\d+|long|short|bool)"
    r"|torch\.storage (Typed|Untyped)Storage"
)
_LEGACY_PICKLES = 5  # in a file of PyTorch before 1.6, tensors' bytes behind them


def read_torch_file(file: str | Path, called: str | None = None) -> Any:
    """Read what `torch.save` wrote into a file: tensors on the CPU, in dicts and lists.

    called: what errors call the file; default its path.

    Raises `VglannError` when the file does not exist, or is larger than 2 GiB, a TorchScript archive (which is a
    program), holds anything but plain data, or was not written by `torch.save`.
    """
    file, called = Path(file), called or str(file)
    if not file.is_file():
        raise VglannError(f"{called}: no such file")
    if file.stat().st_size > MAX_BYTES:
        raise VglannError(
            f"{called}: {file.stat().st_size} bytes; a weight file has at most {MAX_BYTES} bytes"
        )
    try:
        names = _check_archive(file, called) if zipfile.is_zipfile(file) else _names_in_legacy(file)
        for name in names:
            if not _PLAIN.fullmatch(name):
                raise _unsafe(called, f"it holds {name.replace(' ', '.')}, which is code")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files older than this PyTorch
            return torch.load(file, map_location="cpu", weights_only=True)
    except VglannError:
        raise
    except Exception as error:  # a file that is not a checkpoint makes it raise all kinds
        raise _unsafe(called, "it is damaged or something else") from error


def _unsafe(called: str, what: str) -> VglannError:
    return VglannError(
        f"{called}: not a state dict that can be read without running code in it ({what}); "
        "save net.state_dict() instead of the network"
    )


def _check_archive(file: Path, called: str) -> Iterator[str]:
    """The names of all that an archive of torch.save would call. Raises `VglannError` for a TorchScript archive,
    and for one that unpacks to more than `MAX_BYTES`.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(e.filename.endswith("/constants.pkl") or "/code/" in e.filename for e in entries):
            raise VglannError(
                f"{called}: a TorchScript archive, which is a program, and no programs are run; "
                "give a state dict, as net.state_dict() gives and torch.save writes"
            )
        if sum(entry.file_size for entry in entries) > MAX_BYTES:
            raise VglannError(f"{called}: unpacks to more than the {MAX_BYTES} bytes a weight file may have")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                yield from _names(archive.read(entry))


def _names_in_legacy(file: Path) -> Iterator[str]:
    """The same of a file of PyTorch before 1.6."""
    with file.open("rb") as stream:
        for _ in range(_LEGACY_PICKLES):
            yield from _names(stream)


def _names(pickled: Any) -> Iterator[str]:
    """The "module name" of everything a pickle would call; nothing is called. Raises ValueError for no pickle."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL":
            yield str(argument)
        elif operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"names put together by {operation.name}")
