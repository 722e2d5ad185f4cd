"""The tables of docs/scale.md: what fits, and that the document says what is computed."""

from pathlib import Path

import pytest
import torch

from vglann_fast.experiments import scale
from vglann_fast.glo.checkpoint import new_generator
from vglann_fast.options.presets import PRESETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.parametrize(("preset", "size"), [("modern", 64), ("demo", 128)])
def test_the_largest_batch_fits_and_one_more_video_does_not(preset, size):
    options, room = PRESETS[preset].train, 6e9
    batch = scale.largest_batch(options, size, room)
    with torch.device("meta"):
        generator = new_generator(options, scale.FRAMES, size)
    assert scale.total_bytes(generator, options, size, batch) <= room
    assert scale.total_bytes(generator, options, size, batch + 1) > room


def test_nothing_fits_where_the_generator_does_not():
    assert scale.largest_batch(PRESETS["modern"].train, 64, 1e6) == 0


def test_latents_take_their_rows_and_two_moments():
    options = PRESETS["modern"].train
    rows = 1000 * options.latent_dim * 4
    assert 3 * rows <= scale.latents_bytes(1000, options) < 3.1 * rows


def test_the_document_has_the_batches_that_are_computed():
    assert scale.batches_table() in DOCUMENT.read_text()


def test_folders_of_holes_are_measured_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "COUNTS", (20, 2000))
    lines = scale.clips_table(tmp_path, step_ms=1000.0).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["20", "2,000"]
    assert not list(tmp_path.iterdir())
