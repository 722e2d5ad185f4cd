"""Arguments that several commands have, and those made from the option dataclasses."""

import json
from argparse import SUPPRESS, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from vglann_fast.cli.parser import INTERNAL, Parser
from vglann_fast.cli.types import alternatives, boolean, of_hint, one_of, whole
from vglann_fast.errors import VglannError
from vglann_fast.options.fields import flag_of
from vglann_fast.options.mapping import MAP_KINDS
from vglann_fast.options.presets import PRESETS
from vglann_fast.options.training import MACHINE, PAPER, PresetName, TrainOptions
from vglann_fast.run.environment import launched

FEATURES = "transnetv2,lite0,lite0-step"
SEED = whole(0, 2**63 - 1)
POSITIVE = whole(1)
# More is a slip of the hand: each thread is started, and PyTorch's own limit is a traceback.
_THREADS = whole(1, 1024)
ALL_KINDS = "all kinds"
# Presets whose values --help shows; `vglann train … --preset NAME --dry-run` prints the values of any.
_SHOWN: tuple[PresetName, ...] = ("paper", "modern", "demo")
BRACKETS = "In brackets: the value of preset modern, then of paper and demo where they have another."


def add_run(parser: Parser) -> None:
    """Add the run folder."""
    parser.add_argument("run", metavar="RUN", help="run folder")


def add_choice(parser: Any, flag: str, choices: Sequence[str], text: str, default: str | None = None) -> None:
    """Add an argument that takes one of a few values."""
    values = f"{alternatives(choices)}{'' if text.startswith('[') else ':'} {text}"
    parser.add_argument(
        flag, metavar="NAME", type=one_of(choices), choices=choices, default=default, help=values
    )


def add_seed(parser: Any, text: str = "of all that is drawn [0]", default: int | None = None) -> None:
    """Add --seed. Without a default it is None where it was not given."""
    parser.add_argument("--seed", type=SEED, metavar="N", default=default, help=text)


def add_device(parser: Any) -> None:
    """Add --device and --threads."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument(
        "--threads", metavar="N", type=_THREADS, help="CPU threads of an operation [$OMP_NUM_THREADS, or all]"
    )


def add_machine(parser: Any, *, deterministic: bool = True) -> None:
    """Add what a command computes on, and how."""
    add_device(parser)
    parser.add_argument(
        "--kernels",
        metavar="IMPL",
        help="auto, triton or reference; or reference,nearest=faiss [$VGLANN_KERNELS]",
    )
    if deterministic:
        parser.add_argument(
            "--deterministic", action="store_true", help="write the same bytes twice on one machine"
        )


def add_config(parser: Parser) -> None:
    """Add --config and --dry-run, whose output --config reads."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON; the command line takes precedence",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, as a config file, and stop"
    )


def add_preset(parser: Parser, default: str) -> None:
    """Add --preset; `default` says which one it is in words."""
    add_choice(parser, "--preset", get_args(PresetName), f"[{default}]")


def print_config(a: Namespace, options: Mapping[str, Any]) -> None:
    """Print the arguments of a command, with `options` in place of those that were given, as --config reads them."""
    given = {name: value for name, value in vars(a).items() if name not in INTERNAL}
    values = {name: value for name, value in (given | dict(options)).items() if value is not None}
    # Of several processes one prints: the output is to be a file for --config.
    if launched().rank == 0:
        print(json.dumps(values, indent=1))


def require_given(a: Namespace, **needed: str) -> None:
    """Raise `VglannError` unless these arguments were given on the command line or in a config file.

    needed: what each is called in the message.
    """
    missing = [called for name, called in needed.items() if getattr(a, name) is None]
    if missing:
        raise VglannError(f"{a.command}: {' and '.join(missing)} missing; see `vglann {a.command} --help`")


def given_options(a: Namespace, *classes: type) -> dict[str, Any]:
    """Return the fields of option dataclasses that were given."""
    found = {field.name: getattr(a, field.name, None) for cls in classes for field in fields(cls)}
    return {name: value for name, value in found.items() if value is not None}


