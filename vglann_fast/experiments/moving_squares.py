"""Clips that are made in a moment, for tests, benchmarks and self-tests that need no video."""

import hashlib
import json
from pathlib import Path

import numpy as np

FRAMES, SIZE = 16, 32


def moving_squares(count: int, frames: int = FRAMES, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """uint8 (count, 3, frames, size, size): a bright square crosses a colored gradient, differently in each."""
    random = np.random.default_rng(seed)
    gradient = np.linspace(0, 120, size)
    clips = np.empty((count, 3, frames, size, size), np.uint8)
    side = size // 4
    for clip in clips:
        clip[:] = (
            random.random((3, 1, 1, 1)) * gradient[:, None] + random.random((3, 1, 1, 1)) * gradient
        ).astype(np.uint8)
        start, step = random.integers(0, size - side, 2), random.integers(-2, 3, 2)
        color = random.integers(128, 256, 3).astype(np.uint8)[:, None, None]
        for t in range(frames):
            y, x = (start + t * step) % (size - side)
            clip[:, t, y : y + side, x : x + side] = color
    return clips


def write_clip_folder(folder: Path, clips: np.ndarray, split: str = "train") -> Path:
    """A clip folder with these clips, without going through video files."""
    folder.mkdir(parents=True)
    np.save(folder / "clips-00000.npy", clips)
    rows = [
        {
            "id": hashlib.sha256(clip.tobytes()).hexdigest()[:16],
            "source": 0,
            "shot": i,
            "first_frame": 0,
            "crop": [0, 0, clips.shape[-1], clips.shape[-1]],
            "split": split,
        }
        for i, clip in enumerate(clips)
    ]
    digest = hashlib.sha256((folder / "clips-00000.npy").read_bytes()).hexdigest()
    index = {
        "format": "vglann-clips",
        "version": 1,
        "frames": clips.shape[2],
        "size": clips.shape[-1],
        "stride": 1,
        "options": {},
        "sources": [{"name": "moving squares", "sha256": "0" * 64}],
        "shards": [{"file": "clips-00000.npy", "clips": len(clips), "sha256": digest}],
        "clips": rows,
        "counts": {"rejected": 0, "shots": len(clips), "static": 0, "repeated": 0},
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder
