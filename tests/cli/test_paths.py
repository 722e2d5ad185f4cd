"""Home folders in arguments, and folders that are not there any more."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from replaced_command import replaced_command

from vglann_fast.cli.main import main
from vglann_fast.cli.parser import COMMANDS
from vglann_fast.cli.paths import expand_user
from vglann_fast.errors import VglannError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return f"{tmp_path}/home"


@pytest.mark.parametrize(
    ("word", "expanded"),
    [
        ("--out=~/clips", "--out={home}/clips"),
        ("~/clips", "{home}/clips"),
        ("~", "{home}"),
        ("-o=~/x", "-o={home}/x"),
        ("--out=./~/clips", "--out=./~/clips"),
        ("a~b", "a~b"),
        ("--out=a/~", "--out=a/~"),
        ("~no-such-user-here/x", "~no-such-user-here/x"),
        ("~$draft.mp4", "~$draft.mp4"),
    ],
)
def test_a_leading_tilde_is_the_home_folder(word, expanded, home):
    assert expand_user(word) == expanded.format(home=home)


def test_the_home_of_another_user(tmp_path, monkeypatch):
    user = pwd.getpwall()[0]
    monkeypatch.chdir(tmp_path)
    assert expand_user(f"--out=~{user.pw_name}/x") == f"--out={user.pw_dir}/x"
    (tmp_path / f"~{user.pw_name}").mkdir()
    assert expand_user(f"~{user.pw_name}/x") == f"~{user.pw_name}/x"  # it is there, by that name


def test_no_home_to_put_in_place_of_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(VglannError, match="HOME"):
        expand_user("--out=~/x")


# Each command with every path it takes; {} is the folder.
PATHS = [
    ["clips", "fetch", "S", "--cache={}/a"],
    ["clips", "pack", "{}/a", "{}/b", "--out={}/c"],
    ["clips", "show", "{}/a", "--out={}/c"],
    ["train", "{}/a", "--out={}/c"],
    ["train", "{}/a", "--resume={}/c"],
    ["map", "{}/a"],
    ["sample", "{}/a"],
    ["reconstruct", "{}/a"],
    ["evaluate", "{}/a"],
    ["interpolate", "{}/a"],
    ["invert", "{}/a", "{}/b"],
    ["report", "{}/a"],
    ["verify", "{}/a"],
    ["profile", "{}/a"],
    ["replay", "{}/a", "--out={}/b", "--clips={}/c"],
    ["table", "{}/a", "--out={}/b"],
    ["weights", "import", "i3d", "{}/a"],
    ["study", "make", "{}/a", "{}/b", "--real={}/c", "--out={}/d"],
    ["study", "serve", "{}/a"],
    ["study", "report", "{}/a", "{}/b"],
]


@pytest.mark.parametrize("words", PATHS, ids=lambda words: " ".join(words[:2]))
def test_every_path_of_every_command_takes_a_tilde(words, home, monkeypatch):
    name = " ".join(words[:2]) if words[0] in ("clips", "weights", "study") else words[0]
    seen = []
    monkeypatch.setitem(COMMANDS, name, replaced_command(name, lambda values: seen.append(str(vars(values)))))
    main([word.format("~") for word in words])
    assert "~" not in seen[0]
    for path in (word.partition("=")[2] or word for word in words if "{}" in word):
        assert repr(path.format(home)) in seen[0]


def test_a_current_folder_that_was_removed_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])\n"
        "from vglann_fast.cli.main import main; sys.exit(main(['train', 'clips', '--out', 'run']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(gone)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cd to" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
