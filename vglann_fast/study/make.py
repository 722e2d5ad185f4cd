"""Makes a study: "Which video is more realistic?", asked of people who do not know which is which.

Compared are the held-out real clips with each run's samples, and each run with each other, in equally many pairs.
In every comparison each side is as often left as right, and no clip comes twice; over the comparisons all clips are
used about equally often. Mixed in are attention checks: a real clip beside a copy of it under heavy noise. Whoever
misses more of them than chance allows is not counted (`study_results.py`).

A study folder holds

    study.sqlite   videos, key and answers (`study_database.py`); not for raters
    page.html      the same questions as one page without the key, to give away: it needs no server, and its
                   answers come back as a file (`study_page.py`)

and, once there are answers, results.json and results.html.
"""

import logging
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.report.artifacts import NOT_NPY
from vglann_fast.run.destinations import atomic_dir, content_of
from vglann_fast.run.files import open_regular
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.write import write_mp4
from vglann_fast.study.database import FILE, Source, Study, Trial, Video, create
from vglann_fast.study.page import study_page

log = logging.getLogger("vglann_fast")

CHECKS = 8
NOISE = 80  # standard deviation, of 255: nobody who looks takes the noised copy for the more realistic
MIN_SIDE = 128  # small clips are stored enlarged, so that 4:2:0 chroma loses none of their color


class _Showing(NamedTuple):
    source: int
    clip: int


