"""dataset.py: reads what pack.py writes, and says which file is wrong. NumPy only."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 32, 32), np.uint8)
SPLITS = ["train", "test", "train", "train", "test", "train", "train"]


def clip_folder(folder):
    """A clip folder of 7 clips in shards of 3, 3 and 1, written with NumPy's own writer."""
    folder.mkdir()
    shards = []
    for number, start in enumerate((0, 3, 6)):
        name = f"clips-{number:05d}.npy"
        with (folder / name).open("wb") as file:
            np.lib.format.write_array(file, PIXELS[start : start + 3], version=(1, 0))
        sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        shards.append({"file": name, "clips": len(PIXELS[start : start + 3]), "sha256": sha256})
    clips = [
        {
            "id": f"{row:016x}",
            "source": 0,
            "shot": row,
            "first_frame": 4 * row,
            "crop": [0, 0, 9, 9],
            "split": split,
        }
        for row, split in enumerate(SPLITS)
    ]
    index = {
        "format": "vglann-clips",
        "version": 1,
        "frames": 4,
        "size": 32,
        "stride": 1,
        "options": {},
        "sources": [{"name": "a.mp4", "sha256": "0" * 64}],
        "shards": shards,
        "counts": {"rejected": 0, "shots": 7, "static": 0, "repeated": 0},
        "clips": clips,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(tmp_path):
    return clip_folder(tmp_path / "clips")


def edit(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_reads_rows_across_shards(folder):
    clips = ClipSet.open(folder)
    assert (len(clips), clips.frames, clips.size) == (7, 4, 32)
    assert clips.ids == [f"{row:016x}" for row in range(7)]
    np.testing.assert_array_equal(clips.read(), PIXELS)
    for rows in ([5, 0, 5, 2], np.array([6]), [-1, 3], []):
        np.testing.assert_array_equal(clips.read(rows), PIXELS[np.array(rows, int)])
    np.testing.assert_array_equal(clips.read(slice(1, 6, 2)), PIXELS[1:6:2])
    with pytest.raises(IndexError):
        clips.read([7])


def test_read_is_a_copy(folder):
    clips = ClipSet.open(folder)
    clips.read([0])[:] = 0
    np.testing.assert_array_equal(clips.read([0]), PIXELS[:1])


@pytest.mark.parametrize("split", ["train", "test"])
def test_split(folder, split):
    rows = [row for row, of in enumerate(SPLITS) if of == split]
    clips = ClipSet.open(folder, split)
    assert clips.ids == [f"{row:016x}" for row in rows]
    assert [clip["shot"] for clip in clips.clips] == rows
    np.testing.assert_array_equal(clips.read(), PIXELS[rows])
    np.testing.assert_array_equal(clips.read([1, 0]), PIXELS[[rows[1], rows[0]]])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_processes_that_share_the_checksums_verify_each_shard_once(folder, size):
    for number in range(3):
        file = folder / f"clips-{number:05d}.npy"
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        refused = [rank for rank in range(size) if says_damaged(folder, (rank, size), file.name)]
        assert len(refused) == 1
        file.write_bytes(good)


def says_damaged(folder, share, name):
    try:
        ClipSet.open(folder, share=share)
    except VglannError as error:
        return name in str(error)
    return False


def test_split_errors(folder):
    with pytest.raises(VglannError, match="split must be"):
        ClipSet.open(folder, "dev")
    edit(folder, lambda index: [clip.update(split="train") for clip in index["clips"]])
    with pytest.raises(VglannError, match="no test clips"):
        ClipSet.open(folder, "test")


BAD_INDEX = {
    "format": lambda index: index.update(format="other"),
    "version": lambda index: index.update(version=2),
    "no clips": lambda index: index.pop("clips"),
    "clips of another type": lambda index: index.update(clips="abc"),
    "clip of another type": lambda index: index["clips"].__setitem__(0, 5),
    "no frames": lambda index: index.pop("frames"),
    "frames as text": lambda index: index.update(frames="4"),
    "huge size": lambda index: index.update(size=10**9),
    "negative size": lambda index: index.update(size=-32),
    "id": lambda index: index["clips"][0].update(id="../../etc/passwd"),
    "same id": lambda index: index["clips"][0].update(id=index["clips"][1]["id"]),
    "split": lambda index: index["clips"][0].update(split="other"),
    "source": lambda index: index["clips"][0].update(source=1),
    "a clip less": lambda index: index["clips"].pop(),
    "no clip": lambda index: index.update(clips=[], shards=[]),
    "shard upwards": lambda index: index["shards"][0].update(file="../clips-00000.npy"),
    "shard elsewhere": lambda index: index["shards"][0].update(file="/etc/clips-00000.npy"),
    "shard name with newline": lambda index: index["shards"][0].update(file="clips-00000.npy\n"),
    "shard of another type": lambda index: index["shards"][0].update(file=5),
    "shard without clips": lambda index: index["shards"][0].update(clips=0),
    "no sha256": lambda index: index["shards"][0].pop("sha256"),
    "no counts": lambda index: index.pop("counts"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_bad_index(folder, name):
    edit(folder, BAD_INDEX[name])
    with pytest.raises(VglannError, match=r"index\.json") as caught:
        ClipSet.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_index_that_is_no_json_object(folder, data):
    (folder / "index.json").write_bytes(data)
    with pytest.raises(VglannError, match=r"index\.json"):
        ClipSet.open(folder)


def test_no_clip_folder(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(VglannError, match="no clip folder"):
            ClipSet.open(path)


def _header(shape="(3, 3, 4, 32, 32)", descr="'|u1'", order="False", version=b"\x01\x00"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode()


BAD_HEADS = {
    "other shape": _header("(3, 4, 3, 32, 32)"),
    "more clips than the index": _header("(4, 3, 4, 32, 32)"),
    "huge shape": _header("(3, 3, 4, 32, 9999999999999)"),
    "float": _header(descr="'<f4'"),
    "object": _header(descr="'|O'"),
    "Fortran order": _header(order="True"),
    "version 2": _header(version=b"\x02\x00"),
    "code": _header(shape="__import__('os').getcwd()"),
    "no header": b"\x93NUMPY\x01\x00",
    "header without end": b"\x93NUMPY\x01\x00\xff\xff{",
    "text": b"not an array",
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_bad_shard_header_is_refused_without_sha256(folder, name):
    file = folder / "clips-00001.npy"
    file.write_bytes(BAD_HEADS[name] + PIXELS[3:6].tobytes() * bool(BAD_HEADS[name]))
    with pytest.raises(VglannError, match=r"clips-00001\.npy"):
        ClipSet.open(folder, verify=False)


def test_damaged_shards(folder):
    file = folder / "clips-00000.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(VglannError, match=r"clips-00000\.npy.*sha256"):
        ClipSet.open(folder)
    assert len(ClipSet.open(folder, verify=False)) == 7
    for bytes_ in (good[:-1], good + b"\0"):
        file.write_bytes(bytes_)
        with pytest.raises(VglannError, match=r"clips-00000\.npy.*bytes"):
            ClipSet.open(folder, verify=False)
    file.unlink()
    with pytest.raises(VglannError, match=r"clips-00000\.npy: missing"):
        ClipSet.open(folder)
    file.mkdir()
    with pytest.raises(VglannError, match=r"clips-00000\.npy"):
        ClipSet.open(folder)


def test_shard_may_not_link_out_of_the_folder(folder, tmp_path):
    (folder / "clips-00000.npy").rename(tmp_path / "clips-00000.npy")
    (folder / "clips-00000.npy").symlink_to(tmp_path / "clips-00000.npy")
    with pytest.raises(VglannError, match="leads out"):
        ClipSet.open(folder)


def test_needs_numpy_only():
    code = (
        "import sys; import vglann_fast.clips.dataset; "
        "print([m for m in ('torch', 'av', 'cv2', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
