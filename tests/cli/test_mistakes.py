"""A user's mistakes, and a machine that has not enough: each is one line, and nothing is left behind."""

import json
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vglann_fast.cli.main import main
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import loader
from vglann_fast.interface import training as interface_training
from vglann_fast.run.files import sha256
from vglann_fast.runtime.distributed import Ranks

ROOT = Path(__file__).parents[2]

MISTAKES = {
    "no command": ([], "--help"),
    "unknown command": (["fly"], "fly"),
    "half a command": (["clips"], "vglann clips --help"),
    "a slip in a command": (["trian"], "`vglann train`"),
    "study without a command": (["study", "{run}"], "study"),
    "one argument too many": (["sample", "{run}", "again"], "again"),
    "unknown option": (["train", "x", "--out", "y", "--speed", "9"], "--speed is not an option"),
    "a slip in an option": (["train", "x", "--out", "y", "--widht", "9"], "did you mean --width?"),
    "not a number": (["train", "x", "--out", "y", "--epochs", "many"], "--epochs"),
    "out of range": (["train", "x", "--out", "y", "--batch-size", "1"], "--batch-size: expected at least 2"),
    "negative rate": (["train", "x", "--out", "y", "--lr-latents", "-1"], "--lr-latents"),
    "unknown choice": (["train", "x", "--out", "y", "--loss", "gan"], "--loss"),
    "unknown preset": (["train", "x", "--out", "y", "--preset", "best"], "--preset"),
    "nothing to train on": (["train"], "needs CLIPS and --out RUN"),
    "no clip folder": (["train", "{tmp}/none", "--out", "{tmp}/run"], "no clip folder"),
    "resume with other options": (["train", "--resume", "{run}", "--epochs", "3"], "--epochs 3"),
    "resume with another seed": (["train", "--resume", "{run}", "--seed", "3"], "--seed 3"),
    "resume elsewhere": (["train", "--resume", "{run}", "--out", "{tmp}/run"], "remove --out"),
    "resume of nothing": (["train", "--resume", "{tmp}"], "is not a run"),
    "no run": (["map", "{tmp}"], "is not a run"),
    "no mapping": (["sample", "{run}", "--kind", "imle"], "vglann map"),
    "unknown kind": (["map", "{run}", "--kind", "gan"], "--kind"),
    "a value of two dashes": (["train", "x", "--out", "y", "--epochs=--"], "--epochs: expected a value"),
    "a rate beyond all bounds": (["map", "{run}", "--lr", "9223372036854775807"], "lower --lr"),
    "log never": (["train", "x", "--out", "y", "--log-every", "0"], "--log-every"),
    "negative seed": (["train", "x", "--out", "y", "--seed", "-1"], "--seed"),
    "huge seed": (["sample", "{run}", "--seed", "99999999999999999999"], "--seed"),
    "out in a file": (
        ["train", "{clips}", "--out", "{clips}/index.json/run"],
        "is not a folder; choose another",
    ),
    "no place for a device": (["reconstruct", "{run}", "--device", "meta"], "--device meta"),
    "report of no run": (["report", "{clips}"], "is not a run"),
    "no samples": (["sample", "{run}", "-n", "0"], "-n: expected 1 to"),
    "too many samples": (["sample", "{run}", "-n", str(2**62)], "-n: expected 1 to"),
    "one step": (["interpolate", "{run}", "--steps", "1"], "--steps"),
    "run is there": (["train", "{clips}", "--out", "{run}"], "--resume"),
    "no such device": (["reconstruct", "{run}", "--device", "tpu9"], "--device tpu9"),
    "unknown kernel": (["reconstruct", "{run}", "--kernels", "reference,warp=triton"], "--kernels"),
    "unknown set": (["clips", "fetch", "XL"], "expected S or L"),
    "no source": (["clips", "pack", "{tmp}/none.mp4", "--out", "{tmp}/clips"], "none.mp4"),
    "no checkpoint": (
        ["import-glann", "{tmp}/G.pth", "{tmp}/Z.pth", "--out", "{tmp}/run"],
        "G.pth: no such file",
    ),
    "nothing to invert": (["invert", "{run}", "{tmp}/none.mp4"], "none.mp4"),
    "no steps": (["invert", "{run}", "{held_out}", "--steps", "0"], "--steps"),
    "mismatch with nothing": (["train", "x", "--out", "y", "--latents-on-mismatch", "keep"], "--resume"),
    "unknown choice on mismatch": (
        ["train", "--resume", "x", "--latents-on-mismatch", "guess"],
        "--latents-on-mismatch",
    ),
    "no clips to show": (["clips", "show", "{tmp}"], "no clip folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, untouched, tmp_path, capsys):
    arguments, message = MISTAKES[name]
    places = {name: untouched / name for name in ("run", "clips", "held_out")} | {"tmp": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("vglann: error: ")
    assert message in error[-1]
    assert sum(line.startswith("vglann: error") for line in error) == 1
    assert not list(tmp_path.rglob(".tmp-*"))
    assert not (tmp_path / "run").exists()


IMPOSSIBLE = {
    "fp16 on a CPU": (["--precision", "fp16"], 1, "--precision fp16: needs a GPU, the device is cpu"),
    "a graph on a CPU": (["--cuda-graph", "on"], 1, "--cuda-graph on: it needs a GPU"),
    "pinned for a CPU": (["--data", "pinned"], 1, "--data pinned: needs a GPU"),
    "clips that do not fit": (["--data", "resident"], 1, "--data resident: the clips take 0.00 GB"),
    "too many processes": ([], 2, "3 clips are too few for 2 processes"),
}


class Alone(Ranks):
    """One of several processes; the others have come already."""

    def wait(self):
        pass


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_trained_costs_nothing(name, untouched, tmp_path, monkeypatch, capsys):
    """Neither a new run, which is not begun, nor one that is resumed, which stays as it is."""
    options, processes, message = IMPOSSIBLE[name]
    monkeypatch.setattr(loader, "free_memory", lambda device: 1000)
    monkeypatch.setattr(interface_training, "joined", lambda device: nullcontext(Alone(0, processes)))
    run = untouched / "run"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for command in ([str(untouched / "clips"), "--out", str(tmp_path / "run")], ["--resume", str(run)]):
        assert main(["train", *command, "--device", "cpu", *options]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith(f"vglann: error: {message}")
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert not (tmp_path / "run").exists()


def test_a_graph_with_accumulation_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    """On a GPU, of which this machine needs none to be told no."""
    monkeypatch.setattr(interface_training, "torch_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(interface_training, "computing", lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    clips = write_clip_folder(tmp_path / "clips", moving_squares(4))
    command = ["train", str(clips), "--out", str(tmp_path / "run"), "--cuda-graph", "on", "--accumulate", "2"]
    assert main(command) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("vglann: error: --cuda-graph on: it was not tested with --accumulate 2;")
    assert not (tmp_path / "run").exists()


def test_an_option_that_an_earlier_version_did_not_write_is_fixed_at_its_default(untouched, tmp_path, capsys):
    run = shutil.copytree(untouched / "run", tmp_path / "run")
    options = json.loads((run / "options.json").read_text())
    del options["train"]["optimizer"]
    (run / "options.json").write_text(json.dumps(options))
    assert main(["train", "--resume", str(run), "--optimizer", "adam", "--dry-run"]) == 0
    assert main(["train", "--resume", str(run), "--optimizer", "muon", "--dry-run"]) == 2
    assert "--optimizer muon" in capsys.readouterr().err


def test_a_nan_in_the_latents_is_named(untouched, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(untouched / "run", run)
    checkpoint = max((run / "checkpoints").iterdir())
    tensors = load_file(checkpoint / "latents.safetensors")
    tensors["rows"][1, 2] = float("nan")
    save_file(tensors, checkpoint / "latents.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"]["latents.safetensors"] = sha256(checkpoint / "latents.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert main(["map", str(run)]) == 2
    assert "NaN" in capsys.readouterr().err
    assert not (run / "mapping").exists()


def test_a_reader_that_leaves_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m vglann_fast train c --out r --dry-run | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing_half(untouched, tiny, tmp_path):
    """The file system refuses files over 40 kB, as a full disk would in the middle of a checkpoint."""
    code = (
        "import resource, sys; from vglann_fast.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", untouched / "clips", "--out", tmp_path / "run", "--epochs", "1", *tiny]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "choose another output folder" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("shape", [(2**60,), (2**40, 2**40)], ids=["memory", "what an address has"])
def test_memory_that_is_not_there_is_one_line(shape, monkeypatch, capsys):
    monkeypatch.setattr(
        "vglann_fast.diagnostics.doctor.doctor", lambda as_json: torch.empty(shape, dtype=torch.uint8)
    )
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("vglann: error: out of memory")


@pytest.mark.parametrize(("value", "message"), [("foo", "foo"), ("triton", "triton")])
def test_a_wrong_variable_is_one_line(untouched, monkeypatch, capsys, value, message):
    monkeypatch.setenv("VGLANN_KERNELS", value)
    assert main(["reconstruct", str(untouched / "run"), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_torchrun_is_for_commands_that_share_their_work(untouched, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sample", str(untouched / "run")]) == 2
    assert "sample" not in (said := capsys.readouterr().err).split("only")[1]
    assert "WORLD_SIZE unset" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "clips", "--preset", "mordern"],
            "--preset: expected paper, modern, modern-2026a or demo, got 'mordern'",
        ),
        (["train", "clips", "--width=eight"], "--width: expected a whole number, got 'eight'"),
        (["clips", "fetch", "M"], "SET: expected S or L, got 'M'"),
        (["train", "clips"], "train: --out RUN missing"),
        (["train", "nowhere", "--out", "run"], "make one with `vglann clips pack VIDEOS --out"),
    ],
)
def test_a_mistake_is_said_in_the_users_terms(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
