"""The documents: all commands are known, and the README's, the first guide's and all Python run."""

import os
import re
import shlex
from pathlib import Path

from vglann_fast.cli.main import main
from vglann_fast.cli.words import parse

ROOT = Path(__file__).parents[2]

# Commands that want what tests have not: the network, videos, weight files, people, minutes.
ONLY_PARSED = ("clips fetch", "clips pack", "weights import", "evaluate run --kind", "table", "study")


def shell_lines(document):
    """The lines of a document's shell blocks, whole, without their comments."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines]


def first_commands():
    """The commands that lead from videos to a page and to what else can be made of a run."""
    documents = (ROOT / "README.md", ROOT / "docs" / "guides" / "start.md")
    return [line for path in documents for line in shell_lines(path) if line.startswith("vglann ")]


def test_every_command_in_the_documents_has_words_the_program_knows():
    documents = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "kernels").rglob("*.md")]
    found = 0
    for line in (line for document in documents for line in shell_lines(document)):
        if command := re.search(r"(?:^|\s)(?:vglann|-m vglann_fast) ([a-z].*)", line):
            found += 1
            # Variables of the shell, such as the number of a job, stand for numbers.
            words = re.sub(r"\$\w+", "1", command[1].split(" && ")[0])
            parse(shlex.split(words, comments=True))
    assert found > 30


def test_every_command_in_the_readme_and_the_first_guide_runs(route, tiny, tmp_path, monkeypatch):
    """At tiny size, in the order of the documents; downloads and long trainings only as far as --dry-run."""
    monkeypatch.chdir(tmp_path)
    os.symlink(route.parent / "clips", tmp_path / "clips")
    commands = first_commands()
    assert len(commands) >= 10
    for command in commands:
        words = shlex.split(command.replace("-n 64", "-n 4"))[1:]
        if command.removeprefix("vglann ").startswith(ONLY_PARSED):
            parse(words)
        elif words[0] == "train" and {"paper", "--loss"} & set(words):
            assert main([*words, "--dry-run"]) == 0, command
        elif words[0] == "train" and "--resume" not in words:
            assert main([*words, "--epochs", "1", *tiny]) == 0, command
        elif words[0] == "map":
            assert main([*words, "--epochs", "2"]) == 0, command
        elif words[0] == "profile":
            assert main([*words, "--steps", "2"]) == 0, command
        else:
            assert main(words) == 0, command


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "vglann_kernels" in block]
    names: dict = {}
    exec(block, names)
    assert names["video"].grad.abs().max() > 0


def test_the_python_of_the_guides_runs(route, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(route, tmp_path / "run")
    documents = sorted((ROOT / "docs" / "guides").glob("*.md"))
    blocks = [
        b for d in documents for b in re.findall(r"```python\n(.*?)```", d.read_text(), flags=re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        # Two videos and a few steps, as inverting takes 200 for each.
        exec(block.replace("sample(16", "sample(2").replace("invert(videos)", "invert(videos, steps=5)"), {})


def test_the_readme_has_no_gaps():
    assert "@@" not in (ROOT / "README.md").read_text()
