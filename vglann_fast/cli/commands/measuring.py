"""Commands that measure and report a run: `vglann reconstruct | evaluate | table | report | replay`."""

import io
import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from vglann_fast.cli.arguments import (
    FEATURES,
    POSITIVE,
    add_choice,
    add_config,
    add_device,
    add_machine,
    add_preset,
    add_run,
    add_seed,
    add_train_options,
    given_options,
    print_config,
    require_given,
)
from vglann_fast.cli.device import device_and_kernels
from vglann_fast.cli.parser import Parser, command, perform, values_for
from vglann_fast.cli.types import alternatives, names, whole
from vglann_fast.errors import VglannError
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.mapping import MAP_KINDS
from vglann_fast.options.presets import preset
from vglann_fast.options.training import LOSSES, TrainOptions
from vglann_fast.progress import say
from vglann_fast.run.environment import job_size

log = logging.getLogger("vglann_fast")

_WITH_FILES = ("--features-file", "--protocol", "--threads", "--deterministic")


@command(
    "reconstruct",
    "reproduce the training clips from their latents and measure how well",
    "vglann reconstruct run",
)
def add_reconstruct(parser: Parser) -> None:
    add_run(parser)
    add_seed(parser)
    add_machine(parser)
    parser.set_defaults(func=_reconstruct)


def _reconstruct(a: Namespace) -> None:
    from vglann_fast.metrics.reconstruction import describe, reconstruct

    folder, record = reconstruct(a.run, device=device_and_kernels(a))
    print(f"{folder}: {describe(record)}")


def _add_features(parser: Parser) -> None:
    parser.add_argument(
        "--features",
        metavar="NAME,...",
        type=names,
        default=FEATURES,
        help="networks to compare by: transnetv2, lite0, lite0-step, i3d (FVD), i3d-16; or none [%(default)s]",
    )
    parser.add_argument(
        "-n", metavar="VIDEOS", type=POSITIVE, help="on each side [all held-out clips, at most 2048]"
    )


def _features(a: Namespace) -> list[str]:
    return [] if a.features == ["none"] else a.features


@command(
    "evaluate",
    "measure a run's reconstructions and samples against held-out clips",
    "vglann evaluate run --features none",
    "vglann evaluate run --kind imle,gaussian --features transnetv2,lite0 -n 256",
    "vglann evaluate --features-file real.npy generated.npy --protocol jedi",
)
def add_evaluate(parser: Parser) -> None:
    parser.usage = "vglann evaluate RUN [options]\n       vglann evaluate --features-file REAL GENERATED"
    parser.add_argument("run", metavar="RUN", nargs="?", help="run folder")
    parser.add_argument(
        "--features-file",
        metavar=("REAL", "GENERATED"),
        nargs=2,
        help="without RUN: compare features computed elsewhere, .npy files of numbers [videos, features]",
    )
    add_choice(parser, "--protocol", ("jedi",), "with --features-file: add the statistic published as JEDi")
    parser.add_argument(
        "--kind", metavar="KIND,...", type=names, help="mappings to sample from [all that were fitted]"
    )
    _add_features(parser)
    parser.add_argument(
        "--invert", metavar="CLIPS", type=whole(0), default=8, help="held-out clips to invert [%(default)s]"
    )
    add_seed(parser)
    add_machine(parser)
    parser.set_defaults(func=_evaluate)


def _evaluate(a: Namespace) -> None:
    from vglann_fast.metrics.evaluate import PATIENCE, evaluate
    from vglann_fast.metrics.record import doubts, tables
    from vglann_fast.run.folder import RunDir
    from vglann_fast.runtime.distributed import joined

    if a.features_file:
        _compare_files(a)
        return
    require_given(a, run="RUN")
    if a.protocol:
        raise VglannError(
            f"--protocol {a.protocol} takes features from files; add --features-file REAL GENERATED"
        )
    device = device_and_kernels(a)
    with joined(device, PATIENCE) as ranks, RunDir.open(a.run).locked(ranks.rank):
        result = evaluate(
            a.run,
            kinds=a.kind or (),
            features=_features(a),
            n=a.n,
            invert=a.invert,
            seed=a.seed or 0,
            device=device,
            ranks=ranks,
        )
    if ranks.rank > 0:
        return
    for line in (*result.warnings, *doubts(result.records)):
        say(f"vglann: warning: {line}")
    print(tables(result.records), f"{result.folder}", sep="\n\n")


