"""Every file of numbers that is read, broken in its bytes: shards, safetensors, arrays, databases, weight files."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import torch
from faults.case import Case, part_of
from faults.fuzz_run import KINDS, rendered, run_with_mappings, sampled, weights_at, weights_of_lite0
from faults.mutations import Reader, fuzz
from safetensors.torch import save_file
from tiny import COLORS
from tiny_study import answer_all, prefer, tiny_study

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares
from vglann_fast.interop.weight_shapes import expected_shapes
from vglann_fast.interop.weights import _only_weight_file, _read
from vglann_fast.metrics.features import extract
from vglann_fast.metrics.kept_features import features_of_clips
from vglann_fast.nets.weights import load_weights
from vglann_fast.report.artifacts import read_artifacts
from vglann_fast.run.files import sha256
from vglann_fast.study.database import Study
from vglann_fast.study.make import _samples

FULL = 400  # broken files for each reader


def cases(share: float) -> Iterable[Case]:
    """`FULL` for each reader."""
    with tempfile.TemporaryDirectory() as root:
        yield from fuzz(readers(Path(root)), part_of(FULL, share))


def readers(root: Path) -> Iterable[Reader]:
    """All of them; `root` is for the good files."""
    run = run_with_mappings(root / "made")
    clips, study = root / "made" / "clips", tiny_study(root / "study")
    shards = ("clips-00000.npy",)
    yield Reader("clip shards", clips, shards, lambda folder: ClipSet.open(folder).read([0]))
    yield Reader(
        "clip shards with their checksum", clips, shards, lambda f: ClipSet.open(f).read([0]), _seal_shards
    )
    checkpoint = str(sorted((run / "checkpoints").iterdir())[-1].relative_to(run))
    parts = tuple(f"{checkpoint}/{part}.safetensors" for part in ("generator", "latents", "optimizer"))
    yield Reader("checkpoints", run, parts, rendered)
    yield Reader("checkpoints with their checksums", run, parts, rendered, _seal_checkpoint)
    for kind in KINDS:
        file = f"mapping/{kind}/mapping.safetensors"
        yield Reader(f"{kind}/mapping.safetensors", run, (file,), partial(sampled, kind=kind))
    arrays = ("media/samples/video.npy", "media/samples/mask.npy")
    yield Reader("arrays of a report", run, arrays, _arrays)
    _answer(study)
    yield Reader("study databases", study, ("study.sqlite",), _study)
    kept = root / "cache"
    kept.mkdir()
    _kept_features(kept)
    features = tuple(str(file.relative_to(kept)) for file in kept.rglob("*.safetensors"))
    yield Reader("kept features", kept, features, _kept_features)
    weights = weights_of_lite0(root / "weights")
    yield Reader("imported weights", weights, ("lite0.safetensors",), _weights, share=0.2)
    yield from _weight_files(root / "files")


def _seal_shards(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["sha256"] = hashlib.sha256((folder / "clips-00000.npy").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def _seal_checkpoint(folder: Path) -> None:
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    state["sha256"] = {name: sha256(newest / name) for name in state["sha256"]}
    (newest / "state.json").write_text(json.dumps(state))


def _arrays(folder: Path) -> None:
    """A report names what it cannot read and raises nothing."""
    found = read_artifacts(folder).samples
    for array in (found.video, found.mask):
        if array is not None:
            array[-1].max()
    _samples(folder)


def _answer(study: Path) -> None:
    opened = Study.open(study)
    answer_all(opened, "a" * 16, prefer("real", "hazel", "maple", "noised copy"))
    opened.close()


def _study(folder: Path) -> None:
    opened = Study.open(folder)
    try:
        for trial in opened.trials:
            opened.video(trial.left)
        opened.rated()
    finally:
        opened.close()


def _kept_features(folder: Path) -> None:
    """Features of two clips with this cache: the right ones, whatever is in it."""
    clips, extractors = moving_squares(2), {"x": COLORS}
    with patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        found = features_of_clips("clips", [clips], clips.shape[1:], [b"0", b"1"], extractors)
    assert torch.equal(found["x"], extract(extractors, clips)["x"])


def _weights(folder: Path) -> None:
    with weights_at(folder):
        load_weights("lite0")


def _weight_files(folder: Path) -> Iterable[Reader]:
    """The same few tensors in every kind of file that people give weights away in."""
    state = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3)}
    folder.mkdir()
    (folder / "f").mkdir()
    save_file(state, folder / "f" / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, folder / "f" / "w.pth")
    torch.save(state, folder / "f" / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "f" / "w.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(folder / "f" / "w.pth", "some/w.pth")
    _write_keras(folder / "f" / "w.h5")
    for name in ("w.safetensors", "w.pth", "old.pth", "w.whl", "w.h5"):
        read = partial(_unpacked, name=name)
        yield Reader(f"weight files, {name}", folder / "f", (name,), read, share=0.2 if name == "w.h5" else 1)


def _unpacked(folder: Path, name: str) -> None:
    """As `vglann weights import` reads it, up to the comparison with a network's shapes."""
    path = folder / name
    if name == "w.whl":
        path, _ = _only_weight_file(path, folder)
    for tensor in _read("hed-vgg16", path, str(path)).values():
        tensor.sum()


def _write_keras(file: Path) -> None:
    """Zeros of HED's shapes; packed, they take little."""
    shapes = list(expected_shapes("hed-vgg16").values())
    layers = [(block, i) for block, n in enumerate((2, 2, 3, 3, 3), start=1) for i in range(n)]
    names = [f"block{block}/layers/conv2d{f'_{i}' if i else ''}" for block, i in layers]
    with h5py.File(file, "w") as out:
        for at, shape in enumerate(shapes):
            stored = shape if len(shape) == 1 else (*shape[2:], shape[1], shape[0])
            zeros = np.zeros(stored, np.float32)
            out.create_dataset(f"{names[at // 2]}/vars/{at % 2}", data=zeros, compression="gzip")
