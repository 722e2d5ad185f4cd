"""Clip folders of any size whose clips are holes in sparse files: they take no room on the disk, and read black."""

import json
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 1024
CLIP_SHAPE = (3, 32, 64, 64)
CLIP_BYTES = 3 * 32 * 64 * 64


def write_sparse_clips(folder: Path, count: int) -> None:
    """Write a clip folder of `count` training clips of 32 frames of 64x64, 40 shots a video, one clip a shot.

    The checksums are not true: open it with verify=False.
    """
    shards: list[dict[str, Any]] = []
    for first in range(0, count, SHARD):
        held = min(SHARD, count - first)
        file = folder / f"clips-{len(shards):05d}.npy"
        with file.open("wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (held, *CLIP_SHAPE)}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.truncate(stream.tell() + held * CLIP_BYTES)
        shards.append({"file": file.name, "clips": held, "sha256": "0" * 64})
    clips = [
        {
            "id": f"{n:016x}",
            "source": n // 40,
            "shot": n % 40,
            "first_frame": 32 * n,
            "crop": [280, 0, 720, 720],
            "split": "train",
        }
        for n in range(count)
    ]
    sources = [{"name": f"video-{n:05d}.mp4", "sha256": "0" * 64} for n in range(-(-count // 40))]
    head = {"format": "vglann-clips", "version": 1, "frames": 32, "size": 64, "stride": 1, "options": {}}
    counts = {"rejected": 0, "shots": count, "static": 0, "repeated": 0, "unstable": 0}
    record = {**head, "sources": sources, "shards": shards, "counts": counts, "clips": clips}
    (folder / "index.json").write_text(json.dumps(record))