def make_study(
    runs: Sequence[str | Path], real: str | Path, out: str | Path, *, pairs: int = 12, seed: int = 0
) -> Path:
    """Write a study folder (see the top of this file) from the samples of `runs` and the test clips of `real`.

    Args:
        runs: run folders that `vglann sample` has written samples to.
        real: clip folder; its test split is used. A warning names runs whose newest checkpoint knows some of these
            clips.
        pairs: pairs of each comparison, even.
        seed: draws the pairs; the ids are random whatever the seed, or the key could be computed.

    Returns `out`. Raises `VglannError` when a run has no samples, there are fewer videos than pairs, their
    frames or sizes differ, or `out` is there already.
    """
    out = Path(out)
    if pairs < 2 or pairs % 2:
        raise VglannError(f"--pairs: expected an even number from 2 on, got {pairs}: sides are balanced")
    if content_of(out, FILE, ["page.html"]):
        raise VglannError(f"{out} is there already, perhaps with answers; choose another --out")
    held_out = ClipSet.open(real, "test")
    for run in runs:
        _warn_of_known_clips(RunDir.open(run), held_out)
    clips = held_out.read()
    arrays = {"real": clips} | {label: _samples(run) for label, run in _labels(runs).items()}
    _check_alike(arrays, str(real), pairs)
    rng = np.random.default_rng(seed)
    spoiled = rng.choice(len(clips), CHECKS, replace=len(clips) < CHECKS)
    showings = _comparisons([len(array) for array in arrays.values()], pairs, rng)
    showings += _balanced([(_Showing(0, c), _Showing(len(arrays), c)) for c in spoiled.tolist()], rng)
    sources = [Source(i, label, "run" if i else "real") for i, label in enumerate(arrays)]
    sources.append(Source(len(arrays), "noised copy", "spoiled"))
    facts = {
        "id": _new_id(),
        "seed": seed,
        "pairs": pairs,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic_dir(out, FILE, ["page.html"]) as folder:
        mp4 = _encode({showing for pair in showings for showing in pair}, list(arrays.values()), rng, folder)
        videos = [Video(_new_id(), *showing, mp4[showing]) for pair in showings for showing in pair]
        trials = [Trial(_new_id(), a.id, b.id) for a, b in zip(videos[::2], videos[1::2], strict=True)]
        create(folder / FILE, facts, sources, videos, trials)
        study = Study.open(folder)
        try:
            (folder / "page.html").write_text(study_page(study, static=True), encoding="utf-8")
        finally:
            study.close()
    return out


def _labels(runs: Sequence[str | Path]) -> dict[str, Path]:
    """Label -> run: the name of its folder, or its whole path where names are not enough."""
    paths = [Path(run) for run in runs]
    whole = [os.path.realpath(path) for path in paths]
    if len({*whole}) < len(paths):
        raise VglannError("study: the same run is given twice")
    names = [_as_text(Path(path).name) for path in whole]
    plain = len({*names, "real", "noised copy"}) == len(names) + 2
    return dict(zip(names if plain else map(_as_text, whole), paths, strict=True))


def _as_text(name: str) -> str:
    """Return the name of a file as text that can be stored and shown: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _warn_of_known_clips(run: RunDir, held_out: ClipSet) -> None:
    known = set(run.checkpoints.ids()) & set(held_out.ids)
    if known:
        log.warning(
            "%s was trained on %d of the %d real clips, and raters would see what it has learned; train again "
            "without them",
            run.path,
            len(known),
            len(held_out),
        )


def _samples(run: Path) -> np.ndarray:
    """The samples of a run, mapped: uint8 (n, 3, T, H, W)."""
    RunDir.open(run)
    file = run / "media" / "samples" / "video.npy"
    if not file.is_file():
        raise VglannError(f"{run} has no samples to show; make them with `vglann sample {run}`")
    try:
        with open_regular(file):
            array = np.lib.format.open_memmap(file, mode="r")
    except NOT_NPY as error:
        raise VglannError(f"{file}: damaged ({error}); run `vglann sample {run}` again") from error
    if array.dtype != np.uint8 or array.ndim != 5 or array.shape[1] != 3 or 0 in array.shape:
        raise VglannError(f"{file}: holds no videos ({array.dtype} {array.shape}); run `vglann sample` again")
    return array


def _check_alike(arrays: dict[str, np.ndarray], real: str, pairs: int) -> None:
    """Videos of other lengths or sizes would give away where they come from."""
    shape = arrays["real"].shape[2:]
    for label, array in arrays.items():
        if array.shape[2:] != shape:
            raise VglannError(
                f"{label}: its samples are of (frames, height, width) {array.shape[2:]}, the clips of {real} of "
                f"{shape}; compare runs that were trained on such clips"
            )
        if len(array) < pairs:
            what, more = ("test clips", "pack more videos") if label == "real" else ("samples", "sample more")
            less = f" or give --pairs {len(array) // 2 * 2}" if len(array) >= 2 else ""
            raise VglannError(
                f"{real if label == 'real' else label}: {len(array)} {what} for {pairs} pairs; {more}{less}"
            )


def _comparisons(
    counts: Sequence[int], pairs: int, rng: np.random.Generator
) -> list[tuple[_Showing, _Showing]]:
    """`pairs` pairs for any two sources, of which `counts` says how many videos each has."""
    used = [np.zeros(count, int) for count in counts]

    def draw(source: int) -> list[_Showing]:
        # Those used least so far, ties at random: no video twice in a comparison, all about equally often.
        order = np.lexsort((rng.random(counts[source]), used[source]))[:pairs]
        used[source][order] += 1
        return [_Showing(source, clip) for clip in rng.permutation(order).tolist()]

    showings = []
    for one, other in combinations(range(len(counts)), 2):
        showings += _balanced(list(zip(draw(one), draw(other), strict=True)), rng)
    return showings


def _balanced(
    pairs: Sequence[tuple[_Showing, _Showing]], rng: np.random.Generator
) -> list[tuple[_Showing, _Showing]]:
    """The pairs, in half of which, chosen at random, the two have changed places."""
    swapped = rng.permutation(len(pairs)) < len(pairs) // 2
    return [pair[::-1] if swap else pair for pair, swap in zip(pairs, swapped, strict=True)]


def _encode(
    wanted: set[_Showing], arrays: Sequence[np.ndarray], rng: np.random.Generator, folder: Path
) -> dict[_Showing, bytes]:
    """Each as the bytes of an MP4; the source after the last array stands for noised copies of real clips."""
    file = folder / "one.mp4"
    encoded = {}
    for source, clip in sorted(wanted):
        video: Any = arrays[source % len(arrays)][clip]  # uint8 (3, T, H, W)
        if source == len(arrays):
            noise = rng.normal(0, NOISE, video.shape)
            video = np.clip(np.rint(video + noise), 0, 255).astype(np.uint8)
        write_mp4(file, video, scale=max(1, -(-MIN_SIDE // min(video.shape[2:]))))
        encoded[_Showing(source, clip)] = file.read_bytes()
    file.unlink()
    return encoded


def _new_id() -> str:
    return secrets.token_hex(8)
