"""Checkpoint files of other people's PyTorch code, read without running anything that is in them.

The one place that calls torch.load.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from vglann_fast.errors import VglannError

MAX_BYTES = 2**31  # of a weight file; VGG16 with its classifier takes 2^29


def read_torch_file(file: str | Path, called: str | None = None) -> Any:
    """What `torch.save` wrote into a file: tensors on the CPU, in dicts and lists.

    called: what errors call the file; default its path.

    Raises `VglannError` when there is no such file, or it is larger than 2 GiB, a TorchScript archive (which is a
    program), holds anything but plain data, or is no file of `torch.save`.
    """
    file, called = Path(file), called or str(file)
    if not file.is_file():
        raise VglannError(f"{called}: no such file")
    if file.stat().st_size > MAX_BYTES:
        raise VglannError(
            f"{called}: {file.stat().st_size} bytes; a weight file has at most {MAX_BYTES} bytes"
        )
    if _is_torchscript(file):
        raise VglannError(
            f"{called}: a TorchScript archive, which is a program, and no programs are run; "
            "give a state dict, as net.state_dict() gives and torch.save writes"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files older than this PyTorch
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint makes it raise all kinds
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds {foreign[1]}, which is code" if foreign else "it is damaged or something else"
        raise VglannError(
            f"{called}: not a state dict that can be read without running code in it ({what}); "
            "save net.state_dict() instead of the network"
        ) from error


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False
