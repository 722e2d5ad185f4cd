"""Mapping noise to latents, and videos from latents: `vglann map | sample | interpolate | invert`."""

from argparse import Namespace

from vglann_fast.cli.arguments import (
    BRACKETS,
    POSITIVE,
    add_choice,
    add_config,
    add_machine,
    add_map_options,
    add_preset,
    add_run,
    add_seed,
    given_options,
    print_config,
    require_given,
)
from vglann_fast.cli.device import device_and_kernels
from vglann_fast.cli.parser import Parser, command
from vglann_fast.cli.types import whole
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.mapping import MAP_KINDS, map_options
from vglann_fast.options.presets import preset


@command(
    "map",
    "fit a mapping from noise to the latents of a run",
    "vglann map run",
    "vglann map run --kind gmm --components 1,4,16",
    "vglann map run --config map.yaml --reject-quantile 0.1",
)
def add_map(parser: Parser) -> None:
    parser.description = f"{parser.description}\n{BRACKETS}"
    parser.usage = "vglann map RUN [options]"
    parser.add_argument("run", metavar="RUN", nargs="?", help="run folder")
    add_choice(parser, "--kind", MAP_KINDS, "[%(default)s]", default="imle")
    add_config(parser)
    add_preset(parser, "the run's")
    add_seed(parser)
    add_machine(parser)
    add_map_options(parser)
    parser.set_defaults(func=_map)


def _map(a: Namespace) -> None:
    from vglann_fast.run.files import read_json
    from vglann_fast.run.folder import RunDir

    require_given(a, run="RUN")
    name = a.preset or RunDir.open(a.run).options.get("preset", "modern")
    presets = preset(name).map
    options = map_options(presets, a.kind, given_options(a, *map(type, presets.values())))
    if a.dry_run:
        print_config(a, {"preset": name, "seed": a.seed or 0, **options_to_json(options)})
        return
    from vglann_fast.mapping.fit import fit_mapping
    from vglann_fast.mapping.generalization import describe_gap
    from vglann_fast.runtime.distributed import joined

    device = device_and_kernels(a)
    with joined(device) as ranks, RunDir.open(a.run).locked(ranks.rank):
        folder = fit_mapping(a.run, a.kind, options, seed=a.seed or 0, device=device, ranks=ranks)
    if ranks.rank == 0:
        print(describe_gap(read_json(folder / "mapping.json")["gap"]))
        print(f"fitted: {folder}")


@command("sample", "make new videos from noise", "vglann sample run -n 16 --seed 1 --kind vae")
def add_sample(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("-n", metavar="VIDEOS", type=whole(), default=64, help="how many [%(default)s]")
    add_choice(parser, "--kind", MAP_KINDS, "mapping to sample from [%(default)s]", default="imle")
    add_seed(parser)
    add_machine(parser)
    parser.set_defaults(func=_sample)


def _sample(a: Namespace) -> None:
    from vglann_fast.samples.sample import sample

    print(sample(a.run, n=a.n, seed=a.seed or 0, kind=a.kind, device=device_and_kernels(a)))


@command("interpolate", "walk between the latents of two training clips", "vglann interpolate run --steps 8")
def add_interpolate(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "--steps",
        metavar="VIDEOS",
        type=whole(),
        default=8,
        help="on the way, both ends included [%(default)s]",
    )
    add_seed(parser)
    add_machine(parser)
    parser.set_defaults(func=_interpolate)


def _interpolate(a: Namespace) -> None:
    from vglann_fast.samples.sample import interpolate

    print(interpolate(a.run, steps=a.steps, seed=a.seed or 0, device=device_and_kernels(a)))


@command(
    "invert",
    "find the latents that reproduce given videos best, with the generator as it is",
    "vglann invert run new.mp4",
    "vglann invert run clips --steps 400",
)
def add_invert(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "videos", metavar="VIDEO", nargs="+", help="video file, or a clip folder for its test clips"
    )
    parser.add_argument(
        "--starts", metavar="N", type=POSITIVE, default=4, help="first latents for each clip [%(default)s]"
    )
    parser.add_argument(
        "--steps", metavar="N", type=POSITIVE, default=200, help="gradient steps for each clip [%(default)s]"
    )
    add_seed(parser)
    add_machine(parser)
    parser.set_defaults(func=_invert)


def _invert(a: Namespace) -> None:
    from vglann_fast.samples.invert import invert_videos

    folder, record = invert_videos(
        a.run, a.videos, starts=a.starts, steps=a.steps, device=device_and_kernels(a)
    )
    nearest = record.get("nearest", {}).get("psnr", [None] * len(record["id"]))
    for clip, psnr, other in zip(record["id"], record["psnr"], nearest, strict=True):
        beside = "" if other is None else f" (nearest training clip {other:.2f} dB)"
        print(f"{clip}: PSNR {psnr:.2f} dB{beside}")
    print(folder)
