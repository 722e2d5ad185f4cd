"""Contact sheets: videos as rows of frames in one picture, for eyes to check."""

from pathlib import Path

import numpy as np

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.run.destinations import atomic_file

_GAP = 2
_MOST_CLIPS = 16


def contact_sheet(videos: np.ndarray, *, frames: int = 8) -> np.ndarray:
    """A row per video of `frames` evenly spaced frames (first and last included), white gaps of 2 pixels.

    videos: uint8 (n, 3, T, H, W) RGB; shorter videos than `frames` show all their frames.
    Returns uint8 (n (H + 2) - 2, f (W + 2) - 2, 3) with f = min(frames, T).
    Raises ValueError for another dtype or shape.
    """
    right_shape = videos.ndim == 5 and videos.shape[1] == 3 and 0 not in videos.shape
    if videos.dtype != np.uint8 or not right_shape:
        raise ValueError(f"videos must be uint8 (n, 3, T, H, W), not {videos.dtype} {videos.shape}")
    n, _, length, height, width = videos.shape
    shown = np.linspace(0, length - 1, min(frames, length)).round().astype(int)
    cells = np.full((n, height + _GAP, len(shown), width + _GAP, 3), 255, np.uint8)
    cells[:, :height, :, :width] = videos[:, :, shown].transpose(0, 3, 2, 4, 1)
    sheet = cells.reshape(n * (height + _GAP), len(shown) * (width + _GAP), 3)
    return sheet[:-_GAP, :-_GAP]


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write an RGB picture, uint8 (H, W, 3), as PNG. Raises `VglannError` if the disk is full."""
    import cv2

    _, data = cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.tobytes())


def show(folder: str | Path, out: str | Path) -> list[str]:
    """Write a contact sheet (PNG) of up to 16 clips of a clip folder; return their ids, top row first.

    Clips are taken in turn from each source, spread over its length.
    Raises `VglannError` if the folder is not a clip folder or `out` is not a .png.
    """
    if Path(out).suffix.lower() != ".png":
        raise VglannError(f"{out}: a contact sheet is written as .png")
    clips = ClipSet.open(folder, verify=False)
    rows_of: dict[int, list[int]] = {}
    for row, clip in enumerate(clips.clips):
        rows_of.setdefault(clip["source"], []).append(row)
    share = dict.fromkeys(rows_of, 0)
    left = min(_MOST_CLIPS, len(clips))
    while left:
        for source, rows in rows_of.items():
            if left and share[source] < len(rows):
                share[source] += 1
                left -= 1
    rows = [
        rows_of[source][round(i * (len(rows_of[source]) - 1) / max(count - 1, 1))]
        for source, count in share.items()
        for i in range(count)
    ]
    write_png(out, contact_sheet(clips.read(rows)))
    return [clips.ids[row] for row in rows]
