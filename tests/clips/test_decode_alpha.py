"""Transparency is laid over white whatever carries it, or the file is refused in words."""

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")

from decoding import decode, folder_of_frames, frames_or_reason  # noqa: E402

from vglann_fast.clips import frames as frames_module  # noqa: E402
from vglann_fast.clips.decode import DecodeJob  # noqa: E402


def picture(alpha=0, shift=0):
    """Red, of that alpha, above an opaque blue field: uint8 (96, 128, 4)."""
    image = np.zeros((96, 128, 4), np.uint8)
    image[:40] = (230, 0, 0, alpha)
    image[40:] = (20, 40, 200, 255)
    image[60:70, 40 + shift : 60 + shift] = 255
    return image


def write(path, codec, pixel_format, options=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 128, 96, pixel_format
        for shift in range(4):
            frame = av.VideoFrame.from_ndarray(picture(shift=shift), "rgba")
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode(None))
    return path


def assert_over_white(result, top=(255, 255, 255), tolerance=6, name=""):
    assert frames_or_reason(result) > 1, name
    assert np.abs(result.tiles[1, 0, 4:20].astype(int) - top).max() <= tolerance, name
    assert np.abs(result.tiles[1, 0, 34, 8].astype(int) - (20, 40, 200)).max() <= 12


VIDEOS = {
    "vp9.webm": ("libvpx-vp9", "yuva420p"),
    "vp9.mkv": ("libvpx-vp9", "yuva420p"),
    "vp8.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    "ffv1.mkv": ("ffv1", "bgra"),
    "ffv1 16.mkv": ("ffv1", "rgba64le"),
    "gray.mkv": ("ffv1", "ya8"),
    "prores.mov": ("prores_ks", "yuva444p10le"),
    "qtrle.mov": ("qtrle", "argb"),
    "png.mov": ("png", "rgba"),
    "utvideo.avi": ("utvideo", "gbrap"),
    "raw.mov": ("rawvideo", "argb"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_transparent_videos_are_over_white(tmp_path, name):
    (result,) = decode(tmp_path / "scratch", write(tmp_path / name, *VIDEOS[name]))
    if name == "gray.mkv":
        assert result.tiles[1, 0, 4:20].min() > 250
    else:
        assert_over_white(result)


def test_opaque_vp9_does_not_need_libvpx(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module.av.CodecContext, "create", None, raising=False)
    file = write(tmp_path / "opaque.webm", "libvpx-vp9", "yuv420p")
    frames = list(frames_module.file_frames(file, 10**6, frames_module.VideoReformatter()))
    assert len(frames) == 4


def test_vp9_is_refused_in_words_where_libvpx_is_missing(tmp_path, monkeypatch):
    file = write(tmp_path / "a.webm", "libvpx-vp9", "yuva420p")
    monkeypatch.setitem(frames_module._ALPHA_DECODERS, "vp9", "libvpx-of-no-kind")
    with pytest.raises(frames_module.Unusable, match="libvpx"):
        next(frames_module.file_frames(file, 10**6, frames_module.VideoReformatter()))


@pytest.mark.parametrize("extension", ["gif", "png"])
def test_transparent_animations_are_over_white(tmp_path, extension):
    first, *others = [Image.fromarray(picture(shift=shift)) for shift in range(3)]
    first.save(tmp_path / f"a.{extension}", save_all=True, append_images=others)
    (result,) = decode(tmp_path / "scratch", tmp_path / f"a.{extension}")
    assert_over_white(result)


def test_avif_with_transparency_in_a_track_of_its_own_is_refused(tmp_path):
    first, *others = [Image.fromarray(picture(shift=shift)) for shift in range(3)]
    try:
        first.save(tmp_path / "a.avif", save_all=True, append_images=others)
        opaque = [image.convert("RGB") for image in others]
        opaque[0].save(tmp_path / "b.avif", save_all=True, append_images=opaque)
    except (KeyError, OSError, ValueError):
        pytest.skip("this Pillow cannot write AVIF")
    transparent, opaque = decode(tmp_path / "scratch", tmp_path / "a.avif", tmp_path / "b.avif")
    assert "transparent" in frames_or_reason(transparent)
    assert frames_or_reason(opaque) == 3


def associated(job):
    """The TIFF files, marked as having their colors multiplied by alpha: ExtraSamples (338) 1 in place of 2."""
    entry = bytes([0x52, 1, 3, 0, 1, 0, 0, 0])
    for name in job.frame_files:
        data = (job.path / name).read_bytes()
        assert data.count(entry + b"\x02") == 1
        (job.path / name).write_bytes(data.replace(entry + b"\x02", entry + b"\x01"))
    return job


def test_transparent_images_are_over_white(tmp_path):
    half, premultiplied = picture(128), picture(128)
    premultiplied[:40, :, 0] = 230 * 128 // 255
    palette = Image.fromarray((np.arange(96)[:, None] >= 40).astype(np.uint8).repeat(128, 1), "P")
    palette.putpalette([230, 0, 0, 20, 40, 200])
    red_is_clear = picture(255)[..., :3]
    cases = {
        "png": (folder_of_frames(tmp_path / "png", [picture()] * 2, "png"), (255, 255, 255)),
        "png half": (folder_of_frames(tmp_path / "half", [half] * 2, "png"), (242, 127, 127)),
        "palette": (
            folder_of_frames(tmp_path / "palette", [palette] * 2, "png", transparency=bytes([128, 255])),
            (242, 127, 127),
        ),
        "color key": (
            folder_of_frames(tmp_path / "key", [red_is_clear] * 2, "png", transparency=(230, 0, 0)),
            (255, 255, 255),
        ),
        "webp": (
            folder_of_frames(tmp_path / "webp", [picture()] * 2, "webp", lossless=True, exact=True),
            (255, 255, 255),
        ),
        "bmp": (folder_of_frames(tmp_path / "bmp", [picture()] * 2, "bmp"), (255, 255, 255)),
        "tiff": (folder_of_frames(tmp_path / "tiff", [half] * 2, "tif"), (242, 127, 127)),
        "tiff premultiplied": (
            associated(folder_of_frames(tmp_path / "premultiplied", [premultiplied] * 2, "tif")),
            (242, 127, 127),
        ),
    }
    jobs = [job for job, _ in cases.values()]
    assert all(isinstance(job, DecodeJob) for job in jobs)
    for (name, (_, top)), result in zip(cases.items(), decode(tmp_path / "scratch", *jobs), strict=True):
        assert frames_or_reason(result) == 2, name
        assert_over_white(result, top, 3, name)
