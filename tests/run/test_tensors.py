"""Tensors are read without the library's reader: from any path, with nothing but what is in the file."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save
from tiny import COLORS, new_run, tiny_options

from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.checkpoint import check_saved_size, load_trained, new_generator
from vglann_fast.mapping.fit import load_mapping
from vglann_fast.mapping.gaussian import Gaussian
from vglann_fast.metrics.kept_features import features_of_clips
from vglann_fast.nets.weights import load_weights
from vglann_fast.options.mapping import GaussianOptions
from vglann_fast.run.files import load_tensors, save_tensors, tensors_header, write_json
from vglann_fast.run.files import sha256 as digest

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
# As in names out of an old zip file: Latin-1, not UTF-8.
NAME = os.fsdecode(b"run\xe9")


def test_every_dtype_shape_and_layout_comes_back(tmp_path):
    tensors = {name: (torch.randn(2, 3) * 3).to(getattr(torch, name)) for name in DTYPES}
    tensors |= {"ü": torch.tensor(3.0), "none": torch.empty(0, 3), "": torch.ones(1)}
    tensors["channels last"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    save_tensors(tensors, tmp_path / NAME)
    found = load_tensors(tmp_path / NAME)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert tensors_header(tmp_path / NAME)[0] == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_metadata_are_read(tmp_path):
    (tmp_path / "file").write_bytes(save({"x": torch.ones(2)}, {"record": "a"}))
    assert tensors_header(tmp_path / "file") == ({"x": (2,)}, {"record": "a"})


def test_a_file_can_be_removed_and_changed_under_its_tensors(tmp_path):
    save_tensors({"x": torch.ones(1000)}, tmp_path / "file")
    found = load_tensors(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    assert found["x"].sum() == 1000


def test_tensors_lie_on_the_cpu_whatever_the_default_device(tmp_path):
    save_tensors({"x": torch.ones(3)}, tmp_path / "file")
    with torch.device("meta"):
        assert load_tensors(tmp_path / "file")["x"].tolist() == [1, 1, 1]


numbers = st.sampled_from([0, 1, 2, 4, 8, 12, 2**31, 2**62, 2**63, 10**30, -1, 1.0, True, None, "1"])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "I8", "U8", "F64", "F4", "", None, []]),
        "shape": st.lists(numbers, max_size=3) | st.lists(st.just(2**62), max_size=40) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | numbers,
        "more": numbers,
    },
)
headers = (
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | numbers, max_size=3) | numbers
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(headers, st.sampled_from([0, 4, 8, 12]), st.sampled_from([0, 0, 0, 1, -1, 2**40]))
def test_headers_that_lie_are_refused_or_read_as_the_library_reads_them(tmp_path_factory, header, size, off):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", max(0, len(text) + off)) + text + bytes(size)
    file = tmp_path_factory.getbasetemp() / "lies"
    file.write_bytes(content)
    try:
        found = load_tensors(file)
    except ValueError:
        return
    try:
        expected = load(content)
    except (SafetensorError, KeyError):  # extra fields and metadata that are not text do no harm
        return
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 2) + b"[]", b"x" * 99]
)
def test_what_is_not_such_a_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError):
        load_tensors(tmp_path / "file")


def test_a_run_whose_path_is_not_utf8(tmp_path, monkeypatch):
    """Checkpoint, mapping, kept features and imported weights: what was written there is read there."""
    folder, options = tmp_path / NAME, tiny_options()
    clips = write_clip_folder(folder / "clips", moving_squares(2))
    run = new_run(folder / "run", clips, options)
    parts = {"generator": new_generator(options, 16, 32).state_dict(), "latents": {"rows": torch.randn(2, 8)}}
    run.checkpoints.save(1, parts, {"ids": ["a", "b"]})
    check_saved_size(run, options)
    assert load_trained(run).step == 1
    mapping = Gaussian(8, GaussianOptions())
    mapping.mean, mapping.factor = torch.zeros(8).double(), torch.eye(8).double()
    (run.path / "mapping" / "gaussian").mkdir(parents=True)
    mapping.save(run.path / "mapping" / "gaussian")
    assert load_mapping(run, "gaussian").latent_dim == 8
    save_tensors({"x": torch.ones(2)}, folder / "lite0.safetensors")
    record = {"format": "vglann-weights", "version": 1, "name": "lite0", "sha256": "0"}
    write_json(folder / "lite0.json", {**record, "tensors_sha256": digest(folder / "lite0.safetensors")})
    monkeypatch.setenv("VGLANN_WEIGHTS", str(folder))
    assert load_weights("lite0").tensors["x"].tolist() == [1, 1]


def test_features_are_kept_in_a_cache_whose_path_is_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / NAME))
    videos = moving_squares(2)
    digests = [bytes([number]) for number in range(2)]

    def keep(batches):
        return features_of_clips("clips", batches, videos.shape[1:], digests, {"colors": COLORS})["colors"]

    assert torch.equal(keep([videos]), keep([]))
