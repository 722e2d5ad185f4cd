"""Processes of a training verify the checksums of the clips together, each its share of the files."""

import hashlib
import json
import signal

import numpy as np
import pytest
from forked_process import ranks

import vglann_fast as vf
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder

# Process 1 takes longer. If process 0 verified all files, it would be the first to see what is damaged in file 1.
TRAIN = """
import hashlib, os, sys, time
from vglann_fast.cli.main import main
if os.environ["RANK"] == "1":
    digest = hashlib.file_digest
    hashlib.file_digest = lambda *words: time.sleep(2) or digest(*words)
sys.exit(main(["train", *sys.argv[1:], "--device", "cpu"]))
"""


@pytest.fixture
def two_files(tmp_path):
    """A clip folder of two files of clips."""
    folder = write_clip_folder(tmp_path / "clips", moving_squares(6))
    clips, index = np.load(folder / "clips-00000.npy"), json.loads((folder / "index.json").read_text())
    index["shards"] = []
    for number, half in enumerate(np.array_split(clips, 2)):
        file = folder / f"clips-{number:05d}.npy"
        np.save(file, half)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        index["shards"].append({"file": file.name, "clips": len(half), "sha256": sha256})
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def damage(file):
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def refused_by(rank, words, folder):
    """Two processes end with one line, which process `rank` says."""
    started = ranks(TRAIN, *words, folder=folder)
    try:
        codes = [process.wait(300) for process in started]
    finally:
        for process in started:
            process.end(signal.SIGKILL)
    said = [process.said() for process in started]
    assert codes == [2, 2], said
    assert f"clips-0000{rank}.npy: damaged" in said[rank]
    assert "".join(said).count("error:") == 1, said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_file_that_one_process_finds_is_one_line_and_no_run(two_files, tmp_path, rank):
    damage(two_files / f"clips-0000{rank}.npy")
    refused_by(rank, [two_files, "--out", tmp_path / "run", "--preset", "demo"], tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_leaves_a_run_that_is_resumed_as_it_is(two_files, tiny, tmp_path):
    run = vf.train(two_files, tmp_path / "run", device="cpu", **tiny | {"epochs": 1}).path
    damage(two_files / "clips-00001.npy")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    refused_by(1, ["--resume", run, "--lr-generator", "0.1"], tmp_path)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
