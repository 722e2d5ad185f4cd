"""pack.py: what becomes a clip, ids and splits, and that nothing half-made is left behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

from vglann_fast.clips import writer as writer_module  # noqa: E402
from vglann_fast.clips.cut import clip_id, shot_split  # noqa: E402
from vglann_fast.clips.dataset import ClipSet  # noqa: E402
from vglann_fast.clips.decode import DecodeLimits  # noqa: E402
from vglann_fast.clips.pack import pack  # noqa: E402
from vglann_fast.clips.sheet import show  # noqa: E402
from vglann_fast.errors import VglannError  # noqa: E402

SIDE = 96


def scene(seed: int, frames: int, width: int = SIDE, motion: int = 3) -> np.ndarray:
    """A soft colored picture panned by `motion` pixels a frame: uint8 (frames, SIDE, width, 3)."""
    random = np.random.default_rng(seed)
    base = random.integers(20, 235, 3)
    patches = (random.integers(-50, 50, (8, 60, 3)) + base).clip(0, 255).astype(np.uint8)
    picture = cv2.resize(patches, (width + 600, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.stack([picture[:, motion * i : motion * i + width] for i in range(frames)])


def write_video(path: Path, *scenes: np.ndarray) -> Path:
    """Lossless video of the scenes, so that clips can be compared with what was written."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width = scenes[0].shape[1:3]
        stream.pix_fmt = "bgr0"
        for image in np.concatenate(scenes):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """a.mkv: shots of 20, 5 and 41 frames. b.mkv: one of 30, wider, and 20 still frames."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mkv", scene(0, 20), scene(1, 5), scene(2, 41))
    write_video(folder / "b.mkv", scene(3, 30, width=160), scene(4, 20, width=160, motion=0))
    return folder


def read_rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_clips_are_what_the_video_shows(videos, tmp_path):
    report = pack([videos], tmp_path / "clips", frames=8, size=64)
    clips = ClipSet.open(tmp_path / "clips")
    got = [(clips.sources[c["source"]]["name"], c["shot"], c["first_frame"]) for c in clips.clips]
    starts = [(0, 0), (0, 8), (2, 25), (2, 33), (2, 41), (2, 49), (2, 57)]
    assert got == [("a.mkv", *at) for at in starts] + [("b.mkv", 0, first) for first in (0, 8, 16)]
    assert (report.clips, report.sources, report.shots, report.static) == (10, 2, 5, 2)
    assert (report.train + report.test, report.rejected, report.repeated) == (10, 0, 0)
    source = np.concatenate([scene(0, 20), scene(1, 5), scene(2, 41)])
    for row, (_, first) in enumerate(starts):
        frames = [cv2.resize(f, (64, 64), interpolation=cv2.INTER_AREA) for f in source[first : first + 8]]
        np.testing.assert_array_equal(clips.read([row])[0], np.stack(frames).transpose(3, 0, 1, 2))
    wide = [
        cv2.resize(f, (64, 64), interpolation=cv2.INTER_AREA)
        for f in scene(3, 30, width=160)[16:24, :, 32:128]
    ]
    np.testing.assert_array_equal(clips.read([-1])[0], np.stack(wide).transpose(3, 0, 1, 2))
    assert clips.clips[-1]["crop"] == [32, 0, 96, 96]
    for clip in clips.clips:
        sha256 = clips.sources[clip["source"]]["sha256"]
        assert clip["id"] == clip_id(sha256, clip["first_frame"], clip["crop"], 1, 8, 64)
        assert clip["split"] == shot_split(sha256, clip["shot"], 0, 0.1)


def test_stride_starts_and_tiles(videos, tmp_path):
    pack([videos / "b.mkv"], tmp_path / "clips", frames=4, size=32, stride=3, start_every=5, tiles=2)
    clips = ClipSet.open(tmp_path / "clips")
    # 30 frames, clips that span 10: starts 0, 5 ... 20. 160 x 96 gives 2 rows x 3 columns of 48.
    assert [clip["first_frame"] for clip in clips.clips] == [
        first for first in range(0, 21, 5) for _ in range(6)
    ]
    boxes = [[x, y, 48, 48] for y in (0, 48) for x in (8, 56, 104)]
    assert [clip["crop"] for clip in clips.clips[:6]] == boxes
    source = scene(3, 30, width=160)
    for row in (4, 17):
        first, (x, y, width, height) = clips.clips[row]["first_frame"], clips.clips[row]["crop"]
        frames = source[first : first + 10 : 3, y : y + height, x : x + width]
        frames = [cv2.resize(np.ascontiguousarray(f), (32, 32), interpolation=cv2.INTER_AREA) for f in frames]
        np.testing.assert_array_equal(clips.read([row])[0], np.stack(frames).transpose(3, 0, 1, 2))
    assert len({clip["split"] for clip in clips.clips}) == 1  # all tiles and starts of a shot


def test_ids_and_splits_do_not_depend_on_names_or_other_sources(videos, tmp_path):
    pack(
        [videos / "a.mkv", videos / "b.mkv"],
        tmp_path / "one",
        frames=4,
        size=32,
        test_fraction=0.5,
        workers=2,
    )
    odd = tmp_path / "gîte\n'x' 東 .mp4"
    shutil.copy(videos / "b.mkv", odd)
    pack(odd, tmp_path / "two", frames=4, size=32, test_fraction=0.5, workers=1)
    one, two = ClipSet.open(tmp_path / "one"), ClipSet.open(tmp_path / "two")
    splits = {clip["id"]: clip["split"] for clip in one.clips}
    assert two.ids == one.ids[-len(two) :]
    assert all(splits[clip["id"]] == clip["split"] for clip in two.clips)
    assert two.sources[0]["name"] == odd.name
    assert str(tmp_path) not in (tmp_path / "two" / "index.json").read_text()
    pack(
        [videos / "a.mkv", videos / "b.mkv"],
        tmp_path / "again",
        frames=4,
        size=32,
        test_fraction=0.5,
        workers=1,
    )
    indexes = [(tmp_path / name / "index.json").read_bytes() for name in ("one", "again")]
    assert indexes[0] == indexes[1]


def test_split_share_and_seed():
    splits = [shot_split("ab", shot, 0, 0.1) for shot in range(4000)]
    assert 0.08 < splits.count("test") / 4000 < 0.12
    assert splits != [shot_split("ab", shot, 1, 0.1) for shot in range(4000)]
    assert {shot_split("ab", shot, 0, 0.0) for shot in range(100)} == {"train"}


def test_a_shot_is_never_in_both_splits(tmp_path):
    file = write_video(tmp_path / "a.mkv", *[scene(seed, 14) for seed in range(12)])
    report = pack([file], tmp_path / "clips", frames=4, size=32, start_every=2, test_fraction=0.4)
    assert min(report.train, report.test) > 0
    of = {}
    for split in ("train", "test"):
        for clip in ClipSet.open(tmp_path / "clips", split).clips:
            assert of.setdefault((clip["source"], clip["shot"]), split) == split
    assert len(of) == 12


def test_shards_are_filled_in_order(videos, tmp_path, monkeypatch):
    pack([videos], tmp_path / "one", frames=4, size=32)
    monkeypatch.setattr(writer_module, "_SHARD_CLIPS", 5)
    pack([videos], tmp_path / "many", frames=4, size=32)
    one, many = ClipSet.open(tmp_path / "one"), ClipSet.open(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.npy"))) == -(-len(one) // 5) > 3
    assert many.ids == one.ids
    np.testing.assert_array_equal(many.read(), one.read())
    np.testing.assert_array_equal(np.load(tmp_path / "one" / "clips-00000.npy"), one.read())  # NumPy reads it


def test_reuse_and_refusal(videos, tmp_path):
    out = tmp_path / "clips"
    first = pack([videos], out, frames=4, size=32)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    again = pack([videos], out, frames=4, size=32)
    assert again.reused
    assert not first.reused
    assert "reused" in str(again)
    assert (again.clips, again.train, again.static) == (first.clips, first.train, first.static)
    with pytest.raises(VglannError, match=r"other options .stride"):
        pack([videos], out, frames=4, size=32, stride=2)
    with pytest.raises(VglannError, match="other sources"):
        pack([videos / "a.mkv"], out, frames=4, size=32)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert pack([videos / "a.mkv"], out, frames=4, size=32, overwrite=True).sources == 1
    assert len(ClipSet.open(out).sources) == 1


def test_other_things_are_never_replaced(videos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("photos", "file"):
        for overwrite in (False, True):
            with pytest.raises(VglannError, match=rf"{name}: .*choose another"):
                pack([videos], tmp_path / name, frames=4, size=32, overwrite=overwrite)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert pack([videos], tmp_path / "empty", frames=4, size=32).clips


def test_few_bad_files_are_listed_many_are_an_error(tmp_path):
    good = write_video(tmp_path / "0.mkv", scene(0, 12))
    for number in range(1, 20):
        shutil.copy(good, tmp_path / f"{number}.mkv")
    (tmp_path / "bad\n.mp4").write_text("no video")
    with pytest.raises(VglannError, match=r"1 of 3 videos .*'bad.*\.mp4' cannot be read") as caught:
        pack([good, tmp_path / "1.mkv", tmp_path / "bad\n.mp4"], tmp_path / "none", frames=4, size=32)
    assert "\n" not in str(caught.value)
    report = pack([tmp_path], tmp_path / "clips", frames=4, size=32)  # 1 of 21
    assert (report.rejected, report.sources, report.clips, report.repeated) == (1, 21, 3, 57)
    (line,) = read_rejected(tmp_path / "clips")
    assert line["source"] == "bad\n.mp4"
    assert "cannot be read" in line["reason"]
    assert pack([tmp_path], tmp_path / "clips", frames=4, size=32).reused  # though one source is bad
    assert not (tmp_path / "none").exists()


def test_no_clip_is_an_error(videos, tmp_path):
    with pytest.raises(VglannError, match="no shot has 200 frames"):
        pack([videos], tmp_path / "clips", frames=200)
    with pytest.raises(VglannError, match="static"):
        pack([videos], tmp_path / "clips", frames=8, min_motion=200)
    assert list(tmp_path.iterdir()) == []


BAD_OPTIONS = [
    {"frames": 1},
    {"frames": 2.5},
    {"size": 48},
    {"stride": 0},
    {"start_every": 0},
    {"tiles": 0},
    {"tiles": True},
    {"min_motion": -1},
    {"min_motion": float("nan")},
    {"test_fraction": 1},
    {"test_fraction": float("nan")},
    {"seed": -1},
    {"workers": 0},
]


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=str)
def test_bad_options(videos, tmp_path, bad):
    with pytest.raises(VglannError, match=next(iter(bad))):
        pack([videos], tmp_path / "clips", **bad)
    assert list(tmp_path.iterdir()) == []


def test_sources(videos, tmp_path):
    """Subfolders, folders of frames, a loop of links, hidden files; and what is not there."""
    deep = tmp_path / "deep" / "er"
    frames = tmp_path / "deep" / "frames"
    deep.mkdir(parents=True)
    frames.mkdir()
    shutil.copy(videos / "b.mkv", deep / "B.MKV")
    (deep / ".hidden.mkv").write_text("")
    (deep / "notes.txt").write_text("")
    (deep / "loop").symlink_to(tmp_path / "deep")
    (deep / "self").symlink_to("self")
    for number, image in enumerate(scene(9, 12)):
        cv2.imwrite(str(frames / f"{number}.png"), image[..., ::-1])
    pack([tmp_path / "deep"], tmp_path / "clips", frames=4, size=32)
    clips = ClipSet.open(tmp_path / "clips")
    assert [(source["name"], source["frames"]) for source in clips.sources] == [("B.MKV", 50), ("frames", 12)]
    last = [cv2.resize(f, (32, 32), interpolation=cv2.INTER_AREA) for f in scene(9, 12)[8:]]
    np.testing.assert_array_equal(clips.read([-1])[0], np.stack(last).transpose(3, 0, 1, 2))
    (tmp_path / "nothing").mkdir()
    for path, message in (("nothing", "no videos in this folder"), ("missing", "no such file")):
        with pytest.raises(VglannError, match=message):
            pack([tmp_path / path], tmp_path / "out")
    with pytest.raises(VglannError, match="no video files"):
        pack([], tmp_path / "out")


def test_windows_of_sources_json(videos, tmp_path):
    shutil.copy(videos / "a.mkv", tmp_path / "a.mkv")
    entry = {"file": "a.mkv", "first_frame": 30, "last_frame": 49, "credit": "someone"}
    content = {"format": "vglann-sources", "version": 1, "sources": [entry]}
    (tmp_path / "sources.json").write_text(json.dumps(content))
    pack([tmp_path], tmp_path / "clips", frames=8, size=32)
    clips = ClipSet.open(tmp_path / "clips")
    assert [clip["first_frame"] for clip in clips.clips] == [30, 38]
    assert clips.sources[0]["frames"] == 20
    assert clips.sources[0]["credit"] == "someone"
    for change in (
        {"first_frame": -1},
        {"first_frame": 50},
        {"last_frame": "9"},
        {"file": 5.5, "first_frame": 1.5},
    ):
        (tmp_path / "sources.json").write_text(json.dumps({**content, "sources": [{**entry, **change}]}))
        with pytest.raises(VglannError, match=r"sources\.json"):
            pack([tmp_path], tmp_path / "out", frames=8, size=32)
    (tmp_path / "sources.json").write_text("{")
    with pytest.raises(VglannError, match=r"sources\.json"):
        pack([tmp_path / "a.mkv"], tmp_path / "out", frames=8, size=32)


def test_truncated_by_max_frames(videos, tmp_path):
    pack([videos / "a.mkv"], tmp_path / "clips", frames=8, size=32, limits=DecodeLimits(max_frames=18))
    clips = ClipSet.open(tmp_path / "clips")
    assert (len(clips), clips.sources[0]["frames"], clips.sources[0]["truncated"]) == (2, 18, True)


def test_full_disk_leaves_nothing(videos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module._Shards, "write", full)
    with pytest.raises(VglannError, match="disk is full"):
        pack([videos], tmp_path / "clips", frames=4, size=32)
    assert list(tmp_path.iterdir()) == []


def children_of(pid: int) -> list[int]:
    children = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{pid}\n" in status.read_text():
                children.append(int(status.parent.name))
        except OSError:
            pass  # it has ended
    return children


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_killed_leaves_no_clip_folder_and_no_process(videos, tmp_path):
    code = (
        "import sys, time; from vglann_fast.clips import pack, writer as module\n"
        "slow = module._Shards.write\n"
        "module._Shards.write = lambda *args: (slow(*args), print('clip', flush=True), time.sleep(60))\n"
        "pack.pack([sys.argv[1]], sys.argv[2], frames=4, size=32, workers=1)\n"
    )
    command = [sys.executable, "-c", code, str(videos), str(tmp_path / "clips")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "clip\n"
        children = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    assert children
    assert not (tmp_path / "clips").exists()
    assert all(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{child}/exe") for child in children):
        assert time.monotonic() < deadline, "a decoding process outlived its parent"
        time.sleep(0.05)
    assert pack([videos], tmp_path / "clips", frames=4, size=32).clips  # and the way is free
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_sheet_of_a_clip_folder(videos, tmp_path):
    pack([videos], tmp_path / "clips", frames=4, size=32)
    clips = ClipSet.open(tmp_path / "clips")
    shown = show(tmp_path / "clips", tmp_path / "sheet.png")
    assert len(shown) == len(set(shown)) == 16
    by_source = {
        source: [clips.ids[i] for i, c in enumerate(clips.clips) if c["source"] == source]
        for source in (0, 1)
    }
    assert sum(name in by_source[1] for name in shown) == min(8, len(by_source[1]))
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[..., ::-1]
    assert sheet.shape == (16 * 34 - 2, 4 * 34 - 2, 3)
    row = clips.ids.index(shown[3])
    np.testing.assert_array_equal(
        sheet[3 * 34 : 3 * 34 + 32, :32], clips.read([row])[0, :, 0].transpose(1, 2, 0)
    )
    with pytest.raises(VglannError, match=r"\.png"):
        show(tmp_path / "clips", tmp_path / "sheet.gif")


def test_a_folder_that_an_earlier_version_packed_is_reused(tmp_path):
    file = write_video(tmp_path / "film.mkv", scene(0, 20), scene(1, 20))
    first = pack([file], tmp_path / "clips", frames=4, size=32, min_motion=0.0, test_fraction=0.4)
    index = json.loads((tmp_path / "clips" / "index.json").read_text())
    index["options"]["test_share"] = index["options"].pop("test_fraction")
    (tmp_path / "clips" / "index.json").write_text(json.dumps(index))
    again = pack([file], tmp_path / "clips", frames=4, size=32, min_motion=0.0, test_fraction=0.4)
    assert again.reused
    assert again.clips == first.clips
