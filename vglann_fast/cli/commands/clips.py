"""Videos to packed clips: `vglann clips fetch | pack | merge | show`."""

import os
from argparse import Namespace
from pathlib import Path

from vglann_fast.cli.arguments import POSITIVE, add_choice, add_seed
from vglann_fast.cli.parser import Parser, command
from vglann_fast.cli.types import fraction, one_of, place, positive, real, whole


@command(
    "clips fetch",
    "download sample videos: set S (6 MB, 6 videos) or L (most of S, and a film)",
    "vglann clips fetch S",
)
def add_fetch(parser: Parser) -> None:
    parser.add_argument("set", metavar="SET", type=one_of(("S", "L")), choices=("S", "L"), help="S or L")
    parser.add_argument("--cache", metavar="DIR", help="folder to keep them in [~/.cache/vglann-fast]")
    parser.set_defaults(func=_fetch)


def _fetch(a: Namespace) -> None:
    from vglann_fast.clips.fetch import fetch

    paths = fetch(a.set, a.cache)
    print(f"{paths[0].parent}: {len(paths)} videos")


@command(
    "clips pack",
    "cut videos into clips and store them as uint8 arrays",
    "vglann clips pack VIDEOS/ --out clips",
    "vglann clips pack a.mp4 b.mp4 --out clips --frames 16 --size 32 --stabilize",
    "vglann clips pack VIDEOS/ --out clips --scheduler tcp://HOST:8786",
)
def add_pack(parser: Parser) -> None:
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="video file, or folder of videos, frames or strips"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="clip folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing clip folder")

    cut = parser.add_argument_group("cutting")
    cut.add_argument(
        "--frames", metavar="FRAMES", type=whole(2), default=32, help="length of a clip [%(default)s]"
    )
    add_choice(cut, "--size", ("32", "64", "128"), "side of a clip in pixels [%(default)s]", default="64")
    cut.add_argument(
        "--stride",
        metavar="FRAMES",
        type=POSITIVE,
        default=1,
        help="source frames from one frame of a clip to the next [%(default)s]",
    )
    cut.add_argument(
        "--start-every",
        metavar="FRAMES",
        type=POSITIVE,
        help="source frames from one clip's start to the next [as many as a clip covers]",
    )
    cut.add_argument(
        "--tiles",
        metavar="N",
        type=POSITIVE,
        default=1,
        help="1: the center square; 2: squares of half the height; ... [%(default)s]",
    )
    cut.add_argument(
        "--min-motion",
        metavar="LEVELS",
        type=real,
        default=0.3,
        help="drop clips whose frames change by less, mean of 255 levels [%(default)s]",
    )
    cut.add_argument(
        "--test-fraction",
        metavar="FRACTION",
        type=fraction,
        default=0.1,
        help="part of the shots kept for testing, 0 to below 1 [%(default)s]",
    )
    add_seed(cut, "of the split into training and test shots [%(default)s]", default=0)
    cut.add_argument(
        "--stabilize", action="store_true", help="take the camera's motion out of each clip (takes minutes)"
    )
    add_choice(
        cut,
        "--shots",
        ("histogram", "transnetv2"),
        "how cuts are found: color histograms, or TransNetV2 (vglann weights import) [%(default)s]",
        default="histogram",
    )

    several = parser.add_argument_group("several machines")
    several.add_argument(
        "--shard",
        metavar="I/N",
        type=place,
        help="pack part I of N of the videos, counted from 1; `vglann clips merge` puts all N together",
    )
    several.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="decode by the workers of this Dask scheduler, such as tcp://HOST:8786; trust it as you trust a shell",
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--workers",
        metavar="PROCESSES",
        type=POSITIVE,
        help="decoding processes [one a processor, at most 8]",
    )
    limits.add_argument(
        "--max-frames",
        metavar="FRAMES",
        type=POSITIVE,
        default=108_000,
        help="of a file; the rest is left out [%(default)s]",
    )
    limits.add_argument(
        "--max-pixels",
        metavar="PIXELS",
        type=POSITIVE,
        default=8192 * 4320,
        help="of a frame; a file with more is rejected [%(default)s]",
    )
    limits.add_argument(
        "--max-seconds",
        metavar="SECONDS",
        type=positive,
        help="for a file, which is rejected after that [1800; with --stabilize 10800]",
    )
    parser.set_defaults(func=_pack)


def _pack(a: Namespace) -> None:
    from vglann_fast.clips.pack import decode_limits, pack

    limits = decode_limits(a.stabilize, frames=a.max_frames, pixels=a.max_pixels, seconds=a.max_seconds)
    report = pack(
        a.sources,
        a.out,
        frames=a.frames,
        size=int(a.size),
        stride=a.stride,
        start_every=a.start_every,
        tiles=a.tiles,
        min_motion=a.min_motion,
        test_fraction=a.test_fraction,
        seed=a.seed,
        stabilize=a.stabilize,
        shots=a.shots,
        workers=a.workers,
        limits=limits,
        overwrite=a.overwrite,
        shard=a.shard,
        scheduler=a.scheduler,
    )
    print(report)


@command(
    "clips merge",
    "merge clip folders: all shards of a pack, or packs of different videos",
    "vglann clips merge shard-1 shard-2 shard-3 --out clips",
)
def add_merge(parser: Parser) -> None:
    parser.add_argument("folders", metavar="CLIPS", nargs="+", help="clip folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="clip folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing clip folder")
    parser.set_defaults(func=_merge)


def _merge(a: Namespace) -> None:
    from vglann_fast.clips.merge import merge

    print(merge(a.folders, a.out, overwrite=a.overwrite))


@command("clips show", "write a contact sheet of a clip folder", "vglann clips show clips")
def add_show(parser: Parser) -> None:
    parser.add_argument("clips", metavar="CLIPS", help="clip folder")
    parser.add_argument("--out", metavar="FILE", help="PNG to write [sheet.png in the clip folder]")
    parser.set_defaults(func=_show)


def _show(a: Namespace) -> None:
    from vglann_fast.clips.sheet import show

    out = os.path.realpath(a.out) if a.out else Path(a.clips) / "sheet.png"
    show(a.clips, out)
    print(out)
