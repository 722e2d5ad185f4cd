"""`clips pack --shard` and `clips merge`: together they write what one pack writes, byte for byte."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")

from decoding import pictures
from video_files import write_video

from vglann_fast.cli.main import main
from vglann_fast.clips import writer as writer_module
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.merge import merge
from vglann_fast.clips.pack import pack
from vglann_fast.errors import VglannError

OPTIONS = {"frames": 4, "size": 32, "workers": 1, "test_fraction": 0.4}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven files: three of motion, one of them again, a still one, a text, and one of motion."""
    folder = tmp_path_factory.mktemp("videos")
    for number in (0, 1, 2, 6):
        write_video(folder / f"{number}.mkv", pictures(9 + 4 * number))
    shutil.copy(folder / "0.mkv", folder / "3.mkv")
    write_video(folder / "4.mkv", pictures(1) * 12)
    (folder / "5.mkv").write_text("no video")
    return folder


@pytest.fixture
def lenient(monkeypatch):
    """One of seven files may be rejected, and files of clips are short."""
    monkeypatch.setattr(writer_module, "MAX_REJECTED_SHARE", 0.2)
    monkeypatch.setattr(writer_module, "_SHARD_CLIPS", 4)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def packed_shards(videos, folder, count, **options):
    shards = [folder / f"shard-{number}" for number in range(1, count + 1)]
    for number, shard in enumerate(shards, 1):
        pack(videos, shard, **OPTIONS | options, shard=(number, count))
    return shards


def refused(folders, out, match, **options):
    """Merging is refused for that reason and leaves nothing."""
    with pytest.raises(VglannError, match=match) as caught:
        merge(folders, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".tmp-*"))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_all_shards_merged_in_any_order_are_one_pack(videos, tmp_path, lenient, count):
    """Nine shards of seven videos: some have no video, some no clip, and a file stands in two."""
    whole = pack(videos, tmp_path / "whole", **OPTIONS)
    assert (whole.rejected, whole.static > 0, whole.repeated) == (1, True, 2)
    shards = packed_shards(videos, tmp_path, count)
    assert sum(len(json.loads((s / "index.json").read_text())["sources"]) for s in shards) == 7
    np.random.default_rng(count).shuffle(shards)
    merged = merge(shards, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    assert (merged.train, merged.test, merged.static) == (whole.train, whole.test, whole.static)
    assert len(list((tmp_path / "merged").glob("*.npy"))) > 2
    assert pack(videos, tmp_path / "merged", **OPTIONS).reused


def test_packs_of_different_videos_merge_to_a_pack_of_both(videos, tmp_path):
    names = ("2.mkv", "1.mkv", "6.mkv")
    for name in names:
        pack(videos / name, tmp_path / name, **OPTIONS, tiles=2)
    pack([videos / name for name in names], tmp_path / "whole", **OPTIONS, tiles=2)
    folders = [tmp_path / name for name in names]
    merge(folders, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    assert merge(folders, tmp_path / "merged").reused
    with pytest.raises(VglannError, match=r"other sources.*--overwrite"):
        merge(folders[:2], tmp_path / "merged")
    assert merge(folders[:2], tmp_path / "merged", overwrite=True).sources == 2


def test_too_many_rejected_files_are_an_error_of_the_whole_not_of_a_shard(videos, tmp_path):
    shards = packed_shards(videos, tmp_path, 7)
    assert json.loads((shards[5] / "rejected.jsonl").read_text())["source"] == "5.mkv"
    refused(shards, tmp_path / "merged", r"1 of 7 videos cannot be used.*'5\.mkv' cannot be read")


def test_no_clip_at_all_is_an_error_of_the_whole_not_of_a_shard(videos, tmp_path):
    shards = packed_shards([videos / "4.mkv", videos / "4.mkv"], tmp_path, 2)
    assert len(ClipSet.open(shards[0])) == 0
    with pytest.raises(VglannError, match="no train clips"):
        ClipSet.open(shards[0], "train")
    refused(shards, tmp_path / "merged", "static")


def test_shards_that_are_not_one_whole_pack_are_refused_by_name(videos, tmp_path):
    good = [videos / "0.mkv", videos / "1.mkv", videos / "2.mkv"]
    one, two, three = packed_shards(good, tmp_path, 3)
    out = tmp_path / "merged"
    refused([one, three], out, r"--shard 2/3 is missing")
    shutil.copytree(two, tmp_path / "copy")
    refused([one, two, tmp_path / "copy", three], out, r"copy: is --shard 2/3, as .*shard-2 is")
    pack(good[:2], tmp_path / "other", **OPTIONS, shard=(3, 3))
    refused([one, two, tmp_path / "other"], out, r"other: is --shard 3/3 of other videos than .*shard-1")
    pack(good, tmp_path / "of two", **OPTIONS, shard=(2, 2))
    refused([one, tmp_path / "of two"], out, r"of two: is --shard 2/2 of other videos")
    pack(videos / "6.mkv", tmp_path / "plain", **OPTIONS)
    refused([tmp_path / "plain", one, two, three], out, r"plain: is not a --shard")


def test_folders_that_do_not_fit_together_are_refused_by_name(videos, tmp_path):
    for name, files, more in (
        ("a", ("0.mkv", "1.mkv"), {}),
        ("b", ("2.mkv", "3.mkv"), {}),
        ("c", ("6.mkv",), {"stride": 2, "seed": 1}),
    ):
        pack([videos / file for file in files], tmp_path / name, **OPTIONS | more)
    a, b, c = (tmp_path / name for name in "abc")
    out = tmp_path / "merged"
    refused([a, b], out, r"b: has the clip [0-9a-f]{16} of '3\.mkv', as .*a has")
    refused([a, c], out, r"c: was packed with other options than .*a \(seed, stride\)")
    refused([a, a], out, r"a: is given twice")
    refused([], out, "no clip folders")
    refused([a, tmp_path / "nowhere"], out, "nowhere: no clip folder")
    with pytest.raises(VglannError, match=r"one of the folders to merge; choose another --out"):
        merge([a, c], a, overwrite=True)
    shard = c / "clips-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    refused([c], out, r"clips-00000\.npy: damaged")


def test_a_shard_is_reused_and_never_taken_for_another(videos, tmp_path):
    good = [videos / "0.mkv", videos / "0.mkv"]
    pack(good, tmp_path / "shard", **OPTIONS, shard=(1, 2))
    assert pack(good, tmp_path / "shard", **OPTIONS, shard=(1, 2)).reused
    for other in ((2, 2), None):
        with pytest.raises(VglannError, match="another --shard"):
            pack(good[1:] if other is None else good, tmp_path / "shard", **OPTIONS, shard=other)


@pytest.mark.parametrize(
    "part", [5, {}, {"number": 0, "of": 1, "sources": ""}, {"number": True, "of": 1, "sources": ""}]
)
def test_an_impossible_place_in_a_pack_is_a_damaged_index(videos, tmp_path, part):
    pack(videos / "0.mkv", tmp_path / "shard", **OPTIONS, shard=(1, 1))
    file = tmp_path / "shard" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"part": part}))
    refused([tmp_path / "shard"], tmp_path / "merged", r"index\.json: damaged")


