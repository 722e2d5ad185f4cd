"""The command line: the whole route at tiny size, and a user's mistakes answered in one line."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from vglann_fast.cli import commands
from vglann_fast.cli.main import main
from vglann_fast.cli.parser import new_parser, spelled_out
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import loader
from vglann_fast.runtime import distributed
from vglann_fast.runtime.distributed import Ranks

ROOT = Path(__file__).parents[2]
TINY = ["--width", "4", "--latent-dim", "8", "--levels", "2", "--batch-size", "3"]


@pytest.fixture(autouse=True)
def no_choice_of_kernels_is_left_behind():
    """`--kernels` sets the default of the process, and these tests are one process."""
    from vglann_kernels import use_impl

    yield
    use_impl(None)


@pytest.fixture(scope="module")
def route(tmp_path_factory):
    """A run that went through train, map, reconstruct, sample, interpolate and report."""
    folder = tmp_path_factory.mktemp("route")
    clips = write_clip_folder(folder / "clips", moving_squares(6))
    run = folder / "run"
    for command in (
        ["train", str(clips), "--preset", "demo", "--out", str(run), "--epochs", "3", *TINY],
        ["map", str(run), "--epochs", "3"],
        ["reconstruct", str(run)],
        ["sample", str(run), "-n", "5", "--seed", "1"],
        ["interpolate", str(run), "--steps", "3"],
        ["report", str(run)],
    ):
        assert main(command) == 0, command
    return run


def test_the_route_leaves_what_it_promises(route):
    assert json.loads((route / "options.json").read_text())["train"]["width"] == 4
    samples = route / "media" / "samples"
    assert np.load(samples / "video.npy").shape == (5, 3, 16, 32, 32)
    assert np.load(samples / "mask.npy").shape == (5, 1, 16, 32, 32)
    assert np.load(samples / "latents.npy").shape == (5, 8)
    record = json.loads((samples / "samples.json").read_text())
    assert record["seed"] == 1
    assert len(set(record["nearest"]["id"])) >= 1
    assert np.load(route / "media" / "nearest" / "video.npy").shape == (5, 3, 16, 32, 32)
    assert np.load(route / "media" / "interpolation" / "video.npy").shape == (3, 3, 16, 32, 32)
    reconstruction = json.loads((route / "media" / "reconstruction" / "reconstruction.json").read_text())
    assert reconstruction["clips"] == 6
    assert reconstruction["psnr"] == pytest.approx(np.mean(reconstruction["per_clip"]["psnr"]))
    assert {row["stage"] for row in map(json.loads, (route / "metrics.jsonl").read_text().splitlines())} == {
        "glo",
        "imle",
    }
    page = (route / "report" / "index.html").read_text()
    assert f"{reconstruction['psnr']:.1f}" in page
    for name in ("video.mp4", "video.gif", "sheet.png"):
        assert (samples / name).stat().st_size > 1000


def test_the_same_seed_gives_the_same_samples(route, capsys):
    before = np.load(route / "media" / "samples" / "video.npy")
    assert main(["sample", str(route), "-n", "5", "--seed", "1"]) == 0
    assert np.array_equal(before, np.load(route / "media" / "samples" / "video.npy"))
    assert capsys.readouterr().out.strip() == str(route / "media" / "samples")


def test_kernels_flag_reaches_the_ops(route, capsys):
    assert main(["sample", str(route), "-n", "2", "--kernels", "triton", "--device", "cpu"]) == 2
    assert "triton" in capsys.readouterr().err
    assert main(["sample", str(route), "-n", "2", "--kernels", "reference,nearest=faiss"]) == 0


MISTAKES = {
    "no verb": ([], "verb"),
    "unknown verb": (["fly"], "fly"),
    "unknown option": (["train", "x", "--out", "y", "--speed", "9"], "--speed"),
    "not a number": (["train", "x", "--out", "y", "--epochs", "many"], "epochs"),
    "out of range": (["train", "x", "--out", "y", "--batch-size", "1"], "--batch-size: expected at least 2"),
    "negative rate": (["train", "x", "--out", "y", "--lr-latents", "-1"], "--lr-latents"),
    "unknown choice": (["train", "x", "--out", "y", "--loss", "gan"], "loss"),
    "unknown preset": (["train", "x", "--out", "y", "--preset", "best"], "preset"),
    "nothing to train on": (["train"], "needs CLIPS and --out RUN"),
    "no clip folder": (["train", "{tmp}/none", "--out", "{tmp}/run"], "no clip folder"),
    "resume and more": (["train", "--resume", "{tmp}", "--epochs", "3"], "give it alone"),
    "resume of nothing": (["train", "--resume", "{tmp}"], "is not a run"),
    "no run": (["map", "{tmp}"], "is not a run"),
    "no mapping": (["sample", "{run}", "--kind", "imle"], "vglann map"),
    "unknown kind": (["map", "{run}", "--kind", "gan"], "--kind"),
    "log never": (["train", "x", "--out", "y", "--log-every", "0"], "log_every"),
    "negative seed": (["train", "x", "--out", "y", "--seed", "-1"], "seed"),
    "huge seed": (["sample", "{run}", "--seed", "99999999999999999999"], "seed"),
    "out in a file": (["train", "{clips}", "--out", "{clips}/index.json/run"], "cannot be made"),
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
        ["import-seed", "{tmp}/G.pth", "{tmp}/Z.pth", "--out", "{tmp}/run"],
        "G.pth: no such file",
    ),
    "nothing to invert": (["invert", "{run}", "{tmp}/none.mp4"], "none.mp4"),
    "no steps": (["invert", "{run}", "{held_out}", "--steps", "0"], "steps"),
    "mismatch with nothing": (["train", "x", "--out", "y", "--latents-on-mismatch", "keep"], "--resume"),
    "unknown choice on mismatch": (["train", "--resume", "x", "--latents-on-mismatch", "guess"], "mismatch"),
    "no clips to show": (["clips", "show", "{tmp}"], "no clip folder"),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A trained run without a mapping, and its clips."""
    folder = tmp_path_factory.mktemp("untouched")
    clips = write_clip_folder(folder / "clips", moving_squares(3))
    write_clip_folder(folder / "held_out", moving_squares(1, seed=1), split="test")
    assert main(["train", str(clips), "--out", str(folder / "run"), "--epochs", "1", *TINY]) == 0
    return folder


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


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_trained_costs_nothing(name, untouched, tmp_path, monkeypatch, capsys):
    """Neither a new run, which is not begun, nor one that is resumed, which stays as it is."""
    options, processes, message = IMPOSSIBLE[name]
    monkeypatch.setattr(loader, "free_memory", lambda device: 1000)
    monkeypatch.setattr(distributed, "joined", lambda device: nullcontext(Ranks(0, processes)))
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
    monkeypatch.setattr(commands, "device_and_kernels", lambda a: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    clips = write_clip_folder(tmp_path / "clips", moving_squares(4))
    command = ["train", str(clips), "--out", str(tmp_path / "run"), "--cuda-graph", "on", "--accumulate", "2"]
    assert main(command) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("vglann: error: --cuda-graph on: it was not tested with --accumulate 2;")
    assert not (tmp_path / "run").exists()


def test_a_nan_in_the_latents_is_named(untouched, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    from vglann_fast.run.files import sha256

    run = tmp_path / "run"
    shutil.copytree(untouched / "run", run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    tensors = load_file(checkpoint / "latents.safetensors")
    tensors["rows"][1, 2] = float("nan")
    save_file(tensors, checkpoint / "latents.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"]["latents.safetensors"] = sha256(checkpoint / "latents.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert main(["map", str(run)]) == 2
    assert "NaN" in capsys.readouterr().err
    assert not (run / "mapping").exists()


def test_dry_run_prints_the_options_and_makes_nothing(tmp_path, capsys):
    command = [
        "train",
        "clips",
        "--preset",
        "paper",
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "7",
        "--dry-run",
    ]
    assert main(command) == 0
    options = json.loads(capsys.readouterr().out)
    assert options["train"]["epochs"] == 7
    assert options["train"]["blur"] == "seed"
    assert not (tmp_path / "run").exists()


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['vglann', '--help']\n"
        "try: runpy.run_module('vglann_fast', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'triton', 'faiss', 'av', 'cv2', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
    assert "heavy: []" in done.stdout
    assert min(seconds) < 0.5


def test_a_reader_that_leaves_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m vglann_fast train c --out r --dry-run | head -n 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr


# Commands of the README that want what tests have not: the network, videos, weight files, people, minutes.
ONLY_PARSED = ("clips fetch", "clips pack", "weights import", "evaluate run --kind", "table", "study")


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip().startswith("vglann ")]


def test_every_command_in_the_readme_runs(route, tmp_path, monkeypatch):
    """At tiny size, in the order of the README; downloads and long trainings only as far as --dry-run."""
    monkeypatch.chdir(tmp_path)
    os.symlink(route.parent / "clips", tmp_path / "clips")
    commands = readme_commands()
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command.replace("-n 64", "-n 4"))[1:]
        if command.removeprefix("vglann ").startswith(ONLY_PARSED):
            new_parser().parse_args(spelled_out(words))
        elif words[0] == "train" and {"paper", "--loss"} & set(words):
            assert main([*words, "--dry-run"]) == 0, command
        elif words[0] == "train" and "--resume" not in words:
            assert main([*words, "--epochs", "1", *TINY]) == 0, command
        elif words[0] == "map":
            assert main([*words, "--epochs", "2"]) == 0, command
        else:
            assert main(words) == 0, command


def test_a_full_disk_is_one_line_and_leaves_nothing_half(untouched, tmp_path):
    """The file system refuses files over 40 kB, as a full disk would in the middle of a checkpoint."""
    code = (
        "import resource, sys; from vglann_fast.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", untouched / "clips", "--out", tmp_path / "run", "--epochs", "1", *TINY]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "choose another output folder" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("shape", [(2**60,), (2**40, 2**40)], ids=["memory", "what an address has"])
def test_memory_that_is_not_there_is_one_line(shape, monkeypatch, capsys):
    monkeypatch.setitem(commands.VERBS, "doctor", lambda a: torch.empty(shape, dtype=torch.uint8))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("vglann: error: out of memory")


@pytest.mark.parametrize(("value", "message"), [("foo", "foo"), ("triton", "triton")])
def test_a_wrong_variable_is_one_line(untouched, monkeypatch, capsys, value, message):
    monkeypatch.setenv("VGLANN_KERNELS", value)
    assert main(["reconstruct", str(untouched / "run"), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_torchrun_is_for_verbs_that_share_their_work(untouched, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sample", str(untouched / "run")]) == 2
    assert "only train and map" in capsys.readouterr().err


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "vglann_kernels" in block]
    names: dict = {}
    exec(block, names)
    assert names["video"].grad.abs().max() > 0


def test_the_readme_has_no_gaps():
    assert "@@" not in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "clips", "--preset", "mordern"],
            "--preset: expected paper, modern or demo, got 'mordern'",
        ),
        (["train", "clips", "--width=eight"], "--width: expected a whole number, got 'eight'"),
        (["clips", "fetch", "M"], "SET: expected S or L, got 'M'"),
        (["train", "clips"], "train: --out RUN missing"),
        (["train", "nowhere", "--out", "run"], "make one with `vglann clips pack VIDEOS --out nowhere`"),
    ],
)
def test_a_mistake_is_said_in_the_users_terms(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
