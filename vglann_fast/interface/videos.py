"""Arrays of videos that show themselves in a notebook."""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from vglann_fast.errors import VglannError
from vglann_fast.samples.write import gif_bytes, video_grid, write_gif, write_mp4

SHOWN = 16  # videos of an array that a notebook shows
FPS = 24.0
_PIXELS = 128  # width of a video in a notebook


class Videos(np.ndarray):
    """A NumPy array uint8 [n, 3, T, H, W] of n RGB videos, which a notebook shows as a moving picture.

        vf.Videos(clips.read(range(4)))

    It is an array like any other, and can be pickled. Indexing and slicing give `Videos` as long as all five
    dimensions are left, and a plain array otherwise. So does arithmetic.

    Raises `VglannError` for an array of another shape or dtype.
    """

    def __new__(cls, videos: Any) -> "Videos":
        array = np.asarray(videos)
        if array.dtype != np.uint8 or array.ndim != 5 or array.shape[1] != 3:
            raise VglannError(
                f"videos are uint8 of shape [n, 3, T, H, W], not {array.dtype} of {list(array.shape)}; convert them"
            )
        return array.view(cls)

    def __getitem__(self, key: Any) -> Any:
        chosen = super().__getitem__(key)
        return chosen if self._are_videos(chosen) else _plain(chosen)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else _plain(array)

    def save(self, path: str | Path, *, fps: float = FPS) -> Path:
        """Write all videos side by side, as a GIF or an MP4, and return the path.

        Args:
            path: file that ends in .gif or .mp4. An existing file is replaced.
            fps: frames per second, above 0; at most 50 for a GIF.

        Raises `VglannError` for another suffix, when PyAV is not installed, or when the disk is full.
        """
        path = Path(path)
        writers = {".gif": write_gif, ".mp4": write_mp4}
        if path.suffix.lower() not in writers:
            raise VglannError(f"{path}: expected a name that ends in .gif or .mp4; choose another name")
        writers[path.suffix.lower()](path, video_grid(np.asarray(self)), fps)
        return path

    def _repr_html_(self) -> str | None:
        """Return the first videos as an inline GIF; None, which shows the numbers, where that cannot be."""
        if not (self._are_videos(self) and self.size):
            return None
        try:
            picture = gif_html(np.asarray(self[:SHOWN]))
        except VglannError:  # without PyAV
            return None
        n, _, frames, height, width = self.shape
        shown = f", the first {SHOWN} shown" if n > SHOWN else ""
        return f"{picture}<br><small>{n} videos{shown}: {frames} frames of {width}×{height} pixels</small>"

    @staticmethod
    def _are_videos(array: Any) -> bool:
        """Return True if an array of this class still has the shape and dtype of videos."""
        return bool(
            isinstance(array, Videos) and array.dtype == np.uint8 and array.ndim == 5 and array.shape[1] == 3
        )


def gif_html(videos: np.ndarray) -> str:
    """Return an `<img>` that plays uint8 videos [n, 3, T, H, W], n >= 1, side by side.

    Raises `VglannError` when PyAV is not installed.
    """
    grid = video_grid(videos)
    data = base64.b64encode(gif_bytes(grid, FPS)).decode("ascii")
    scale = max(1, _PIXELS // videos.shape[-1])
    return (
        f'<img src="data:image/gif;base64,{data}" alt="{len(videos)} videos" width="{grid.shape[-1] * scale}" '
        'style="image-rendering: pixelated; max-width: 100%">'
    )


def _plain(array: Any) -> Any:
    return array.view(np.ndarray) if isinstance(array, Videos) else array
