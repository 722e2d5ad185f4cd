"""kept_features.py: features of clips are computed once, and never taken for features of other clips or weights."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated import instead_of_networks, trained_run
from safetensors.torch import save_file
from tiny import COLORS, mean_colors

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares
from vglann_fast.metrics import features, kept_features
from vglann_fast.metrics.compare import measure
from vglann_fast.metrics.kept_features import features_of_clips


class Counting:
    """`COLORS`, counting the clips its network sees."""

    def __init__(self, weights="0" * 64):
        self.seen = 0
        protocol = {**COLORS.protocol, "sha256": weights}
        self.extractor = replace(COLORS, protocol=protocol, network=self.network)

    def network(self, clip):
        self.seen += 1
        return mean_colors(clip)

    def of(self, clips):
        """Features of the clips, and how many of them the network saw for that."""
        before = self.seen
        digests, blocks = measure("", [clips], len(clips), {}).digests, iter([clips[:3], clips[3:]])
        found = features_of_clips("clips", blocks, clips.shape[1:], digests, {"x": self.extractor})
        return found["x"], self.seen - before


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vglann-fast" / "features"


@pytest.fixture
def clips():
    return moving_squares(5)


def test_a_second_evaluation_computes_no_features_of_clips(tmp_path, monkeypatch, capsys):
    run = trained_run(tmp_path, training=9, held_out=7, epochs=1)
    counting = Counting()
    instead_of_networks(monkeypatch, tmp_path / "cache", counting.extractor)
    words = ["evaluate", str(run.path), "--kind", "gaussian", "--features", "lite0", "--invert", "0"]
    counts, records = [], []
    for _ in range(2):
        counting.seen = 0
        assert main(words) == 0
        counts.append(counting.seen)
        records.append((run.path / "evaluation" / "gaussian.json").read_bytes())
    assert counts == [9 + 7 + 2 * 7, 2 * 7]  # videos of two sources are made again
    assert records[0] == records[1]
    real = ClipSet.open(run.options["clips"], "test")
    assert counting.of(real.read(np.argsort(real.ids)))[1] == 0
    assert main([*words, "-n", "6"]) == 0
    assert json.loads((run.path / "evaluation" / "gaussian.json").read_text())["real"]["clips"] == 6


def test_what_changes_the_features_is_another_file(clips, cache, monkeypatch):
    counting = Counting()
    rows, seen = counting.of(clips)
    assert seen == 5
    other = clips.copy()
    other[4, 0, 0, 0, 0] ^= 1
    assert counting.of(other)[1] == 5
    assert counting.of(clips[::-1].copy())[1] == 5
    assert counting.of(clips[:4])[1] == 4
    assert counting.of(clips.reshape(5, 3, 64, 16, 16))[1] == 5  # the same bytes
    assert Counting(weights="1" * 64).of(clips)[1] == 5
    with monkeypatch.context() as patch:
        patch.setattr(kept_features, "_code", lambda: "2" * 64)
        assert counting.of(clips)[1] == 5
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        assert counting.of(clips)[1] == 5
    assert len(list(cache.iterdir())) == 8
    again, seen = counting.of(clips)
    assert seen == 0
    assert torch.equal(again, rows)


def replaced(file, **tensors):
    """Other tensors under the file's own record and checksum."""
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    save_file(tensors, file, metadata)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "no safetensors": lambda file: file.write_bytes(b"x" * 200),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "far too large": lambda file: file.write_bytes(file.read_bytes() + bytes(2**17)),
    "without rows": lambda file: replaced(file, columns=torch.zeros(5, 4)),
    "other numbers": lambda file: replaced(file, rows=torch.zeros(5, 4, dtype=torch.float64)),
    "another dtype": lambda file: replaced(file, rows=torch.zeros(5, 4, dtype=torch.float32)),
    "another shape": lambda file: replaced(file, rows=torch.zeros(4, 5, dtype=torch.float64)),
    "not finite": lambda file: replaced(file, rows=torch.full((5, 4), torch.nan, dtype=torch.float64)),
    "no metadata": lambda file: save_file({"rows": torch.zeros(5, 4, dtype=torch.float64)}, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_computed_again(damage, clips, cache, caplog):
    counting = Counting()
    rows, _ = counting.of(clips)
    (file,) = cache.iterdir()
    DAMAGE[damage](file)
    again, seen = counting.of(clips)
    assert seen == 5
    assert torch.equal(again, rows)
    assert f"{file} cannot be used" in caplog.text
    assert counting.of(clips)[1] == 0


def test_where_nothing_can_be_kept_the_evaluation_goes_on(clips, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    rows, seen = Counting().of(clips)
    assert (len(rows), seen) == (5, 5)
    assert "computed again the next time" in caplog.text


def test_a_folder_that_may_not_be_read_is_no_end_either(clips, cache, caplog, monkeypatch):
    counting = Counting()
    counting.of(clips)
    (file,) = cache.iterdir()

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(kept_features.Path, "is_file", refuse)
    assert counting.of(clips)[1] == 5
    assert f"{file} cannot be used" in caplog.text


def test_an_edit_of_what_makes_features_is_seen(tmp_path, monkeypatch):
    before = kept_features._code()
    (tmp_path / "features.py").write_text("# edited\n" + Path(features.__file__).read_text())
    monkeypatch.setattr(features, "__file__", str(tmp_path / "features.py"))
    kept_features._code.cache_clear()
    assert kept_features._code() != before
    kept_features._code.cache_clear()
