"""The command line: verbs only. Each verb checks its arguments, then calls one function of a stage.

Nothing heavy is imported before a verb runs, so `vglann --help` is quick.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from vglann_fast import __version__
from vglann_fast.config import MapOptions, PresetName, TrainOptions, options_to_json, preset
from vglann_fast.errors import VglannError

Verb = Callable[[Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vglann`; returns the exit status: 0, 2 for a mistake of the user's, 128 + n after signal n."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser, verbs = _parser()
    try:
        chosen = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        name, values = chosen.verb, chosen[chosen.verb]
        if name == "clips":
            name, values = f"clips {values.verb}", values[values.verb]
        verbs[name](values)
    except ArgumentError as error:
        return _fail(str(error))
    except VglannError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Raised by code that was loaded only now, so looked up by name.
        if type(error).__name__ == "Interrupted":
            print(f"vglann: {error}", file=sys.stderr)
            return error.exit_code  # type: ignore[attr-defined]
        raise
    return 0


def _fail(message: str) -> int:
    print(f"vglann: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


# ---- verbs


def _clips_fetch(a: Namespace) -> None:
    from vglann_fast.clips.fetch import fetch

    paths = fetch(a.set, a.cache)
    print(f"{paths[0].parent}: {len(paths)} videos")


def _clips_pack(a: Namespace) -> None:
    from vglann_fast.clips.pack import pack

    options = {name: value for name, value in a.as_dict().items() if name not in ("sources", "out")}
    print(pack(a.sources, a.out, **options))


def _clips_show(a: Namespace) -> None:
    from vglann_fast.clips.sheet import show

    out = a.out or Path(a.clips) / "sheet.png"
    show(a.clips, out)
    print(out)


def _train(a: Namespace) -> None:
    given = _given(a, TrainOptions)
    if a.resume is not None:
        if given or a.clips or a.out or a.preset or a.seed is not None:
            raise VglannError("--resume: takes its clips and options from the run; give it alone")
        _resume(a)
        return
    if a.clips is None or a.out is None:
        raise VglannError("train: needs CLIPS and --out RUN, or --resume RUN")
    options = replace(preset(a.preset or "modern").train, **given)
    record = {
        "preset": a.preset or "modern",
        "seed": a.seed or 0,
        "clips": str(Path(a.clips).absolute()),
        "train": options_to_json(options),
    }
    if _dry_run(a, record):
        return
    from vglann_fast.clips.dataset import ClipSet
    from vglann_fast.run_dir import RunDir

    device = _device_and_kernels(a)
    clips = ClipSet.open(a.clips, "train")
    run = RunDir.new(a.out, {**record, "frames": clips.frames, "size": clips.size})
    _train_run(a, clips, run, device, resume=False)


def _resume(a: Namespace) -> None:
    from vglann_fast.clips.dataset import ClipSet
    from vglann_fast.run_dir import RunDir

    run = RunDir.open(a.resume)
    if _dry_run(a, run.options):
        return
    device = _device_and_kernels(a)
    _train_run(a, ClipSet.open(run.options["clips"], "train"), run, device, resume=True)


def _train_run(a: Namespace, clips: Any, run: Any, device: Any, *, resume: bool) -> None:
    from vglann_fast.glo.train import train

    train(
        clips,
        run,
        seed=run.options["seed"],
        device=device,
        log_every=a.log_every,
        checkpoint_every=a.checkpoint_every,
        resume=resume,
        tensorboard=a.tensorboard,
    )
    for warning in run.warnings:
        print(f"vglann: warning: {warning}", file=sys.stderr)
    print(f"trained: {run.path}")


def _map(a: Namespace) -> None:
    from vglann_fast.run_dir import RunDir

    name = a.preset or RunDir.open(a.run).options.get("preset", "modern")
    options = replace(preset(name).map, **_given(a, MapOptions))
    if _dry_run(a, {"preset": name, "kind": a.kind, "map": options_to_json(options)}):
        return
    from vglann_fast.mapping.fit import fit_mapping

    print(f"fitted: {fit_mapping(a.run, a.kind, options, seed=a.seed or 0, device=_device_and_kernels(a))}")


def _sample(a: Namespace) -> None:
    from vglann_fast.samples.sample import sample

    print(sample(a.run, n=a.n, seed=a.seed or 0, kind=a.kind, device=_device_and_kernels(a)))


def _reconstruct(a: Namespace) -> None:
    from vglann_fast.metrics.reconstruction import reconstruct

    folder, record = reconstruct(a.run, device=_device_and_kernels(a))
    print(
        f"{folder}: reconstruction PSNR {record['psnr']:.2f} dB over {record['clips']} clips "
        f"(mean colour {record['psnr_mean_colour']:.2f} dB)"
    )


def _interpolate(a: Namespace) -> None:
    from vglann_fast.samples.sample import interpolate

    print(interpolate(a.run, steps=a.steps, seed=a.seed or 0, device=_device_and_kernels(a)))


def _report(a: Namespace) -> None:
    from vglann_fast.report.artefacts import number, read_artefacts
    from vglann_fast.report.page import write_report

    page = write_report(a.run)
    psnr = number(read_artefacts(Path(a.run)).reconstruction.record.get("psnr"))
    print(page if psnr is None else f"{page}: reconstruction PSNR {psnr:.2f} dB")


# ---- arguments


def _parser() -> tuple[ArgumentParser, dict[str, Verb]]:
    parser = _new_parser(
        "Train non-adversarial video generators: videos -> clips -> GLO -> IMLE -> new videos."
    )
    parser.add_argument("--version", action="version", version=f"vglann {__version__}")
    commands = parser.add_subcommands(required=True, dest="verb")
    verbs: dict[str, Verb] = {}

    def verb(name: str, text: str, run: Verb, group: Any = None) -> ArgumentParser:
        one = _new_parser(text)
        (group or commands).add_subcommand(name, one, help=text)
        verbs[f"clips {name}" if group else name] = run
        return one

    clips = _new_parser("Videos -> packed clips.")
    commands.add_subcommand("clips", clips, help="videos -> packed clips: fetch, pack, show")
    groups = clips.add_subcommands(required=True, dest="verb")

    p = verb(
        "fetch",
        "download real sample videos: set S (6 MB, 6 videos) or L (a film on top)",
        _clips_fetch,
        groups,
    )
    p.add_argument("set", type=Literal["S", "L"])
    p.add_argument("--cache", type=str, help="where to keep them; default ~/.cache/vglann-fast")

    p = verb("pack", "cut videos into clips and store them as uint8 arrays", _clips_pack, groups)
    p.add_argument("sources", type=str, nargs="+", help="video files, folders of videos, folders of frames")
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
    p.add_argument("--seed", type=int, default=0, help="of the split into train and test shots")
    p.add_argument("--workers", type=int, help="decoding processes; default one a CPU, at most 8")
    p.add_argument("--overwrite", action="store_true", help="replace a clip folder that is there already")

    p = verb("show", "write a contact sheet of a clip folder", _clips_show, groups)
    p.add_argument("clips", type=str)
    p.add_argument("--out", type=str, help="PNG to write; default sheet.png in the clip folder")

    p = verb("train", "GLO: train the generator and one latent per clip", _train)
    p.add_argument("clips", type=str, nargs="?", help="clip folder; its train split is used")
    p.add_argument("--out", type=str, help="run folder to make")
    p.add_argument("--resume", type=str, metavar="RUN", help="continue a run from its newest checkpoint")
    p.add_argument("--preset", type=PresetName, help="values of all options below; default modern")
    _add_options(p, TrainOptions)
    p.add_argument("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    p.add_argument("--checkpoint-every", type=int, default=10, help="epochs between checkpoints")
    p.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    _add_common(p, dry_run=True)

    p = verb("map", "fit a mapping from noise to the latents of a run", _map)
    p.add_argument("run", type=str)
    p.add_argument("--kind", type=str, default="imle", help="imle")
    p.add_argument("--preset", type=PresetName, help="values of all options below; default the run's")
    _add_options(p, MapOptions)
    _add_common(p, dry_run=True)

    p = verb("sample", "make new videos from noise", _sample)
    p.add_argument("run", type=str)
    p.add_argument("-n", type=int, default=64, help="how many")
    p.add_argument("--kind", type=str, default="imle", help="mapping to sample from")
    _add_common(p)

    p = verb("reconstruct", "regenerate the training clips and measure how well", _reconstruct)
    p.add_argument("run", type=str)
    _add_common(p)

    p = verb("interpolate", "walk between the latents of two training clips", _interpolate)
    p.add_argument("run", type=str)
    p.add_argument("--steps", type=int, default=8, help="videos on the way, both ends included")
    _add_common(p)

    p = verb("report", "write the run's page, report/index.html", _report)
    p.add_argument("run", type=str)
    return parser, verbs


def _new_parser(description: str) -> ArgumentParser:
    return ArgumentParser(prog="vglann", description=description, exit_on_error=False)


def _add_common(parser: ArgumentParser, *, dry_run: bool = False) -> None:
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--kernels",
        type=str,
        help="implementation of the kernels: auto, triton or reference; per kernel reference,nearest=faiss",
    )
    if dry_run:
        parser.add_argument(
            "--dry-run", action="store_true", help="print the options this would run with, and stop"
        )


def _add_options(parser: ArgumentParser, cls: type) -> None:
    """One optional argument for each field; left out, it is the preset's."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=hint, help=field.metadata["help"])


def _given(a: Namespace, cls: type) -> dict[str, Any]:
    return {f.name: a[f.name] for f in fields(cls) if a[f.name] is not None}


def _dry_run(a: Namespace, options: dict[str, Any]) -> bool:
    if a.dry_run:
        print(json.dumps(options, indent=1))
    return bool(a.dry_run)


def _device_and_kernels(a: Namespace) -> Any:
    """The torch device of --device; sets the process default of the kernels from --kernels."""
    import torch
    from vglann_kernels import ImplUnavailable, use_impl

    name = a.device if a.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VglannError(f"--device {name}: cannot be used here: {str(error).splitlines()[0]}") from error
    if a.kernels is not None:
        try:
            use_impl(a.kernels)
        except (ValueError, ImplUnavailable) as error:
            raise VglannError(f"--kernels {a.kernels}: {error}") from error
    return device