def add_train_options(parser: Parser, *, without: Sequence[str] = (), show: bool = True) -> None:
    """Add an argument for each field of `TrainOptions`, in the groups of the fields.

    without: fields that the command decides itself. show: False leaves them out of --help.
    """
    hints = get_type_hints(TrainOptions)
    groups: dict[str, Any] = {}
    for field in fields(TrainOptions):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title) if show else parser
            if title == MACHINE:
                add_machine(groups[title], deterministic=False)
        if field.name not in without:
            values = {name: getattr(PRESETS[name].train, field.name) for name in _SHOWN}
            text = _help(field, hints[field.name], _defaults(values)) if show else SUPPRESS
            _add_field(groups[title], field, hints[field.name], text)


def add_map_options(parser: Parser) -> None:
    """Add an argument for each field of any kind of mapping, in groups by the kinds that have it."""
    modern = PRESETS["modern"].map
    owners: dict[str, list[str]] = {}
    for kind in MAP_KINDS:
        for field in fields(modern[kind]):
            owners.setdefault(field.name, []).append(kind)
    titles: dict[str, list[str]] = {}
    for name, kinds in owners.items():
        field = _field(modern[kinds[0]], name)
        titles.setdefault(field.metadata["group"] or _called(kinds), []).append(name)
    # Options that more kinds have come first, quirks of the paper last.
    for title in sorted(titles, key=lambda title: (title == PAPER, title != ALL_KINDS, -title.count(","))):
        group = parser.add_argument_group(title)
        for name in titles[title]:
            first = modern[owners[name][0]]
            hint = get_type_hints(type(first))[name]
            text = _help(_field(first, name), hint, _map_defaults(name, owners[name]))
            _add_field(
                group,
                _field(first, name),
                hint,
                f"{_called(owners[name])}: {text}" if title == PAPER else text,
            )


def _called(kinds: Sequence[str]) -> str:
    return ALL_KINDS if len(kinds) == len(MAP_KINDS) else ", ".join(kinds)


def _field(options: Any, name: str) -> Any:
    return next(field for field in fields(options) if field.name == name)


def _add_field(group: Any, field: Any, hint: Any, text: str) -> None:
    """Add the argument of a field. It has no default of its own: not given, the value is the preset's."""
    convert, choices = of_hint(hint), get_args(hint)
    shape: dict[str, Any] = {"metavar": field.metadata["metavar"] or ("NAME" if choices else None)}
    if convert is boolean:
        shape = {"nargs": "?", "const": True, "metavar": "BOOL"}
    group.add_argument(flag_of(field.name), type=convert, choices=choices or None, help=text, **shape)


def _help(field: Any, hint: Any, defaults: str) -> str:
    """Return the text of --help: the values, unless the defaults name them all, what they mean, and the defaults."""
    choices = get_args(hint)
    named = set(defaults.replace(";", " ").replace(",", " ").split())
    values = "" if named.issuperset(choices) else f"{alternatives(choices)}: "
    return f"{values}{field.metadata['help']} [{defaults}]".replace("%", "%%")


def _map_defaults(name: str, kinds: Sequence[str]) -> str:
    """Return the defaults of a mapping's option, in all kinds that have it."""
    texts: dict[str, list[str]] = {}
    for kind in kinds:
        values = {name_: getattr(preset.map[kind], name) for name_, preset in PRESETS.items()}
        texts.setdefault(_defaults(values), []).append(kind)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(those)} {text.replace('; ', ', ')}" for text, those in texts.items())


def _defaults(values: Mapping[PresetName, Any]) -> str:
    """Return the value of preset modern, then values of presets that differ: "0.03; paper, demo 0.01"."""
    texts: dict[str, list[str]] = {_text(values["modern"]): []}
    for name, value in values.items():
        texts.setdefault(_text(value), []).append(name)
    modern, *others = texts
    return "; ".join((modern, *(f"{', '.join(texts[text])} {text}" for text in others)))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
