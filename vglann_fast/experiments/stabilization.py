"""Accuracy of camera motion, and how still the picture stands afterwards, as a Markdown table.

    python -m vglann_fast.experiments.stabilization FILM[:FRAME] ...      # frame 0 unless one is named

A frame of each film, of 1280x720 or more, is filmed again for 32 frames through a window of 768x432 in its middle
that moves by 1.8 pixels a frame, narrows by 0.6 % or turns by 0.45°. The row `as it is` has the film's own 32 frames.

off         the farthest that any of the 31 homographies from frame to frame takes any of 17 x 17 points of a frame
            from where it belongs, in pixels
in all      likewise, of the homographies to the first frame, which are their products
flow        median of the optical flow from frame to frame in the middle of the picture, at 128 rows, in pixels: of
            what fills most of the picture
ms a frame  for keypoints and matches, processor time
"""

import argparse
import logging
import time
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import av
import cv2
import numpy as np

from vglann_fast.clips.stabilize import Tracker, stabilize

WIDTH, HEIGHT, FRAMES = 768, 432, 32
ROWS, BORDER = 128, 24  # of the pictures whose flow is measured, and what of their sides is left out
PAN, ZOOM, TURN = 1.8, 1.006, np.deg2rad(0.45)  # a frame


def about_the_middle(matrix: list[list[float]]) -> np.ndarray:
    """The homography that does this to a frame about its middle."""
    middle = np.array([[1, 0, (WIDTH - 1) / 2], [0, 1, (HEIGHT - 1) / 2], [0, 0, 1]])
    return middle @ np.array([*matrix, [0, 0, 1]]) @ np.linalg.inv(middle)


# Number of a frame -> the homography from its pixels to the pixels of the first.
CAMERAS: dict[str, Callable[[int], np.ndarray]] = {
    "pan": lambda t: about_the_middle([[1, 0, PAN * t], [0, 1, 0]]),
    "zoom": lambda t: about_the_middle([[ZOOM**-t, 0, 0], [0, ZOOM**-t, 0]]),
    "rotation": lambda t: about_the_middle(
        [[np.cos(TURN * t), -np.sin(TURN * t), 0], [np.sin(TURN * t), np.cos(TURN * t), 0]]
    ),
}


def frames_of(film: str, first: int) -> np.ndarray:
    """32 frames (T, H, W, 3) uint8 RGB."""
    with av.open(film) as container:
        found = islice(container.decode(video=0), first, first + FRAMES)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in found])


def filmed(scene: np.ndarray, camera: Callable[[int], np.ndarray]) -> np.ndarray:
    """The scene (H, W, 3) through a window in its middle that moves as `camera` says: (T, 432, 768, 3)."""
    height, width = scene.shape[:2]
    window = np.array([[1, 0, (width - WIDTH) / 2], [0, 1, (height - HEIGHT) / 2], [0, 0, 1]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    views = [
        cv2.warpPerspective(scene, window @ camera(t), (WIDTH, HEIGHT), flags=how) for t in range(FRAMES)
    ]
    return np.stack(views)


def errors(motions: np.ndarray, camera: Callable[[int], np.ndarray]) -> tuple[float, float]:
    """The largest errors, in pixels, of the homographies from frame to frame and of those to the first frame."""
    to_first, missed = np.eye(3), []
    for t, motion in enumerate(motions[1:], start=1):
        step = motion[:9].reshape(3, 3)
        to_first = to_first @ step
        true_step = np.linalg.inv(camera(t - 1)) @ camera(t)
        missed.append((_farthest(step, true_step), _farthest(to_first, camera(t))))
    return tuple(np.max(missed, axis=0))


def _farthest(found: np.ndarray, true: np.ndarray) -> float:
    """The largest distance, in pixels, between where two homographies take any of 17 x 17 points of a frame."""
    x, y = np.meshgrid(np.linspace(0, WIDTH - 1, 17), np.linspace(0, HEIGHT - 1, 17))
    points = np.stack([x, y], -1).reshape(-1, 1, 2)
    apart = cv2.perspectiveTransform(points, found) - cv2.perspectiveTransform(points, true)
    return float(np.linalg.norm(apart, axis=-1).max())


def flow(frames: np.ndarray) -> float:
    """Median optical flow, in pixels, of frames (T, 128, w, 3) uint8."""
    # The types of OpenCV do not know it.
    opencv: Any = cv2
    method = opencv.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grays = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    flows = [method.calc(a, b, None)[BORDER:-BORDER, BORDER:-BORDER] for a, b in pairwise(grays)]
    return float(np.median(np.linalg.norm(flows, axis=-1)))


def row(frames: np.ndarray, camera: Callable[[int], np.ndarray] | None) -> list[str]:
    """The cells of frames (T, H, W, 3) whose motion is `camera`, or not known."""
    tracker, started = Tracker(), time.process_time()
    motions = np.stack([tracker(frame) for frame in frames])
    milliseconds = 1000 * (time.process_time() - started) / len(frames)
    missed = ["", ""] if camera is None else [f"{error:.2f}" for error in errors(motions, camera)]
    height, width = frames.shape[1:3]
    size = (round(width * ROWS / height), ROWS)
    small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    steady, _ = stabilize(small, list(motions[1:, None]), (width, height))
    if steady is None:
        return [*missed, f"{flow(small):.3f}", "rejected", "", f"{milliseconds:.0f}"]
    before, after = flow(small), flow(steady)
    return [*missed, f"{before:.3f}", f"{after:.3f}", f"{before / after:.0f}x", f"{milliseconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("films", nargs="+", metavar="FILM[:FRAME]")
    cv2.setNumThreads(1)
    head = "| film | motion | off | in all | flow before | after | falls by | ms a frame |"
    print(head, "|---|---|" + "---:|" * 6, sep="\n")
    for film in parser.parse_args().films:
        path, _, first = film.partition(":")
        shot = frames_of(path, int(first or 0))
        for name, camera in CAMERAS.items():
            print(f"| {film} | {name} | {' | '.join(row(filmed(shot[0], camera), camera))} |", flush=True)
        print(f"| {film} | as it is | {' | '.join(row(shot, None))} |", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress
    main()
