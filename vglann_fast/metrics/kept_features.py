"""Features of clips, kept from one evaluation to the next.

The clips that samples are compared with are the same for every run that was trained on them, and so are their
features, which take most of an evaluation's time. Each set of clips, by each protocol, is a file in the user's cache
(`default_cache`), which may be removed at any time:

    features/<protocol>-<sha256 of its record>.safetensors
        rows       float64 [n, d], finite, as `features.extract` gives them
        metadata   {"record": JSON, "sha256": of the bytes of `rows`}

The record holds all that the rows depend on, so what has changed is another file: {"format": "vglann-features",
"version": 1, "code": sha256 of the sources of networks and protocols, "protocol": the extractor's record with its
weights' sha256, "shape": [n, 3, T, H, W], "videos": sha256 of the videos' sha256 digests in their order, "torch" and
"cudnn": their versions, "device": the GPU, or the instructions of the CPU}. It names the videos by their pixels:
where the clips lie does not matter, nor what an index.json says of them.

A file that is damaged or may not be read is named and computed again. Where nothing can be written the evaluation
continues without.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from vglann_fast import nets
from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.metrics import features
from vglann_fast.metrics.features import Extractor, extract
from vglann_fast.progress import Progress
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.environment import default_cache
from vglann_fast.run.files import load_tensors, tensors_header
from vglann_fast.runtime.distributed import Ranks

FORMAT = ("vglann-features", 1)
_HEADER = 2**16  # bytes a file may have beside its rows

log = logging.getLogger("vglann_fast")


def features_of_clips(
    name: str,
    videos: Iterable[np.ndarray],
    shape: tuple[int, ...],
    digests: Sequence[bytes],
    extractors: Mapping[str, Extractor],
    ranks: Ranks | None = None,
    own: int | None = None,
) -> dict[str, Tensor]:
    """By each of the extractors, features of the clips, float64 [n, d]: kept ones, or computed and kept.

    Args:
        name: of the set, for the log.
        videos: uint8 (b, 3, T, H, W) at a time; with several `ranks` the blocks of this process's share. Nothing is
            read where all features are known.
        shape: (3, T, H, W). digests: sha256 of each video, n of them.
        ranks: the processes that share the work. Process 0 alone reads and writes what is kept.
        own: how many videos are in this process's share. Default: all.

    Raises `VglannError` as `extract`.
    """
    ranks = ranks or Ranks()
    if not extractors:
        return {}
    found, files, records = _kept(name, shape, digests, extractors) if ranks.rank == 0 else ({}, {}, {})
    found = ranks.from_first(found)
    missing = {key: one for key, one in extractors.items() if key not in found}
    if missing:
        found |= _computed(name, videos, len(digests) if own is None else own, missing, ranks)
    for key in missing.keys() & files.keys():
        _write(files[key], records[key], found[key])
    return found


def _kept(
    name: str, shape: tuple[int, ...], digests: Sequence[bytes], extractors: Mapping[str, Extractor]
) -> tuple[dict[str, Tensor], dict[str, Path], dict[str, str]]:
    """(rows that are kept, files of all, records of all) by the extractors' keys; all empty without a cache."""
    try:
        folder = default_cache() / "features"
    except VglannError as error:
        log.warning("features are computed and not kept: %s", error)
        return {}, {}, {}
    files, records, found = {}, {}, {}
    for key, one in extractors.items():
        records[key] = _record(one, shape, digests)
        files[key] = folder / f"{one.name}-{hashlib.sha256(records[key].encode()).hexdigest()}.safetensors"
        rows = _read(files[key], records[key], (len(digests), one.dimensions))
        if rows is not None:
            found[key] = rows
    if found:
        log.info("%s: features known from before, %s, in %s", name, ", ".join(found), folder)
    return found, files, records


def _computed(
    name: str, videos: Iterable[np.ndarray], n: int, extractors: Mapping[str, Extractor], ranks: Ranks
) -> dict[str, Tensor]:
    blocks = []
    with Progress(f"features of {name}", n, "video", shown=ranks.rank == 0) as progress:
        for block in videos:
            blocks.append(extract(extractors, block))
            for _ in block:
                progress.advance()
            progress.show()
    blocks = ranks.gather_shares(blocks)
    return {key: torch.cat([block[key] for block in blocks]) for key in extractors}


def _record(extractor: Extractor, shape: tuple[int, ...], digests: Sequence[bytes]) -> str:
    on_gpu = extractor.device.type == "cuda"
    record = {
        "format": FORMAT[0],
        "version": FORMAT[1],
        "code": _code(),
        "protocol": extractor.protocol,
        "shape": [len(digests), *shape],
        "videos": hashlib.sha256(b"".join(digests)).hexdigest(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "device": torch.cuda.get_device_name(extractor.device)
        if on_gpu
        else torch.backends.cpu.get_cpu_capability(),
    }
    return json.dumps(record, sort_keys=True)


@cache
def _code() -> str:
    """sha256 of all that makes features of clips: whoever edits it need not remember that some are kept."""
    assert features.__file__
    assert nets.__file__
    files = [Path(features.__file__), *sorted(Path(nets.__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read(file: Path, record: str, shape: tuple[int, int]) -> Tensor | None:
    """The rows, or None when there are none, or none that can be trusted, which is said."""
    try:
        if not file.is_file():
            return None
        if file.stat().st_size > 8 * shape[0] * shape[1] + _HEADER:
            raise ValueError("larger than it can be")
        metadata, rows = tensors_header(file)[1], load_tensors(file)["rows"]
        if rows.dtype != torch.float64 or tuple(rows.shape) != shape or not rows.isfinite().all():
            raise ValueError(f"its rows are {rows.dtype} {tuple(rows.shape)}, or not finite")
        if metadata != {"record": record, "sha256": _sha256(rows)}:
            raise ValueError("it does not match its record or checksum")
    except (OSError, UnreadableError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be used (%s); its features are computed again", file, error)
        return None
    return rows


def _write(file: Path, record: str, rows: Tensor) -> None:
    metadata = {"record": record, "sha256": _sha256(rows)}
    try:
        with atomic_file(file) as temporary:
            temporary.write_bytes(save({"rows": rows}, metadata))
    except (OSError, VglannError) as error:
        log.warning("these features will be computed again the next time: %s", error)


def _sha256(rows: Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()
