"""Side data and metadata do not decide whether the pixels are read; orientation is applied, mirroring too."""

import fractions
import io

import numpy as np
import pytest

av = pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")

from decoding import decode, folder_of_frames, frames_or_reason, pictures  # noqa: E402
from video_files import BLUE, GRAY, GREEN, RED, quadrants, write_video  # noqa: E402

from vglann_fast.clips.decode import DecodeJob  # noqa: E402

MAKER, ORIENTATION = 0x010F, 0x0112
# EXIF orientation -> colors of the corners: top left, top right, bottom left, bottom right.
CORNERS = {
    1: (RED, GREEN, BLUE, GRAY),
    2: (GREEN, RED, GRAY, BLUE),
    3: (GRAY, BLUE, GREEN, RED),
    4: (BLUE, GRAY, RED, GREEN),
    5: (RED, BLUE, GREEN, GRAY),
    6: (BLUE, RED, GRAY, GREEN),
    7: (GRAY, GREEN, BLUE, RED),
    8: (GREEN, GRAY, RED, BLUE),
}


def exif(**tags):
    data = Image.Exif()
    data[MAKER] = "Maker"
    for name, value in tags.items():
        data[{"orientation": ORIENTATION}[name]] = value
    return data


def assert_corners(result, colors):
    tile = result.tiles[1, 0]
    for (row, column), color in zip([(8, 8), (8, 56), (56, 8), (56, 56)], colors, strict=True):
        assert np.abs(tile[row, column].astype(int) - color).max() < 12, (row, column)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_frames_with_exif_are_read_and_turned(tmp_path, extension):
    image = quadrants(96, 96)
    jobs = {}
    for orientation in (None, *CORNERS, 9, 65535):
        tags = {} if orientation is None else {"orientation": orientation}
        folder = tmp_path / str(orientation)
        jobs[orientation] = folder_of_frames(folder, [image] * 2, extension, exif=exif(**tags), quality=95)
    for orientation, result in zip(jobs, decode(tmp_path / "scratch", *jobs.values()), strict=True):
        assert frames_or_reason(result) == 2, orientation
        assert_corners(result, CORNERS.get(orientation, CORNERS[1]))


