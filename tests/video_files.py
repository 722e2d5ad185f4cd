"""Small real video files for tests."""

import fractions
from pathlib import Path

import av
import numpy as np

RED, GREEN, BLUE, GREY = (200, 30, 40), (30, 190, 50), (40, 50, 210), (120, 120, 120)


def quadrants(height: int = 96, width: int = 128) -> np.ndarray:
    """Red top left, green top right, blue bottom left, grey bottom right."""
    image = np.empty((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = RED, GREEN
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = BLUE, GREY
    return image


def write_video(path, images, codec="ffv1", pixel_format="yuv444p", times=None, setup=None, options=None):
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixel_format
        if setup is not None:
            setup(stream)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.colorspace = stream.codec_context.colorspace
            frame = frame.reformat(format=pixel_format, dst_colorspace=stream.codec_context.colorspace)
            if times is not None:
                frame.pts, frame.time_base = times[number], fractions.Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def gif_bytes(frames, side, screen=None, transparent=0):
    """An animated GIF of palette indices (< 128), 0 transparent, written without compression."""
    screen = screen or side
    palette = bytes(GREY) + bytes(RED) + bytes(BLUE) + bytes(3 * 125)
    data = b"GIF89a" + screen.to_bytes(2, "little") * 2 + b"\xf6\x00\x00" + palette
    for frame in frames:
        # Codes of min size 7 are 8 bits wide until the table is full: a clear code every 100 pixels.
        codes = b"".join(b"\x80" + frame[i : i + 100] for i in range(0, len(frame), 100)) + b"\x81"
        blocks = b"".join(
            bytes([len(codes[i : i + 255])]) + codes[i : i + 255] for i in range(0, len(codes), 255)
        )
        data += b"\x21\xf9\x04\x09\x05\x00" + bytes([transparent]) + b"\x00"
        data += b"\x2c" + bytes(4) + side.to_bytes(2, "little") * 2 + b"\x00\x07" + blocks + b"\x00"
    return data + b"\x3b"
