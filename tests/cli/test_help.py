"""The text of --help, and that it loads nothing heavy."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

from vglann_fast.cli.main import main
from vglann_fast.cli.parser import COMMANDS, command_parser
from vglann_fast.cli.words import GROUPS, parse
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.options.presets import PRESETS
from vglann_fast.options.training import TrainOptions

HEAVY = {"torch", "triton", "faiss", "av", "cv2", "matplotlib", "numpy", "scipy", "yaml", "distributed"}


def printed(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_is_short_and_has_no_holes(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed([*name.split(), "--help"], capsys)
    assert len(text.splitlines()) <= (90 if name == "train" else 100)
    assert not re.search(r"null|None|\[\]|%\(|==", text)
    for action in command_parser(name).arguments.values():
        if action.help != "==SUPPRESS==":
            assert (action.option_strings or [str(action.metavar)])[-1] in text
            assert action.help


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_commands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[name].examples
    for example in COMMANDS[name].examples:
        words = shlex.split(example)
        words = words[words.index("vglann" if words[0] == "vglann" else "vglann_fast") + 1 :]
        if "--config" in words:
            (tmp_path / words[words.index("--config") + 1]).write_text("seed: 3\n")
        assert parse(words).command == name


def test_the_overview_names_every_command(capsys):
    text = printed(["--help"], capsys)
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S", text, flags=re.MULTILINE)
    for group in GROUPS:
        listed = printed([group, "--help"], capsys)
        assert {name for name in COMMANDS if f"  {name} " in listed} == {
            name for name in COMMANDS if name.startswith(f"{group} ")
        }


def test_an_option_shows_the_defaults_of_the_presets(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    text = " ".join(printed(["train", "--help"], capsys).split())
    assert "[0.002; paper 0.001]" in text
    assert "[cosine; paper halve-every-tenth]" in text
    for field in fields(TrainOptions):
        value = getattr(PRESETS["modern"].train, field.name)
        shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if value == 0 else str(value)
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"{flag} [^\[]*(\[BOOL\])?(\[-1, 1\]|\[0, 1\]|[^\[])*\[{shown}[\];]", text), flag


def test_a_training_without_compile_does_not_load_the_compiler_of_torch(tmp_path):
    """It takes longer than the rest of torch. What loads it: PyTorch's algorithms set to what they are, and the
    optimizers of torch.optim as they are made."""
    write_clip_folder(tmp_path / "clips", moving_squares(3, frames=16, size=32))
    options = "--width 4 --latent-dim 8 --batch-size 3 --epochs 1 --levels 2 --background-share 0"
    words = ["train", "clips", "--out", "run", *options.split()]
    code = (
        "import sys; from vglann_fast.cli.main import main\n"
        f"main({words} + ['--dry-run']); main({words})\n"
        "print('heavy:', sorted({'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "trained: " in done.stdout
    assert "heavy: []" in done.stdout


def test_quirks_of_the_paper_stand_in_a_group_at_the_end(capsys):
    text = printed(["train", "--help"], capsys)
    titles = re.findall(r"^(\w[^\n]*):$", text, flags=re.MULTILINE)
    assert titles[1:6] == ["data", "model", "loss", "optimization", "machine"]
    assert titles[6].startswith("reproducing the paper")
    assert titles[7:] == ["examples"]
    last = text.split(titles[6])[1].split("examples:")[0]
    quirks = {f.name for f in fields(TrainOptions) if f"--{f.name.replace('_', '-')} " in last}
    paper, modern = PRESETS["paper"].train, PRESETS["modern"].train
    assert len(quirks) == 10
    assert all(getattr(paper, name) != getattr(modern, name) for name in quirks)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["clips", "pack", "--help"]]
)
def test_help_loads_nothing_heavy(words):
    code = (
        f"import sys, runpy; sys.argv = ['vglann', *{words!r}]\n"
        "try: runpy.run_module('vglann_fast', run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"print('heavy:', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
