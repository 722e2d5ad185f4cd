"""Files whose structure lies, drawn by hypothesis: only `VglannError` or what was in them."""

import json
import shutil
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from faults.mutations import VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import new_run, tiny_options

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.checkpoint import load_trained, new_generator
from vglann_fast.mapping.em import Mixture
from vglann_fast.mapping.fit import load_mapping
from vglann_fast.mapping.gaussian import Gaussian
from vglann_fast.mapping.gmm import GMM
from vglann_fast.mapping.imle import IMLE
from vglann_fast.options.fields import options_from_json, options_to_json
from vglann_fast.options.mapping import GaussianOptions, GmmOptions, ImleOptions
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir

few = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.one_of(
    st.integers(), st.integers(0, 5), st.sampled_from([64, 2**12, 2**14, 2**31, 2**63, 10**30])
)
junk = st.one_of(st.sampled_from(VALUES), st.none(), st.booleans(), st.text(max_size=5), st.floats(), numbers)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("clips") / "clips", moving_squares(2))


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """A run with a checkpoint that was never trained, and mappings."""
    options = tiny_options()
    made = new_run(tmp_path_factory.mktemp("run") / "run", clips, options)
    rows = {"rows": torch.randn(2, 8)}
    state = {"epoch": 0, "position": 0, "processes": 1, "finished": True, "ids": ["a", "b"]}
    made.checkpoints.save(
        1, {"generator": new_generator(options, 16, 32).state_dict(), "latents": rows}, state
    )
    gmm, gaussian = GMM(8, GmmOptions()), Gaussian(8, GaussianOptions())
    eye = torch.eye(8, dtype=torch.float64)
    gmm.mixture = Mixture(torch.full((2,), 0.5).double(), torch.zeros(2, 8).double(), eye.repeat(2, 1, 1))
    gaussian.mean, gaussian.factor = torch.zeros(8).double(), eye
    for mapping in (IMLE(8, ImleOptions(noise_dim=2, hidden=4)), gmm, gaussian):
        folder = made.path / "mapping" / mapping.kind
        folder.mkdir(parents=True)
        mapping.save(folder)
    return made.path


# ---- shards


REAL = {"descr": "|u1", "fortran_order": False, "shape": (2, 3, 16, 32, 32)}
shapes = st.lists(st.sampled_from([2, 3, 16, 32]) | numbers, max_size=6).map(tuple)
others = {
    "descr": st.sampled_from(["|u1", "<f4", "|O", "|V1", ">u8", "|b1", "|S9"]) | junk,
    "fortran_order": st.booleans() | junk,
    "shape": shapes | junk,
    "more": junk,
}