def _compare_files(a: Namespace) -> None:
    from vglann_fast.metrics.given_features import compare_files, file_tables

    if job_size() > 1:
        raise VglannError(
            "--features-file: one process compares files; start it alone, with WORLD_SIZE unset"
        )
    unused = [name for name in a.given if name not in _WITH_FILES]
    if unused:
        raise VglannError(
            f"--features-file takes only {alternatives(_WITH_FILES[1:])} beside it; leave {', '.join(unused)} out"
        )
    real, generated = a.features_file
    figures = compare_files(real, generated, a.protocol)
    for line in figures["warnings"]:
        say(f"vglann: warning: {line}")
    print(file_tables(figures, real, generated))


@command(
    "table",
    "train with each loss, fit each mapping to each, and measure them all",
    "vglann table clips --losses laplacian,l1 --mappings imle,vae --features none --out table",
    "vglann table --config table.yaml",
)
def add_table(parser: Parser) -> None:
    parser.usage = "vglann table CLIPS --out DIR [options]"
    parser.add_argument("clips", metavar="CLIPS", nargs="?", help="clip folder")
    parser.add_argument("--out", metavar="DIR", help="folder to make; existing results in it are reused")
    parser.add_argument(
        "--losses",
        metavar="LOSS,...",
        type=names,
        default="laplacian,resnext101-3d",
        help=f"of {', '.join(LOSSES)} [%(default)s, as in the paper]",
    )
    parser.add_argument(
        "--mappings",
        metavar="KIND,...",
        type=names,
        default="imle,vae,gmm",
        help=f"of {', '.join(MAP_KINDS)}, with the preset's options [%(default)s]",
    )
    _add_features(parser)
    add_config(parser)
    add_preset(parser, "modern")
    add_seed(parser)
    add_train_options(parser, without=("loss",), show=False)
    parser.epilog = (
        f"Options of `vglann train --help`, except --loss, apply to all trainings.\n\n{parser.epilog}"
    )
    parser.set_defaults(func=_table)


def _table(a: Namespace) -> None:
    from vglann_fast.experiments.table import Grid, make_table, plan_table

    require_given(a, clips="CLIPS", out="--out DIR")
    name = a.preset or "modern"
    grid = Grid(
        Path(a.clips),
        Path(a.out),
        preset=name,
        seed=a.seed or 0,
        train=replace(preset(name).train, **given_options(a, TrainOptions)),
        losses=a.losses,
        kinds=a.mappings,
        features=_features(a),
        n=a.n,
    )
    device = device_and_kernels(a)
    if a.dry_run:
        for loss, part in plan_table(grid, device=device).items():
            log.info("%s: %s", loss, json.dumps(part.summary))
        train = options_to_json(grid.train)
        del train["loss"]
        print_config(a, {"preset": name, "seed": grid.seed, **train})
        return
    results = make_table(grid, device=device)
    print(results.read_text(encoding="utf-8"), results, sep="\n")


@command("report", "write the run's page, report/index.html", "vglann report run")
def add_report(parser: Parser) -> None:
    add_run(parser)
    parser.set_defaults(func=_report)


def _report(a: Namespace) -> None:
    from vglann_fast.report.artifacts import number, read_artifacts
    from vglann_fast.report.page import write_report
    from vglann_fast.run.folder import RunDir

    page = write_report(RunDir.open(a.run).path)
    psnr = number(read_artifacts(Path(a.run)).reconstruction.record.get("psnr"))
    print(page if psnr is None else f"{page}: reconstruction PSNR {psnr:.2f} dB")


@command(
    "replay",
    "make a run once more and compare; exit code 1 if anything came out differently",
    "vglann replay run",
    "vglann replay run --clips /data/clips --out run-again",
)
def add_replay(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("--out", metavar="DIR", help="where the second run stays [a temporary folder]")
    parser.add_argument("--clips", metavar="CLIPS", help="where the run's clips are now, if they were moved")
    add_device(parser)
    parser.set_defaults(func=_replay)


def _replay(a: Namespace) -> int:
    from vglann_fast.experiments.replay import replay
    from vglann_fast.interface.machine import torch_device

    def again(verb: str, options: Mapping[str, Any], run: Path) -> None:
        where = f"{a.run}/history.jsonl: the options of {verb} are damaged: "
        values = values_for(verb, [str(run)], {**options, "device": a.device}, where)
        printed = io.StringIO()
        with redirect_stdout(printed):
            perform(values)
        say(printed.getvalue().rstrip("\n"))

    verdicts = replay(a.run, again, out=a.out, clips=a.clips, device=torch_device(a.device))
    print("\n".join(map(str, verdicts)))
    return 1 if any(verdict.same is False for verdict in verdicts) else 0
