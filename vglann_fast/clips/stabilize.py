"""Stabilization: how the camera moved from frame to frame, and clips in which it stands still.

Between neighboring frames: SIFT keypoints, the two nearest descriptors of each, Lowe's ratio test, and a
homography by RANSAC. Within a clip the homographies are multiplied up, so that every frame is seen from where
the camera stood in the first one. What the camera did not see at that moment shows the frame of the clip
before it, never black: black edges are the first thing a two-stream generator would learn.

`RATIO`, `MIN_MATCHES`, `RANSAC_PIXELS` and `ERODED` are videogan's (Vondrick, Pirsiavash and Torralba,
"Generating Videos with Scene Dynamics", 2016). The rest bounds cost and error. Measurement on frames of two films
panned, zoomed and turned by known amounts: RANSAC's own fit to all points within 5 pixels is wrong by up to 14
pixels in a corner of a blurred 768x432 picture; fitted again to the points that agree with it, and with twice as
many faint keypoints, by less than 0.7 (`vglann_fast/experiments/stabilization.py`).

A motion is float64 (12,): the homography that takes pixels of a frame to pixels of the frame before it, row by
row, then the number of its inliers, the number of matches, and the median distance in pixels by which inliers
miss. It is NaN where no homography was found. Pixels are pixels of the upright source frame, the
center of the first being (0, 0).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np

RATIO = 0.7  # of the distances of the nearest and the second nearest descriptor
MIN_MATCHES = 10
RANSAC_PIXELS = 5.0
ERODED = 5  # pixels, the side of the square by which the seen area shrinks: its rim is half black
REFITS = 3  # of the homography, each to the points within 3 times the median miss of those before
MIN_REFIT_PIXELS = 0.3  # points as near as this always count: keypoints are not more exact
CONTRAST = 0.02  # of a keypoint, half of SIFT's usual: blurred backgrounds have few strong ones
LOOK_AT = 480  # pixels: larger frames are looked at with this short side
MAX_FEATURES = 2000  # of a frame, the strongest: matching them all costs the square
MAX_FILLED = 0.5  # share of a frame that may show frames before it
MOTION_LENGTH = 12

_INLIERS, _MATCHES, _RESIDUAL = 9, 10, 11


@dataclass(frozen=True)
class Stabilization:
    """Quality of the stabilization of a clip, as it stands in the index.

    inliers: mean number of inliers of a homography. residual: median over its frames of the median distance, in
    pixels of the source, by which inliers miss. rejected_frames: share of the frames, but the first, without a
    homography. filled: share of the clip's pixels that show a frame before.
    """

    inliers: float
    residual: float | None
    rejected_frames: float
    filled: float

    def as_json(self) -> dict[str, Any]:
        """Rounded to what means something."""
        return {key: None if value is None else round(value, 4) for key, value in asdict(self).items()}


class Tracker:
    """Finds the motion of each frame against the one before; call it with the frames in order."""

    def __init__(self) -> None:
        self._sift = cv2.SIFT_create(  # type: ignore[attr-defined, unused-ignore]  # cv2 may be absent
            nfeatures=MAX_FEATURES, contrastThreshold=CONTRAST, enable_precise_upscale=True
        )
        self._matcher = cv2.BFMatcher(cv2.NORM_L2)
        self._before: tuple[np.ndarray, np.ndarray | None] | None = None

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The motion, see the top of this file, of an image (H, W, 3) uint8 RGB. NaN for the first."""
        gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
        height, width = gray.shape
        scale = min(1.0, LOOK_AT / min(height, width))
        if scale < 1:
            size = (round(width * scale), round(height * scale))
            gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        keypoints, descriptors = self._sift.detectAndCompute(gray, None)
        points = np.array([keypoint.pt for keypoint in keypoints], np.float64).reshape(-1, 2)
        before, self._before = self._before, (points, descriptors)
        motion = np.full(MOTION_LENGTH, np.nan)
        if before is not None:
            here, there = self._matched(points, descriptors, *before)
            found = _homography(here, there)
            motion[_MATCHES] = len(here)
            if found is not None:
                scaling = resizing(width, height, gray.shape[1], gray.shape[0])
                homography = np.linalg.inv(scaling) @ found[0] @ scaling
                motion[:9] = (homography / homography[2, 2]).ravel()
                motion[_INLIERS], motion[_RESIDUAL] = found[1], found[2] / scale
        return motion

    def _matched(
        self,
        points: np.ndarray,
        descriptors: np.ndarray | None,
        points_before: np.ndarray,
        descriptors_before: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Matching points (n, 2) of this frame and the one before."""
        if descriptors is None or descriptors_before is None or len(points_before) < 2:
            return np.empty((0, 2)), np.empty((0, 2))
        pairs = self._matcher.knnMatch(descriptors, descriptors_before, k=2)
        good = [near for near, next_near in pairs if near.distance < RATIO * next_near.distance]
        here = points[[match.queryIdx for match in good]]
        return here, points_before[[match.trainIdx for match in good]]


def resizing(width: int, height: int, new_width: int, new_height: int) -> np.ndarray:
    """The homography of a resize: pixel centers of the old picture to pixel centers of the new one."""
    x, y = new_width / width, new_height / height
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def stabilize(
    frames: np.ndarray, motions: list[np.ndarray], frame_size: tuple[int, int]
) -> tuple[np.ndarray | None, Stabilization]:
    """The frames as the camera of the first would have seen them, and how well that went.

    frames: uint8 (T, h, w, 3), source frames resized. motions: T - 1 times float64 (steps, 12), the motions of
    the source frames after one of `frames` up to the next; no steps if the next is the same frame again.
    frame_size: (width, height) of the source frame, which the motions are in.

    The frames are None when one of them has no homography, or one that no camera makes, or when more
    than half of a frame would show frames before it.
    """
    passed = np.concatenate(motions)
    known = ~np.isnan(passed[:, 0])
    inliers, residuals = passed[known, _INLIERS], passed[known, _RESIDUAL]
    lost = [bool(np.isnan(steps[:, 0]).any()) for steps in motions]
    quality = partial(
        Stabilization,
        inliers=float(inliers.mean()) if inliers.size else 0.0,
        residual=float(np.median(residuals)) if residuals.size else None,
        rejected_frames=float(np.mean(lost)),
    )
    if any(lost):
        return None, quality(filled=0.0)
    height, width = frames.shape[1:3]
    resized = resizing(*frame_size, width, height)
    seen = np.full((height, width), 255, np.uint8)
    kernel = np.ones((ERODED, ERODED), np.uint8)
    to_first = np.eye(3)
    out, filled = [frames[0]], 0.0
    for frame, steps in zip(frames[1:], motions, strict=True):
        for step in steps:
            to_first = to_first @ step[:9].reshape(3, 3)
        warp = resized @ to_first @ np.linalg.inv(resized)
        if not _keeps_order(warp, width, height):
            return None, quality(filled=1.0)
        mask = cv2.erode(cv2.warpPerspective(seen, warp, (width, height), flags=cv2.INTER_NEAREST), kernel)
        share = float((mask == 0).mean())
        if share > MAX_FILLED:
            return None, quality(filled=share)
        filled += share / len(frames)
        warped = cv2.warpPerspective(frame, warp, (width, height), flags=cv2.INTER_LINEAR)
        out.append(np.where(mask[..., None] > 0, warped, out[-1]))
    return np.stack(out), quality(filled=filled)


def cropped(frames: np.ndarray, box: list[int], frame_size: tuple[int, int], size: int) -> np.ndarray:
    """Cut a tile out of resized frames (T, h, w, 3): (3, T, size, size). `box` is in the source frame."""
    x, y, width, height = box
    across, down = frames.shape[2] / frame_size[0], frames.shape[1] / frame_size[1]
    columns, rows = (
        slice(round(start * scale), round((start + length) * scale))
        for start, length, scale in ((x, width, across), (y, height, down))
    )
    tiles = []
    for frame in frames[:, rows, columns]:
        shrink = min(frame.shape[:2]) >= size
        how = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        tiles.append(cv2.resize(np.ascontiguousarray(frame), (size, size), interpolation=how))
    return np.stack(tiles).transpose(3, 0, 1, 2)


def _homography(here: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, int, float] | None:
    """(homography from `here` to `there`, inliers, median miss in pixels), or None; points (n, 2)."""
    if len(here) < MIN_MATCHES:
        return None
    homography, mask = cv2.findHomography(here, there, cv2.RANSAC, RANSAC_PIXELS)
    inliers = mask.ravel() > 0 if homography is not None else np.zeros(len(here), bool)
    for _ in range(REFITS):
        # Four points always fit: fewer inliers than good matches were asked for say nothing about the camera.
        if inliers.sum() < MIN_MATCHES:
            return None
        missed = _missed(homography, here, there)
        reach = np.clip(3 * np.median(missed[inliers]), MIN_REFIT_PIXELS, RANSAC_PIXELS)
        inliers = missed < reach
        if inliers.sum() < MIN_MATCHES:
            return None
        homography, _ = cv2.findHomography(here[inliers], there[inliers], 0)
        if homography is None or not np.isfinite(homography).all() or abs(np.linalg.det(homography)) < 1e-6:
            return None
    missed = _missed(homography, here[inliers], there[inliers])
    return homography, int(inliers.sum()), float(np.median(missed))


def _missed(homography: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Distance in pixels (n,) of the points `there` to where the homography takes those `here`."""
    return np.linalg.norm(cv2.perspectiveTransform(here[:, None], homography)[:, 0] - there, axis=1)


def _keeps_order(homography: np.ndarray, width: int, height: int) -> bool:
    """Return True if the picture's corners stay a convex quadrangle, not mirrored, in front of the camera."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
    x, y, depth = homography @ np.column_stack([corners, np.ones(4)]).T
    if not (np.isfinite(depth).all() and (depth > 1e-3).all()):
        return False
    at = np.column_stack([x / depth, y / depth])
    along = np.roll(at, -1, axis=0) - at
    turn = np.roll(along, -1, axis=0)
    return bool((along[:, 0] * turn[:, 1] - along[:, 1] * turn[:, 0] > 0).all())