def test_shards_whose_headers_lie(clips, tmp_path):
    data, read = (clips / "clips-00000.npy").read_bytes()[128:], moving_squares(2)
    write_clip_folder(tmp_path / "clips", read)

    @few
    @given(
        st.fixed_dictionaries({}, optional=others).map(lambda lies: {**REAL, **lies}),
        st.none() | st.integers(0, 2**16 - 1),
        st.sampled_from([b"\x01\x00"] * 4 + [b"\x02\x00", b"\x03\x00", b"\xff\xff"]),
        st.sampled_from([len(data)] * 4 + [len(data) - 1, len(data) // 2, 0]),
    )
    def lied(header, length, version, kept):
        text = repr(header).encode("utf-8", "backslashreplace") + b"\n"
        size = len(text) if length is None else length
        content = b"\x93NUMPY" + version + struct.pack("<H", min(size, 2**16 - 1)) + text + data[:kept]
        (tmp_path / "clips" / "clips-00000.npy").write_bytes(content)
        try:
            found = ClipSet.open(tmp_path / "clips", verify=False).read()
        except VglannError:
            return
        assert np.array_equal(found, read)

    lied()


# ---- indexes


def places(value, path=()):
    """The way to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def replaced(value, path, by):
    """A copy of a JSON value with another one at `path`."""
    copy = json.loads(json.dumps(value))
    *way, last = path
    holder = copy
    for key in way:
        holder = holder[key]
    holder[last] = by
    return copy


def test_indexes_whose_values_lie(clips, tmp_path):
    write_clip_folder(tmp_path / "clips", moving_squares(2))
    whole = json.loads((clips / "index.json").read_text())

    @few
    @given(st.sampled_from(list(places(whole))), junk)
    def lied(path, value):
        (tmp_path / "clips" / "index.json").write_text(json.dumps(replaced(whole, path, value)))
        try:
            found = ClipSet.open(tmp_path / "clips")
        except VglannError:
            return
        assert found.read().shape == (len(found), 3, 16, 32, 32)

    lied()


# ---- safetensors


WIDTHS = {
    "F32": 4,
    "I32": 4,
    "F64": 8,
    "I64": 8,
    "F16": 2,
    "BF16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "X": 4,
}
sizes = st.lists(st.integers(0, 8), max_size=3)


@st.composite
def tensor_files(draw, real):
    """A safetensors file of tensors like `real`, a few of another dtype or shape, laid out as they claim, or not."""
    header, at = {}, 0
    other = draw(st.dictionaries(st.sampled_from([*real, "more"]), st.none() | sizes, max_size=2))
    for name in sorted({*real, *other}):
        dtype, shape = real.get(name, ("F32", (1,)))
        if name in other:
            dtype, shape = draw(st.sampled_from(list(WIDTHS))), other[name] or shape
        end = at + WIDTHS[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    if draw(st.sampled_from([False, False, True])):
        name, other_name = draw(st.sampled_from(sorted(header))), draw(st.sampled_from(sorted(header)))
        begin, end = header[name]["data_offsets"]
        lies = [
            [end, begin],
            [begin, end + 2**40],
            [2**63, 2**64 - 1],
            header[other_name]["data_offsets"],
            [-1, end],
        ]
        header[name]["data_offsets"] = draw(st.sampled_from(lies))
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text)] * 12 + [0, len(text) - 1, 2**40, 2**64 - 1]))
    number = draw(st.sampled_from([0.5, 0.0, -1.0, -1.0, float("nan")]))
    return struct.pack("<Q", length) + text + (struct.pack("<f", number) * (at // 4 + 1))[:at]


@pytest.mark.parametrize("kind", ["imle", "gmm", "gaussian"])
def test_tensors_whose_headers_lie(kind, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "mapping" / kind / "mapping.safetensors"
    names = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
    real = {name: (names[t.dtype], tuple(t.shape)) for name, t in load_file(file).items()}

    @few
    @given(tensor_files(real))
    def lied(content):
        file.write_bytes(content)
        try:
            found = load_mapping(RunDir.open(tmp_path / "run"), kind).sample(2, torch.Generator())
        except VglannError:
            return
        assert (found.shape, found.dtype) == ((2, 8), torch.float32)

    lied()


# ---- options


def changed_options(given):
    """Options in JSON, up to three of them others: of the right type, or not."""
    kinds = {
        bool: st.booleans(),
        int: numbers,
        float: st.floats() | numbers,
        str: st.sampled_from(["train", "seed", "vgg16", "laplacian:0.1,l1", "dense", "lazy", "per-epoch"]),
    }
    values = {name: kinds[type(value)] | junk for name, value in given.items()}
    some = st.lists(st.sampled_from(sorted(values)), max_size=3, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries({n: values[n] for n in names})).map(
        lambda new: {**given, **new}
    )


def test_options_of_a_training_that_lie(clips, run):
    opened, there = RunDir.open(run), ClipSet.open(clips)

    @settings(few, max_examples=15)
    @given(changed_options(options_to_json(tiny_options())))
    def lied(train):
        lying = RunDir(run, {**opened.options, "train": train})
        with suppress(VglannError):
            assert load_trained(lying).latents.shape == (2, 8)
        with suppress(VglannError):
            new_training(there, options_from_json(TrainOptions, train), lying)

    lied()


def test_options_of_a_mapping_that_lie(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "mapping" / "imle" / "mapping.json"
    whole = json.loads(file.read_text())

    @few
    @given(changed_options(whole["options"]), st.just(8) | junk)
    def lied(options, latent_dim):
        file.write_text(json.dumps({**whole, "options": options, "latent_dim": latent_dim}))
        with suppress(VglannError):
            found = load_mapping(RunDir.open(tmp_path / "run"), "imle")
            assert found.sample(2, torch.Generator()).shape == (2, 8)

    lied()
