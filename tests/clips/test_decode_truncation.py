"""A file that was cut off is said to be, with and without sound; a whole one is not, whatever its times are."""

import fractions
import io

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("cv2")

from decoding import cut_off, decode, frames_or_reason, pictures  # noqa: E402

from vglann_fast.clips.truncation import truncation  # noqa: E402

COUNT = 40
# Extension -> video codec, sound codec, options of the container, its name where the extension does not tell.
CONTAINERS = {
    "mp4": ("libx264", "aac", {"movflags": "faststart"}, None),
    "mov": ("libx264", "aac", {"movflags": "faststart"}, None),
    "fragmented.mp4": ("libx264", "aac", {"movflags": "frag_keyframe+empty_moov"}, "mp4"),
    "3gp": ("h263", "aac", {"movflags": "faststart"}, None),
    "mkv": ("libx264", "aac", {}, None),
    "live.mkv": ("libx264", "aac", {"live": "1"}, "matroska"),
    "webm": ("libvpx", "libopus", {}, None),
    "avi": ("mpeg4", "mp2", {}, None),
    "flv": ("libx264", "aac", {}, None),
    "ts": ("libx264", "aac", {}, None),
    "m2ts": ("libx264", "aac", {"mpegts_m2ts_mode": "1"}, "mpegts"),
    "mpg": ("mpeg1video", "mp2", {}, None),
    "wmv": ("wmv2", None, {}, "asf"),
    "gif": ("gif", None, {}, None),
    "y4m": ("wrapped_avframe", None, {}, "yuv4mpegpipe"),
}


