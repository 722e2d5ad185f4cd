"""A blind comparison by people: `vglann study make | serve | report`."""

from argparse import Namespace
from pathlib import Path

from vglann_fast.cli.arguments import add_seed
from vglann_fast.cli.parser import Parser, command
from vglann_fast.cli.types import whole


@command(
    "study make",
    "draw pairs of samples and real clips for raters",
    "vglann study make run other-run --real clips --out study",
)
def add_make(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run with samples")
    parser.add_argument("--real", metavar="CLIPS", required=True, help="clip folder; its test split is used")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="folder to write; its page.html needs no server"
    )
    parser.add_argument(
        "--pairs",
        metavar="N",
        type=whole(),
        default=12,
        help="pairs of each comparison, an even number [%(default)s]",
    )
    add_seed(parser, "of the pairs [%(default)s]", default=0)
    parser.set_defaults(func=_make)


def _make(a: Namespace) -> None:
    from vglann_fast.study.make import make_study

    print(make_study(a.runs, a.real, a.out, pairs=a.pairs, seed=a.seed))


@command(
    "study serve",
    "show a study to raters at this machine, and keep their answers",
    "vglann study serve study",
)
def add_serve(parser: Parser) -> None:
    parser.add_argument("study", metavar="STUDY", help="folder of `vglann study make`")
    parser.add_argument(
        "--port",
        metavar="PORT",
        type=whole(0, 65_535),
        default=8720,
        help="on 127.0.0.1; 0: any free one [%(default)s]",
    )
    parser.set_defaults(func=_serve)


def _serve(a: Namespace) -> None:
    from vglann_fast.study.server import serve

    serve(a.study, a.port)


@command(
    "study report",
    "write results.html: preferences with exact intervals, and the raters' agreement",
    "vglann study report study answers-1.json answers-2.json",
)
def add_report(parser: Parser) -> None:
    parser.add_argument("study", metavar="STUDY", help="folder of `vglann study make`")
    parser.add_argument(
        "answers", metavar="FILE", nargs="*", default=[], help="answers from raters of page.html"
    )
    parser.set_defaults(func=_report)


def _report(a: Namespace) -> None:
    from vglann_fast.study.results import as_text, report_study

    print(as_text(report_study(a.study, a.answers)))
    print(Path(a.study) / "results.html")
