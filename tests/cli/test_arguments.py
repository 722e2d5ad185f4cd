"""Every argument of every command, from the parsers: taken with a good value, refused by its name with a bad one."""

import json

import pytest

from vglann_fast.cli import main as module
from vglann_fast.cli.main import main
from vglann_fast.cli.parser import COMMANDS, command_parser
from vglann_fast.cli.types import boolean, fraction, names, place, positive, real
from vglann_fast.options.presets import PRESETS

CASES = [(name, dest) for name in COMMANDS for dest in command_parser(name).arguments]
# Any text may be the name of a file, so positional arguments without a type refuse nothing.
REFUSING = [
    (name, dest)
    for name, dest in CASES
    if (action := command_parser(name).arguments[dest]).option_strings or action.type not in (None, str)
]
TEXTS = {boolean: "false", real: "0.5", positive: "0.5", fraction: "0.5", names: "l1,imle", place: "2/3"}


def good(action):
    """Text that an argument takes: another value than its default, where it has several."""
    if action.choices:
        return action.choices[-1]
    if action.type in (None, str):
        return "laplacian:1" if action.dest == "loss" else "2"
    return TEXTS.get(action.type, "6")


def bad(action):
    """Words in which an argument has a value that it does not take."""
    if action.option_strings and action.nargs == 0:
        return [f"{action.option_strings[0]}=perhaps"]
    if action.type in (None, str):
        return [action.option_strings[0]]  # a value is missing
    value = "," if action.type is names else "perhaps"
    return [f"{action.option_strings[0]}={value}"] if len(action.option_strings[0]) > 2 else ["-n", value]


def words_for(name, without=None):
    """The words of a command with all that it cannot do without."""
    words = name.split()
    for action in command_parser(name).arguments.values():
        if action.required and action.dest != without:
            words += [*action.option_strings, good(action)]
    return words


@pytest.fixture
def performed(monkeypatch):
    """Collect what the command line would have run, in place of running it."""
    values = []
    monkeypatch.setattr(module, "perform", lambda a: values.append(a) or 0)
    monkeypatch.setattr(module, "MADE", {})
    return values


@pytest.mark.parametrize(("name", "dest"), CASES)
def test_a_good_value_is_taken(name, dest, performed):
    action = command_parser(name).arguments[dest]
    several = action.nargs if isinstance(action.nargs, int) else 1
    text = [good(action)] * several
    words = words_for(name)
    if not action.required:
        words += [*action.option_strings[:1], *text]
    assert main(words) == 0
    (values,) = performed
    found = getattr(values, dest)
    if action.nargs == 0:
        assert found is True
    elif action.nargs in ("+", "*") or several > 1:
        assert found == text
    else:
        assert found == (action.type or str)(text[0])
    assert values.command == name


@pytest.mark.parametrize(("name", "dest"), REFUSING)
def test_a_bad_value_is_refused_by_name(name, dest, performed, capsys):
    action = command_parser(name).arguments[dest]
    if not action.option_strings:
        words = [*name.split(), *("perhaps" for a in command_parser(name).arguments.values() if a.required)]
    else:
        words = [*words_for(name, without=dest), *bad(action)]
    assert main(words) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"vglann: error: {(action.option_strings or [action.metavar])[0]}: ")
    assert not performed


@pytest.mark.parametrize("preset", PRESETS)
def test_an_option_that_is_not_given_is_the_presets(preset, tmp_path, capsys):
    """By a dry run, whose figures are all that the training would have."""
    words = [
        "train",
        "clips",
        "--out",
        str(tmp_path / "run"),
        "--preset",
        preset,
        "--epochs",
        "7",
        "--dry-run",
    ]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["epochs"] == 7
    for name, value in vars(PRESETS[preset].train).items():
        assert name == "epochs" or printed[name] == value
    assert not (tmp_path / "run").exists()