def test_tiff_of_every_kind_has_the_pixels_that_opencv_sees(tmp_path):
    colored = Image.fromarray(quadrants(96, 96))
    compressions = ("tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg")
    kinds = {name: (colored, {"compression": name}) for name in compressions}
    kinds |= {mode: (colored.convert(mode), {}) for mode in ("L", "P", "1", "CMYK", "YCbCr")}
    kinds |= {f"{mode} jpeg": (colored.convert(mode), {"compression": "jpeg"}) for mode in ("L", "CMYK")}
    kinds["group 4"] = (colored.convert("1"), {"compression": "group4"})
    kinds["16 bits"] = (Image.fromarray(quadrants(96, 96)[..., 0].astype(np.uint16) * 257), {})
    kinds["turned jpeg"] = (colored, {"compression": "jpeg", "exif": exif(orientation=6)})
    jobs = [
        folder_of_frames(tmp_path / name, [image] * 2, "tif", **options)
        for name, (image, options) in kinds.items()
    ]
    for name, job, result in zip(kinds, jobs, decode(tmp_path / "scratch", *jobs), strict=True):
        assert frames_or_reason(result) == 2, name
        expected = cv2.imread(str(job.path / "0.tif"), cv2.IMREAD_COLOR_RGB)
        expected = cv2.resize(expected, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(result.tiles[0, 0].astype(int) - expected).max() <= 3, name


def test_exif_inside_motion_jpeg_is_read_and_turned(tmp_path):
    with av.open(str(tmp_path / "camera.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuvj420p"
        for number in range(3):
            buffer = io.BytesIO()
            Image.fromarray(quadrants(96, 96)).save(buffer, "JPEG", exif=exif(orientation=6), quality=95)
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = fractions.Fraction(1, 25), True
            container.mux(packet)
    (result,) = decode(tmp_path / "scratch", tmp_path / "camera.avi")
    assert frames_or_reason(result) == 3
    assert_corners(result, CORNERS[6])


def test_broken_exif_and_color_profile_are_passed_over(tmp_path):
    broken = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(50))
    jobs = [
        folder_of_frames(tmp_path / "exif", [quadrants()] * 2, "jpg", exif=broken),
        folder_of_frames(tmp_path / "profile", [quadrants()] * 2, "jpg", icc_profile=b"nothing" * 99),
        folder_of_frames(tmp_path / "comment", [quadrants()] * 2, "jpg", comment=b"\xff\xfe caf\xe9"),
    ]
    assert [frames_or_reason(result) for result in decode(tmp_path / "scratch", *jobs)] == [2, 2, 2]


@pytest.mark.parametrize("extension", ["avi", "mkv", "mp4", "mov", "flv"])
def test_metadata_that_is_not_utf8_is_passed_over(tmp_path, extension):
    file = tmp_path / f"latin.{extension}"
    with av.open(str(file), "w", metadata_encoding="latin-1") as container:
        stream = container.add_stream("mpeg4" if extension == "avi" else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        container.metadata.update({"title": "caf\xe9 \xff", "comment": "\x80"})
        stream.metadata.update({"title": "t\xe9", "language": "\xe9x?", "handler_name": "\xe9"})
        for image in pictures(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    assert b"caf\xe9" in file.read_bytes()
    (result,) = decode(tmp_path / "scratch", file)
    assert frames_or_reason(result) == 5


@pytest.mark.parametrize("kind", ["cover.mp4", "poster.mp4", "poster.mov", "attachment.mkv"])
def test_cover_art_is_not_the_video(tmp_path, kind):
    with av.open(str(tmp_path / kind), "w") as container:

        def add(codec, side, pixel_format, disposition):
            stream = container.add_stream(codec, rate=25)
            stream.width = stream.height = side
            stream.pix_fmt, stream.disposition = pixel_format, disposition
            return stream

        images = {}
        if kind == "attachment.mkv":
            buffer = io.BytesIO()
            Image.fromarray(quadrants()).save(buffer, "JPEG")
            container.add_attachment("cover.jpg", "image/jpeg", buffer.getvalue())
        else:
            # Attached, or a track of one frame that is marked as the default.
            cover = add("mjpeg", 256, "yuvj420p", 1024 if kind == "cover.mp4" else 1)
            images[cover] = pictures(1, 256, 256)
        images[add("libx264", 96, "yuv420p", 0)] = pictures(4, 96, 96)
        for stream, shown in images.items():
            for image in shown:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode(None))
    (result,) = decode(tmp_path / "scratch", tmp_path / kind)
    assert frames_or_reason(result) == 4
    assert result.frame_size == (96, 96)


def filtered(path, bitstream_filter, pixel_format="yuv420p"):
    """A video whose H.264 headers a filter has changed."""
    source = path.with_suffix(".source.mkv")
    write_video(source, [quadrants(96, 96)] * 3, "libx264", pixel_format)
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        template = given.streams.video[0]
        stream = container.add_stream_from_template(template)
        context = av.BitStreamFilterContext(bitstream_filter, template, stream)
        for packet in [packet for packet in given.demux(template) if packet.size]:
            for changed in context.filter(packet):
                changed.stream = stream
                container.mux(changed)
    return path


def test_orientation_that_comes_with_the_first_frame_holds_for_all(tmp_path):
    file = filtered(tmp_path / "turned.mkv", "h264_metadata=display_orientation=insert:rotate=90")
    (result,) = decode(tmp_path / "scratch", file)
    assert frames_or_reason(result) == 3
    assert np.abs(result.tiles[0].astype(int) - result.tiles[2]).max() < 12


def test_colors_of_unknown_number_are_read_and_of_another_model_refused_in_words(tmp_path):
    numbers = (3, 200, 8, 14)
    files = [
        filtered(
            tmp_path / f"{number}.mkv",
            f"h264_metadata=matrix_coefficients={number}:colour_primaries={number}"
            f":transfer_characteristics={number}",
            "yuv444p",
        )
        for number in numbers
    ]
    reserved, unknown, ycgco, ictcp = map(frames_or_reason, decode(tmp_path / "scratch", *files))
    assert (reserved, unknown) == (3, 3)
    assert "color matrix 8" in ycgco
    assert "color matrix 14" in ictcp


def test_a_codec_that_is_not_known_is_said_to_be(tmp_path):
    file = write_video(tmp_path / "a.mkv", pictures(3), "libx264", "yuv420p")
    file.write_bytes(file.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    (result,) = decode(tmp_path / "scratch", file)
    assert "codec" in frames_or_reason(result)


def test_timecodes_chapters_and_odd_rates_change_nothing(tmp_path):
    files = []
    for name, rate, options in (
        ("timecode.mov", 25, {"write_tmcd": "1"}),
        ("slow.mkv", fractions.Fraction(1, 3), {}),
        ("fast.mkv", 100_000, {}),
    ):
        files.append(tmp_path / name)
        with av.open(str(files[-1]), "w", options=options) as container:
            container.metadata["timecode"] = "01:00:00:00"
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for image in pictures(5):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode(None))
    assert [frames_or_reason(result) for result in decode(tmp_path / "scratch", *files)] == [5, 5, 5]


def test_strips_are_read_from_top_to_bottom_whatever_their_exif(tmp_path):
    levels = np.repeat(np.arange(20, 220, 40, np.uint8), 128)
    strip = np.broadcast_to(levels[:, None, None], (len(levels), 128, 3)).copy()
    plain = folder_of_frames(tmp_path / "plain", [strip], "jpg", quality=95)
    jobs = [DecodeJob(plain.path / "0.jpg", strip=True)]
    for orientation in (3, 6):
        folder = tmp_path / str(orientation)
        folder_of_frames(folder, [strip], "jpg", quality=95, exif=exif(orientation=orientation))
        jobs.append(DecodeJob(folder / "0.jpg", strip=True))
    expected, *others = decode(tmp_path / "scratch", *jobs)
    assert frames_or_reason(expected) == 5
    for other in others:
        assert frames_or_reason(other) == 5
        np.testing.assert_array_equal(other.tiles, expected.tiles)


def test_one_bad_image_is_named(tmp_path):
    job = folder_of_frames(tmp_path / "frames", [quadrants()] * 3, "jpg")
    data = (job.path / "1.jpg").read_bytes()
    (job.path / "1.jpg").write_bytes(data[: len(data) * 6 // 10])
    (result,) = decode(tmp_path / "scratch", DecodeJob(job.path, job.frame_files))
    assert frames_or_reason(result).startswith("1.jpg is cut off")
