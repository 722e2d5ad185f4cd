"""Names are names: no pattern, no protocol, no list of other files; lists of strips in any encoding and locale."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

from decoding import decode, frames_or_reason, pictures  # noqa: E402
from video_files import write_video  # noqa: E402

from vglann_fast.clips.decode import DecodeJob  # noqa: E402
from vglann_fast.clips.pack import pack  # noqa: E402
from vglann_fast.clips.sources import find_sources  # noqa: E402
from vglann_fast.errors import VglannError  # noqa: E402

NAMES = [
    "-x.mkv",
    "concat:a|b.mkv",
    "file:x.mkv",
    "http:||x.mkv",
    "pipe:0",
    "data:x",
    "subfile,,start,0,end,9,,:x.mkv",
    "new\nline.mkv",
    "space .mkv ",
    "what?#*[a]{b}.mkv",
    "%04d.mkv",
    "%d.png",
    "x.m3u8",
    "x.sdp",
    "x.jpg",
    "a\\b'\".mkv",
    os.fsdecode(b"caf\xe9.mkv"),
]


def test_any_name_is_the_file_itself(tmp_path):
    good = write_video(tmp_path / "good.mkv", pictures(3))
    files = [shutil.copy(good, tmp_path / name) for name in NAMES]
    results = decode(tmp_path / "scratch", *map(DecodeJob, files))
    assert dict(zip(NAMES, map(frames_or_reason, results), strict=True)) == dict.fromkeys(NAMES, 3)


def frames(folder, names, level):
    folder.mkdir()
    for number, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((64, 64, 3), level + number, np.uint8))
    return DecodeJob(folder, tuple(names))


@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "tif", "webp", "ppm"])
def test_patterns_in_names_of_frames_and_folders_mean_nothing(tmp_path, extension):
    names = [f"f{number}.{extension}" for number in range(3)]
    wanted = frames(tmp_path / "take_%04d", names, 50)
    frames(tmp_path / "take_0001", names, 200)
    mixed = frames(tmp_path / "mixed", [f"g%d.{extension}", f"g%02d.{extension}"], 90)
    for name in ("g0", "g1", "g00", "g01"):
        cv2.imwrite(str(tmp_path / "mixed" / f"{name}.{extension}"), np.full((64, 64, 3), 200, np.uint8))
    folder, files = decode(tmp_path / "scratch", wanted, mixed)
    np.testing.assert_allclose(folder.tiles.mean(axis=(1, 2, 3, 4)), [50, 51, 52], atol=2)
    np.testing.assert_allclose(files.tiles.mean(axis=(1, 2, 3, 4)), [90, 91], atol=2)


def test_a_list_of_other_files_is_no_video(tmp_path):
    write_video(tmp_path / "a.mkv", pictures(3))
    write_video(tmp_path / "a.ts", pictures(3), "libx264", "yuv420p")
    lists = {
        "concat.mp4": "ffconcat version 1.0\nfile a.mkv\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    for result in decode(tmp_path / "scratch", *(tmp_path / name for name in lists)):
        assert "cannot be read" in frames_or_reason(result)


STRIPS = ["plain.jpg", "gîte 東.jpg", os.fsdecode(b"caf\xe9.jpg"), " spaces .jpg ", "\u2028line\x85.jpg"]


@pytest.fixture
def strips(tmp_path):
    """Strips of those names, and a function that writes a list of them and returns what is found."""
    for number, name in enumerate(STRIPS):
        data = cv2.imencode(".jpg", np.full((128 * 5, 128, 3), 40 * number, np.uint8))[1]
        (tmp_path / name).write_bytes(data.tobytes())

    def listed(data: bytes):
        (tmp_path / "list.txt").write_bytes(data)
        return [source.path.name for source in find_sources(tmp_path / "list.txt")]

    return listed


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lists_of_strips_hold_any_name(strips, mark, end):
    names = [os.fsencode(name) for name in STRIPS]
    assert strips(mark + end.join(names)) == STRIPS
    assert strips(mark + end + end.join(names) + end + b"  " + end) == STRIPS
    assert strips(mark + b"\t plain.jpg  " + end) == ["plain.jpg"]


def test_a_list_in_utf16_is_refused_with_the_remedy(strips):
    for encoding in ("utf-16-le", "utf-16-be"):
        with pytest.raises(VglannError, match=r"list\.txt.*UTF-16.*UTF-8"):
            strips(("\ufeff" + STRIPS[0]).encode(encoding))


def test_names_are_the_same_in_every_locale(strips, tmp_path):
    strips("\n".join(STRIPS[:2]).encode())
    write_video(tmp_path / "gîte.mkv", pictures(12))
    content = {"file": "gîte.mkv", "first_frame": 4, "last_frame": 11}
    sources = {"format": "vglann-sources", "version": 1, "sources": [content]}
    (tmp_path / "sources.json").write_text(json.dumps(sources, ensure_ascii=False), encoding="utf-8")
    given = [tmp_path / "list.txt", tmp_path / "gîte.mkv"]
    pack(given, tmp_path / "here", frames=4, size=32, workers=1, min_motion=0)
    code = (
        "import sys; from vglann_fast.clips.pack import pack\n"
        "pack(sys.argv[1:3], sys.argv[3], frames=4, size=32, workers=1, min_motion=0)"
    )
    command = [sys.executable, "-c", code, *map(str, given), str(tmp_path / "there")]
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, env={**os.environ, **ascii_only}, check=True, timeout=120)
    here, there = ((tmp_path / name / "index.json").read_bytes() for name in ("here", "there"))
    assert json.loads(here)["sources"][2]["frames"] == 8
    assert here == there