def write(path, codec, sound=None, options=None, container_format=None):
    height, width = (144, 176) if codec == "h263" else (96, 128)
    rate = 48_000 if sound == "libopus" else 44_100
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", format=container_format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        voice = container.add_stream(sound, rate=rate, layout="mono") if sound else None
        for number, image in enumerate(pictures(COUNT, height, width)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            if voice is not None:
                samples = noise.integers(-9000, 9000, (1, rate // 25), np.int16)
                frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
                frame.rate, frame.pts = rate, number * (rate // 25)
                container.mux(voice.encode(frame))
        for one in filter(None, (stream, voice)):
            container.mux(one.encode(None))
    return path


def cases():
    for extension, (_, sound, _, _) in CONTAINERS.items():
        yield extension, False
        if sound:
            yield extension, True


@pytest.mark.parametrize(("extension", "has_sound"), list(cases()))
def test_cut_off_files_are_rejected_with_and_without_sound(tmp_path, extension, has_sound):
    codec, sound, options, container_format = CONTAINERS[extension]
    file = tmp_path / f"a.{extension}"
    write(file, codec, sound if has_sound else None, options, container_format)
    # No share ends between two packets of MPEG or two tags of FLV, where nothing tells.
    parts = [cut_off(file, share) for share in (0.31, 0.61, 0.87, 0.98)]
    whole, *cut = map(frames_or_reason, decode(tmp_path / "scratch", file, *parts))
    assert whole == COUNT
    for reason in cut:
        assert isinstance(reason, str)
        assert any(word in reason for word in ("cut off", "damaged", "cannot be", "no frames"))


@pytest.mark.parametrize("extension", ["mkv", "webm", "avi"])
def test_holes_of_downloads_are_rejected(tmp_path, extension):
    codec, sound, options, container_format = CONTAINERS[extension]
    file = write(tmp_path / f"a.{extension}", codec, sound, options, container_format)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 6 // 10] + bytes(len(data) - len(data) * 6 // 10))
    (result,) = decode(tmp_path / "scratch", file)
    assert isinstance(frames_or_reason(result), str)


@pytest.mark.parametrize("extension", ["mkv", "webm", "mp4", "mov", "flv"])
def test_a_last_frame_that_is_held_is_no_cut(tmp_path, extension):
    codec = {"webm": "libvpx", "flv": "flv"}.get(extension, "mpeg4")
    milliseconds = fractions.Fraction(1, 1000)
    with av.open(str(tmp_path / f"held.{extension}"), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.time_base = stream.codec_context.time_base = milliseconds
        packets = []
        for number, image in enumerate(pictures(20)):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = 40 * number, milliseconds
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet, after in zip(packets, [*packets[1:], None], strict=True):
            packet.duration = after.pts - packet.pts if after else 30_000
        for packet in packets:
            container.mux(packet)
    (result,) = decode(tmp_path / "scratch", tmp_path / f"held.{extension}")
    assert frames_or_reason(result) == 20


@pytest.mark.parametrize(
    ("name", "codec", "start", "expected"),
    [
        ("late.mkv", "libx264", 100_000, 20),
        ("late.mp4", "libx264", 100_000, 20),
        ("late.ts", "libx264", 100_000, 20),
        ("late.flv", "libx264", 100_000, 20),
        ("early.mkv", "libx264", -30, 20),
        ("early.ts", "libx264", -30, 20),
        ("edit list.mp4", "libx264", -5, 15),  # which begins at 0
    ],
)
def test_times_far_from_zero_are_no_cut(tmp_path, name, codec, start, expected):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number, image in enumerate(pictures(20)):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = number + start, fractions.Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (result,) = decode(tmp_path / "scratch", tmp_path / name)
    assert frames_or_reason(result) == expected


def test_what_comes_behind_a_whole_file_is_not_held_against_it(tmp_path):
    for extension in ("mkv", "mp4", "avi", "gif"):
        codec, sound, options, container_format = CONTAINERS[extension]
        file = write(tmp_path / f"a.{extension}", codec, sound, options, container_format)
        for tail in (bytes(5000), b"appended by someone" * 50):
            more = tmp_path / f"more.{extension}"
            more.write_bytes(file.read_bytes() + tail)
            (result,) = decode(tmp_path / "scratch", more)
            assert frames_or_reason(result) == COUNT, (extension, tail[:8])


def test_a_photo_with_a_thumbnail_is_cut_off_though_the_thumbnail_is_whole():
    thumbnail = b"\xff\xd8 small \xff\xd9"
    head = b"\xff\xd8\xff\xe1" + (2 + len(thumbnail)).to_bytes(2, "big") + thumbnail
    scan = b"\xff\xda\x00\x02 picture"
    assert "cut off" in truncation(io.BytesIO(head + scan), "jpeg_pipe")
    assert truncation(io.BytesIO(head + scan + b"\xff\xd9"), "jpeg_pipe") == ""
    assert truncation(io.BytesIO(head + scan + b"\xff\xd9 a film behind it"), "jpeg_pipe") == ""


def test_frames_that_were_dropped_in_an_avi_do_not_end_it(tmp_path):
    """A chunk of no bytes stands for a frame that is shown once more."""
    file = write(tmp_path / "a.avi", "mpeg4")
    data = file.read_bytes()
    index = data.index(b"idx1")
    entries = [data[at : at + 16] for at in range(index + 8, len(data) - 15, 16)][:COUNT]
    movie = data.index(b"movi")
    fifth = movie + int.from_bytes(entries[5][8:12], "little")
    grown = bytearray(data[:fifth] + b"00dc" + bytes(4) + data[fifth:])
    for at in (4, movie - 4):  # the sizes of the file and of the list of frames
        grown[at : at + 4] = (int.from_bytes(grown[at : at + 4], "little") + 8).to_bytes(4, "little")
    grown[index + 8 : index + 12] = b"JUNK"  # in place of the index, which no longer fits
    file.write_bytes(grown)
    (result,) = decode(tmp_path / "scratch", file)
    assert frames_or_reason(result) == COUNT


def test_ogg_pages_and_odd_heads_are_walked_to_the_end():
    page = b"OggS" + bytes(22) + bytes([2, 255, 10]) + bytes(265)
    assert truncation(io.BytesIO(page * 3), "ogg") == ""
    assert "cut off" in truncation(io.BytesIO((page * 3)[:-1]), "ogg")
    assert "cut off" in truncation(io.BytesIO(page + page[:12]), "ogg")
    large = (1).to_bytes(4, "big") + b"mdat" + (100).to_bytes(8, "big")
    assert truncation(io.BytesIO(large + bytes(84)), "mov,mp4,m4a,3gp,3g2,mj2") == ""
    assert "cut off" in truncation(io.BytesIO(large + bytes(83)), "mov,mp4,m4a,3gp,3g2,mj2")
    assert truncation(io.BytesIO(b"anything"), "a container of another kind") == ""
