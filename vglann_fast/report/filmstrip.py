"""A clip as one still picture of all its frames, which a page can hold as text and a script can play.

Frames stand side by side, eight to a row. Each has a margin of four pixels that repeat its edge: WebP halves
and then smooths the chroma, and without margins every frame would have a rim in its neighbors' colors. Cells
beyond the last frame repeat it.
"""

import base64
import math
from dataclasses import dataclass

import numpy as np

from vglann_fast.errors import VglannError

_COLUMNS = 8
_MARGIN = 4


@dataclass(frozen=True)
class Filmstrip:
    """Description of a filmstrip for the page's player; sizes in pixels."""

    uri: str  # data:image/webp;base64,...
    frames: int
    columns: int  # frames in a row of the picture
    width: int  # of a frame
    height: int
    margin: int  # between a frame and the borders of its cell
    cell_width: int
    cell_height: int

    @property
    def strip_width(self) -> int:
        """Width of the whole picture."""
        return self.columns * self.cell_width


def filmstrip(video: np.ndarray, quality: int = 88) -> Filmstrip:
    """Encode one clip.

    Args:
        video: uint8 (3, T, H, W) RGB or (1, T, H, W) gray, T >= 1.
        quality: of WebP, 1..100. At 88 a 64x64 clip of 32 frames takes 25 to 60 KB.

    Raises ValueError for another dtype or shape; `VglannError` when OpenCV is missing.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[0] not in (1, 3) or 0 in video.shape:
        raise ValueError(f"video must be uint8 (3 or 1, T, H, W), got {video.dtype} {video.shape}")
    try:
        import cv2
    except ImportError as error:
        raise VglannError("the report needs OpenCV: pip install 'vglann-fast[video,report]'") from error
    channels, frames, height, width = video.shape
    columns = min(_COLUMNS, frames)
    rows = math.ceil(frames / columns)
    padding = ((0, 0), (0, rows * columns - frames), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
    cells = np.pad(video[::-1], padding, mode="edge")  # RGB -> BGR, as OpenCV wants it
    cell_height, cell_width = cells.shape[2:]
    picture = (
        cells.reshape(channels, rows, columns, cell_height, cell_width)
        .transpose(1, 3, 2, 4, 0)
        .reshape(rows * cell_height, columns * cell_width, channels)
    )
    done, data = cv2.imencode(".webp", np.ascontiguousarray(picture), [cv2.IMWRITE_WEBP_QUALITY, quality])
    if not done:
        raise ValueError(f"cannot encode a filmstrip of shape {video.shape}")
    uri = "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode("ascii")
    return Filmstrip(uri, frames, columns, width, height, _MARGIN, cell_width, cell_height)