@pytest.mark.parametrize(
    "lines", ["", "[]\n", "{\n", '{"source": 1}\n', '{"source": "a"}\n{"source": "b"}\n']
)
def test_a_damaged_list_of_rejected_files_is_one_line(videos, tmp_path, lines):
    pack(videos / "5.mkv", tmp_path / "shard", **OPTIONS, shard=(1, 1))
    (tmp_path / "shard" / "rejected.jsonl").write_text(lines)
    refused([tmp_path / "shard"], tmp_path / "merged", r"rejected\.jsonl: damaged")


def test_the_commands_shard_and_merge(videos, tmp_path, capsys):
    words = [str(videos / "1.mkv"), str(videos / "2.mkv"), "--frames", "4", "--size", "32"]
    for number in (1, 2):
        out = str(tmp_path / str(number))
        assert main(["clips", "pack", *words, "--out", out, "--shard", f"{number}/2"]) == 0
    assert main(["clips", "pack", *words, "--out", str(tmp_path / "whole")]) == 0
    merged = str(tmp_path / "merged")
    assert main(["clips", "merge", str(tmp_path / "2"), str(tmp_path / "1"), "--out", merged]) == 0
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    for bad in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        capsys.readouterr()
        assert main(["clips", "pack", *words, "--out", str(tmp_path / "bad"), f"--shard={bad}"]) == 2
        assert "--shard" in capsys.readouterr().err
    for bad in ((0, 2), (3, 2), (1.0, 2), (1, "2"), (1,), (1, 2, 3), 3, "1/2", True):
        with pytest.raises(VglannError, match="shard"):
            pack(videos, tmp_path / "bad", **OPTIONS, shard=bad)
    assert not (tmp_path / "bad").exists()
