"""The arguments of the command line: every verb's options, their types, defaults and help.

Nothing heavy is imported here, so `vglann --help` is quick.
"""

from dataclasses import fields
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt, restricted_number_type

from vglann_fast import __version__
from vglann_fast.config import MapOptions, OnMismatch, PresetName, TrainOptions, Variant

Seed = restricted_number_type(
    "Seed", int, [(">=", 0), ("<", 2**63)], docstring="A seed of the random numbers"
)


def new_parser() -> ArgumentParser:
    """The parser of `vglann`; the verb, and that of clips, is in the attribute `verb`."""
    parser = _new_parser(
        "Train non-adversarial video generators: videos -> clips -> GLO -> IMLE -> new videos."
    )
    parser.add_argument("--version", action="version", version=f"vglann {__version__}")
    commands = parser.add_subcommands(required=True, dest="verb")

    def verb(name: str, text: str, group: Any = None) -> ArgumentParser:
        one = _new_parser(text)
        (group or commands).add_subcommand(name, one, help=text)
        return one

    clips = _new_parser("Videos -> packed clips.")
    commands.add_subcommand("clips", clips, help="videos -> packed clips: fetch, pack, show")
    groups = clips.add_subcommands(required=True, dest="verb")

    p = verb(
        "fetch",
        "download real sample videos: set S (6 MB, 6 videos) or L (a film on top)",
        groups,
    )
    p.add_argument("set", type=Literal["S", "L"])
    p.add_argument("--cache", type=str, help="where to keep them; default ~/.cache/vglann-fast")

    p = verb("pack", "cut videos into clips and store them as uint8 arrays", groups)
    p.add_argument("sources", type=str, nargs="+", help="video files; folders of videos, frames or strips")
    p.add_argument("--out", type=str, required=True, help="folder to write")
    p.add_argument("--frames", type=int, default=32, help="frames of a clip")
    p.add_argument("--size", type=int, default=64, help="rows and columns of a clip: 32, 64 or 128")
    p.add_argument("--stride", type=int, default=1, help="source frames from one frame of a clip to the next")
    p.add_argument("--start-every", type=int, help="source frames between clip starts; default disjoint")
    p.add_argument(
        "--tiles", type=int, default=1, help="1: the centre square; 2: squares of half the height; ..."
    )
    p.add_argument(
        "--min-motion", type=float, default=0.3, help="drop clips that move less, mean |step| in 1/255"
    )
    p.add_argument("--test-share", type=float, default=0.1, help="share of the shots kept for testing")
    p.add_argument("--seed", type=Seed, default=0, help="of the split into train and test shots")
    p.add_argument(
        "--stabilize", action="store_true", help="take the camera's motion out of each clip (takes minutes)"
    )
    p.add_argument("--workers", type=int, help="decoding processes; default one a CPU, at most 8")
    p.add_argument("--overwrite", action="store_true", help="replace a clip folder that is there already")

    p = verb("show", "write a contact sheet of a clip folder", groups)
    p.add_argument("clips", type=str)
    p.add_argument("--out", type=str, help="PNG to write; default sheet.png in the clip folder")

    p = verb("train", "GLO: train the generator and one latent per clip")
    p.add_argument("clips", type=str, nargs="?", help="clip folder; its train split is used")
    p.add_argument("--out", type=str, help="run folder to make")
    p.add_argument("--resume", type=str, metavar="RUN", help="continue a run from its newest checkpoint")
    p.add_argument(
        "--latents-on-mismatch",
        type=OnMismatch,
        default="error",
        help="--resume, where the clips have changed: stop, keep the latents of those that are still there, or "
        "start all latents anew",
    )
    p.add_argument("--preset", type=PresetName, help="values of all options below; default modern")
    _add_options(p, TrainOptions)
    p.add_argument("--log-every", type=PositiveInt, default=10, help="steps between lines of metrics.jsonl")
    p.add_argument("--checkpoint-every", type=PositiveInt, default=10, help="epochs between checkpoints")
    p.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    _add_common(p, dry_run=True)

    p = verb("profile", "take a few training steps of a run and show where the time goes")
    p.add_argument("run", type=str)
    p.add_argument("--steps", type=PositiveInt, default=20, help="steps to measure, after 3 that are not")
    _add_common(p)

    p = verb("map", "fit a mapping from noise to the latents of a run")
    p.add_argument("run", type=str)
    p.add_argument("--kind", type=str, default="imle", help="imle")
    p.add_argument("--preset", type=PresetName, help="values of all options below; default the run's")
    _add_options(p, MapOptions)
    _add_common(p, dry_run=True)

    p = verb("sample", "make new videos from noise")
    p.add_argument("run", type=str)
    p.add_argument("-n", type=int, default=64, help="how many")
    p.add_argument("--kind", type=str, default="imle", help="mapping to sample from")
    _add_common(p)

    p = verb("reconstruct", "regenerate the training clips and measure how well")
    p.add_argument("run", type=str)
    _add_common(p)

    p = verb("interpolate", "walk between the latents of two training clips")
    p.add_argument("run", type=str)
    p.add_argument("--steps", type=int, default=8, help="videos on the way, both ends included")
    _add_common(p)

    p = verb("invert", "find the latents that best make given videos, the generator as it is")
    p.add_argument("run", type=str)
    p.add_argument("videos", type=str, nargs="+", help="video files, or a clip folder: its test clips")
    p.add_argument("--starts", type=PositiveInt, default=4, help="latents to start from for each clip")
    p.add_argument("--steps", type=PositiveInt, default=200, help="gradient steps for each clip")
    _add_common(p)

    p = verb("import-seed", "make a run from checkpoints of the paper's author's code")
    p.add_argument("generator", type=str, help="netG_*.pth")
    p.add_argument("latents", type=str, help="netZ_*.pth")
    p.add_argument("--variant", type=Variant, default="original", help="which of his two networks it is")
    p.add_argument("--out", type=str, required=True, help="run folder to make")

    p = verb("report", "write the run's page, report/index.html")
    p.add_argument("run", type=str)

    verb("doctor", "say what will run on this machine, and why; exit code 1 with a warning")

    p = verb("verify", "compare the kernels with float64 at a run's shapes; exit code 1 if one is wrong")
    p.add_argument("run", type=str)
    _add_device(p)
    return parser


def _new_parser(description: str) -> ArgumentParser:
    return ArgumentParser(prog="vglann", description=description, exit_on_error=False)


def _add_common(parser: ArgumentParser, *, dry_run: bool = False) -> None:
    parser.add_argument("--seed", type=Seed, help="default 0")
    _add_device(parser)
    parser.add_argument(
        "--kernels",
        type=str,
        help="implementation of the kernels: auto, triton or reference; per kernel reference,nearest=faiss",
    )
    if dry_run:
        parser.add_argument(
            "--dry-run", action="store_true", help="print the options this would run with, and stop"
        )


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")


def _add_options(parser: ArgumentParser, cls: type) -> None:
    """One optional argument for each field; left out, it is the preset's."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        name = "--" + field.name.replace("_", "-")
        bare: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
        parser.add_argument(name, type=hint, help=field.metadata["help"], **bare)
