"""Shot cuts by TransNetV2: finds dissolves, too, and needs its weights (`vglann weights import transnetv2`).

As its authors use it: windows of 100 frames every 50, of which the middle 50 count; before the video stands its
first frame 25 times, after it the last. A run of frames above 0.5 is a change of shots: the shot before ends with
the first of them, the next begins after the last. Frames inside a long change belong to no shot.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from vglann_fast.nets.transnetv2 import TransNetV2
from vglann_fast.nets.weights import Weights

THRESHOLD = 0.5
_WINDOW, _STEP = 100, 50
_EDGE = (_WINDOW - _STEP) // 2


def change_probabilities(frames: np.ndarray, network: TransNetV2) -> np.ndarray:
    """For each frame how surely it is in a change of shots, float32 (n,) in 0..1; frames uint8 (n, 27, 48, 3)."""
    found = []
    for start in range(0, len(frames), _STEP):
        numbers = np.arange(start - _EDGE, start - _EDGE + _WINDOW).clip(0, len(frames) - 1)
        window = torch.from_numpy(np.asarray(frames[numbers])).permute(3, 0, 1, 2)[None]
        with torch.inference_mode():
            logits = network(window)[0, _EDGE : _EDGE + _STEP]
        found.append(logits.sigmoid().numpy())
    return np.concatenate(found)[: len(frames)]


def shots_between(changes: np.ndarray) -> list[tuple[int, int]]:
    """Shots (first frame, one past the last), in order, of bool (n,): whether a frame is in a change of shots."""
    edges = np.flatnonzero(np.diff(changes, prepend=False, append=False))  # begin, end of each run, in turn
    runs = [(0, 0), *zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]
    shots = [(end, begin + 1) for (_, end), (begin, _) in pairwise(runs) if begin > end]
    if runs[-1][1] < len(changes):
        shots.append((runs[-1][1], len(changes)))
    return shots or [(0, len(changes))]


def shot_finder(weights: Weights) -> Callable[[np.ndarray], list[tuple[int, int]]]:
    """A function that gives the shots of a video of uint8 frames (n, 27, 48, 3), n >= 1."""
    network = TransNetV2.loaded(weights.tensors)
    return lambda frames: shots_between(change_probabilities(frames, network) > THRESHOLD)
