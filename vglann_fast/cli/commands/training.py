"""Training the generator and the latents: `vglann train | profile`, and runs from checkpoints of others."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from vglann_fast.cli.arguments import (
    BRACKETS,
    POSITIVE,
    add_choice,
    add_config,
    add_machine,
    add_preset,
    add_run,
    add_seed,
    add_train_options,
    given_options,
    print_config,
)
from vglann_fast.cli.device import device_and_kernels
from vglann_fast.cli.parser import Parser, command
from vglann_fast.errors import VglannError
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.presets import preset
from vglann_fast.options.training import OnMismatch, PresetName, TrainOptions, Variant
from vglann_fast.run.environment import launched


@command(
    "train",
    "train the generator and one latent per clip (GLO)",
    "vglann train clips --out run",
    "vglann train --resume run --lr-generator 0.0005",
    "vglann train --config run.yaml --out other-run",
    "torchrun --nproc-per-node 8 -m vglann_fast train clips --out run",
)
def add_train(parser: Parser) -> None:
    parser.description = f"{parser.description}\n{BRACKETS}"
    parser.usage = (
        "vglann train CLIPS --out RUN [options]\n       vglann train --resume RUN [CLIPS] [options]"
    )
    add_config(parser)
    add_preset(parser, "modern")
    add_seed(parser, "of parameters, latents and the order of clips [0]")

    data = parser.add_argument_group("data")
    data.add_argument("clips", metavar="CLIPS", nargs="?", help="clip folder; its training split is used")
    data.add_argument("--out", metavar="RUN", help="run folder to make")
    data.add_argument(
        "--resume",
        metavar="RUN",
        help="run to continue; CLIPS: where its clips are now",
    )
    add_choice(
        data,
        "--latents-on-mismatch",
        get_args(OnMismatch),
        "if clips changed [%(default)s]",
        default="error",
    )
    data.add_argument(
        "--log-every",
        metavar="STEPS",
        type=POSITIVE,
        default=10,
        help="between lines of metrics.jsonl [%(default)s]",
    )
    data.add_argument(
        "--checkpoint-every",
        metavar="N",
        type=POSITIVE,
        default=10,
        help="passes between checkpoints [%(default)s]",
    )
    data.add_argument(
        "--keep-checkpoints",
        metavar="N",
        type=POSITIVE,
        default=2,
        help="newest to keep [%(default)s]",
    )
    data.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    add_train_options(parser)
    parser.set_defaults(func=_train)


def _train(a: Namespace) -> None:
    given = given_options(a, TrainOptions)
    if a.resume is not None:
        _resume(a, given)
        return
    if a.clips is None or a.out is None:
        missing = " and ".join(n for n, v in (("CLIPS", a.clips), ("--out RUN", a.out)) if v is None)
        raise VglannError(f"train: {missing} missing; a training needs CLIPS and --out RUN, or --resume RUN")
    if a.latents_on_mismatch != "error":
        raise VglannError("--latents-on-mismatch: a new run has no latents yet; give it with --resume")
    name: PresetName = a.preset or "modern"
    if a.dry_run:
        options = options_to_json(replace(preset(name).train, **given))
        print_config(
            a, {**options, "preset": name, "seed": a.seed or 0, "clips": str(Path(a.clips).absolute())}
        )
        return
    from vglann_fast.interface.training import train

    run = train(a.clips, a.out, preset=name, seed=a.seed or 0, **_machine(a), **given)
    _say_trained(run.path)


def _resume(a: Namespace, given: dict[str, Any]) -> None:
    """Continue a run, with the options in `given` changed."""
    from vglann_fast.interface.training import resume, resumed_run

    if a.out is not None:
        raise VglannError("--resume continues a run in its own folder; remove --out")
    given |= {name: value for name in ("preset", "seed") if (value := getattr(a, name)) is not None}
    if a.dry_run:
        options = resumed_run(a.resume, a.clips, given).options
        record = {name: options[name] for name in ("preset", "seed", "clips")}
        print_config(a, {**record, **options["train"]})
        return
    mismatch = a.latents_on_mismatch
    run = resume(a.resume, a.clips, latents_on_mismatch=mismatch, **_machine(a), **given)
    _say_trained(run.path)


def _machine(a: Namespace) -> dict[str, Any]:
    """Return the arguments of `train` and `resume` that are not options of the training."""
    names = ("device", "kernels", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard")
    return {name: getattr(a, name) for name in names}


def _say_trained(path: Path) -> None:
    if launched().rank == 0:
        print(f"trained: {path}")


@command("profile", "take a few training steps of a run and show where the time goes", "vglann profile run")
def add_profile(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument(
        "--steps", metavar="N", type=POSITIVE, default=20, help="to measure, after 4 of warm-up [%(default)s]"
    )
    add_seed(parser)
    add_machine(parser)
    parser.set_defaults(func=_profile)


def _profile(a: Namespace) -> None:
    from vglann_fast.diagnostics.profile import profile

    print(profile(a.run, steps=a.steps, device=device_and_kernels(a)))


@command(
    "import-glann",
    "make a run from checkpoints of the GLANN-VIDEO code",
    "vglann import-glann netG_100.pth netZ_100.pth --out run",
)
def add_import_glann(parser: Parser) -> None:
    parser.add_argument("generator", metavar="GENERATOR", help="netG_*.pth")
    parser.add_argument("latents", metavar="LATENTS", help="netZ_*.pth")
    add_choice(
        parser,
        "--variant",
        get_args(Variant),
        "which of the two networks it is [%(default)s]",
        default="original",
    )
    parser.add_argument("--out", metavar="RUN", required=True, help="run folder to make")
    parser.set_defaults(func=_import_glann)


def _import_glann(a: Namespace) -> None:
    from vglann_fast.interop.import_glann import import_glann

    print(f"imported: {import_glann(a.generator, a.latents, a.out, a.variant).path}")
