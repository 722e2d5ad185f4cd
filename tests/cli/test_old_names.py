"""Command lines and configs of earlier versions: understood, with one warning for each old name."""

import json

import pytest

from vglann_fast.cli.main import main
from vglann_fast.cli.parser import COMMANDS, command_parser
from vglann_fast.cli.words import parse
from vglann_fast.options.aliases import ALIASES

OLD = [entry for entry in ALIASES if entry.scope not in ("command", "record")]


def command_of(entry):
    """(command, option under its old name, value that it gets)"""
    if entry.scope in COMMANDS:
        values = {"normalise": "false", "held_out": "0", "test_share": "0.5"}
        return entry.scope, entry.old, values[entry.old]
    command, option = entry.scope.rsplit(" ", 1)
    return command, option, entry.old


def needed(command):
    return {"clips pack": ["videos", "--out", "clips"], "map": ["run"], "evaluate": ["run"]}.get(
        command, ["clips"]
    )


@pytest.mark.parametrize("entry", OLD, ids=lambda entry: f"{entry.scope} {entry.old}")
@pytest.mark.parametrize("joined", [True, False])
def test_an_old_name_is_read_as_the_present_one_with_one_warning(entry, joined, capsys):
    command, option, value = command_of(entry)
    flag = "--" + option.replace("_", "-")
    words = [f"{flag}={value}"] if joined else [flag, value]
    values = parse([*command.split(), *needed(command), *words, *words])
    if entry.scope in COMMANDS:
        assert getattr(values, entry.new) == command_parser(command).arguments[entry.new].type(value)
    else:
        assert getattr(values, option) == entry.new
    (warning,) = capsys.readouterr().err.strip().splitlines()
    assert warning.startswith("vglann: warning: ")
    assert entry.old.replace("_", "-") in warning
    assert entry.new.replace("_", "-") in warning


def test_a_config_may_have_old_names(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text("run: r\nnormalise: false\nheld-out: 0.25\nschedule: halving\n")
    a = parse(["map", "--config", str(tmp_path / "old.yaml"), "--normalise", "true"])
    assert (a.normalize, a.holdout_fraction, a.schedule) == (True, 0.25, "halve-every-50")
    assert (
        len(capsys.readouterr().err.strip().splitlines()) == 3
    )  # of --normalise once, though it is there twice


def test_an_old_and_a_new_name_for_one_option_in_a_config_are_refused(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text("run: r\nnormalise: false\nnormalize: true\n")
    assert main(["map", "--config", str(tmp_path / "old.yaml")]) == 2
    assert "normalize is there twice" in capsys.readouterr().err


def test_an_old_command_is_the_present_one(tmp_path, capsys):
    assert main(["import-seed", "G.pth", "Z.pth", "--out", str(tmp_path / "run")]) == 2
    warning, error = capsys.readouterr().err.strip().splitlines()
    assert "vglann import-glann" in warning
    assert "G.pth" in error


def test_a_table_takes_the_old_values_of_a_training(capsys):
    assert parse(["table", "clips", "--latent-mode", "catchup"]).latent_mode == "lazy"
    assert "--latent-mode lazy" in capsys.readouterr().err


def test_only_one_process_of_several_warns(monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert parse(["train", "clips", "--blur", "seed"]).blur == "paper"
    assert capsys.readouterr().err == ""


def test_present_names_are_read_without_a_warning(tmp_path, capsys):
    words = ["train", "clips", "--out", str(tmp_path / "r"), "--preset", "paper", "--seed", "3", "--dry-run"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["schedule"] == "halve-every-tenth"
    assert printed.err == ""
