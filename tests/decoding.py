"""Decode files as `pack` does, for tests."""

import io
from pathlib import Path

import numpy as np

from vglann_fast.clips.decode import DecodedVideo, DecodeJob, DecodeLimits, decode_all


def decode(scratch, *jobs, workers=1, **limits):
    """The results of the jobs, in their order; arrays are copied, so that the temporary files can go."""
    scratch.mkdir(exist_ok=True)
    jobs = [job if isinstance(job, DecodeJob) else DecodeJob(job) for job in jobs]
    results = []
    for result in decode_all(jobs, scratch, DecodeLimits(**limits), workers):
        if isinstance(result, DecodedVideo):
            arrays = {"tiles": np.array(result.tiles), "thumbnails": np.array(result.thumbnails)}
            result.discard()
            result = DecodedVideo(**{**vars(result), **arrays})
        results.append(result)
    return results


def frames_or_reason(result):
    return len(result.tiles) if isinstance(result, DecodedVideo) else result.reason


def pictures(count, height=96, width=128):
    """A bright square crosses a field of noise, (height, width, 3) each."""
    random = np.random.default_rng(0)
    field = random.integers(0, 100, (height, width, 3), np.uint8)
    images = np.repeat(field[None], count, axis=0)
    for number, image in enumerate(images):
        image[20:60, number % 60 : number % 60 + 40] = 200
    return list(images)


def folder_of_frames(folder, images, extension, **options):
    """A job for the images, saved by Pillow."""
    from PIL import Image

    folder.mkdir()
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension), **options)
        (folder / f"{number}.{extension}").write_bytes(buffer.getvalue())
    return DecodeJob(folder, tuple(f"{number}.{extension}" for number in range(len(images))))


def cut_off(path: Path, share: float) -> Path:
    """A copy that ends too early."""
    data = path.read_bytes()
    copy = path.with_name(f"cut at {share} {path.name}")
    copy.write_bytes(data[: int(len(data) * share)])
    return copy
