"""The file of `vglann tune`: what is read of it, what is refused, and that nothing in it can stop a training."""

import json
import os
from dataclasses import replace

import pytest
import torch

from vglann_fast.errors import VglannError
from vglann_fast.runtime import measurements
from vglann_fast.runtime.measurements import Contest, Entry, lookup, machine, only_tune, place, read, write

CPU = torch.device("cpu")
SHAPES = {"width": 4, "sync_bn": False, "loss": "laplacian"}


pytestmark = pytest.mark.usefixtures("own_cache")


def entry(choice="bf16", shapes=None, **here):
    contest = Contest(
        "fp32", choice, {"fp32": 2.0, choice: 1.0}, {"fp32": 1.0, choice: 2.0}, {"tf32": "no GPU"}
    )
    return Entry(
        {**machine(CPU), **here}, shapes or SHAPES, "2026-01-02T03:04:05+00:00", {"precision": contest}
    )


def changed(value, *path, to):
    """A deep copy of a JSON value with one place changed; a callable gets what was there."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return copy


def test_an_entry_comes_back_and_a_later_one_of_the_same_shapes_replaces_it():
    other = entry(shapes={**SHAPES, "width": 8})
    write(place(), [entry("bf16"), other, entry("fp32")])
    assert read(place()) == [other, entry("fp32")]
    assert lookup(CPU, SHAPES) == (entry("fp32"), "")


def test_what_version_1_wrote_counts_as_measured_here():
    write(place(), [entry(), replace(entry(device="Z80"), imported=True)])
    assert [found.imported for found in read(place())] == [False, True]
    content = json.loads(place().read_text())
    for value in content["entries"]:
        del value["imported"]
    place().write_text(json.dumps({**content, "version": 1}))
    assert read(place()) == [entry(), entry(device="Z80")]


def test_choices_that_are_not_faster_together_are_the_defaults():
    found = entry("bf16")
    assert found.choices == {"precision": "bf16"}
    assert "bf16 (2.00 times as fast)" in found.changes(["precision"])
    slower = Contest("defaults", "defaults", {"defaults": 1.0, "choices": 1.0}, {"choices": 1.0}, {})
    found = replace(found, contests={**found.contests, "together": slower})
    assert found.choices == {"precision": "fp32"}
    assert "bf16" not in found.changes(["precision"])


def test_several_choices_that_were_never_compared_together_are_the_defaults():
    contests = {"precision": entry("bf16").contests["precision"]}
    contests["data"] = Contest("mmap", "resident", {"resident": 1.0}, {"resident": 1.2}, {})
    found = replace(entry("bf16"), contests=contests)
    assert found.choices == {"precision": "fp32", "data": "mmap"}
    # The defaults hold for what is left of them, too.
    assert "bf16" not in found.changes(["precision"])
    contests["data"] = replace(contests["data"], choice="mmap")
    assert found.choices == {"precision": "bf16", "data": "mmap"}


def test_what_is_written_can_be_read_and_the_oldest_are_left_out(monkeypatch):
    monkeypatch.setattr(measurements, "MAX_BYTES", 10_000)
    entries = [entry(shapes={"width": width}) for width in range(40)]
    write(place(), entries)
    there = read(place())
    assert 2 < len(there) < 40
    assert there == entries[-len(there) :]


def test_nothing_measured_is_no_entry_and_no_reason():
    assert lookup(CPU, SHAPES) == (None, "")


def test_the_variable_hides_the_file(monkeypatch):
    write(place(), [entry()])
    monkeypatch.setenv("VGLANN_TUNE", "off")
    assert lookup(CPU, SHAPES) == (None, "")


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (entry(device="Z80"), "another machine (Z80)"),
        (entry(torch="1.0"), "torch 1.0"),
        (entry(**{"vglann-fast": "0.0.1", "triton": None}), "vglann-fast 0.0.1, triton None"),
        (entry(processors=77), "processors 77"),
        (entry(shapes={"width": 8}), "other shapes only (width 8)"),
    ],
)
def test_a_file_of_another_machine_version_or_shape_is_said_in_one_line(there, reason):
    write(place(), [there])
    found, said = lookup(CPU, SHAPES)
    assert found is None
    assert reason in said
    assert "\n" not in said


GOOD = ("entries", 0)
CONTEST = (*GOOD, "contests", "precision")
HOSTILE = [
    (("format",), "vglann-run"),
    (("version",), 3),
    (("entries",), {}),
    (("entries",), [{}] * 1001),
    ((*GOOD, "machine"), {"device": "this"}),
    ((*GOOD, "machine", "torch"), ["2.13"]),
    ((*GOOD, "shapes"), {"width": float("nan")}),
    ((*GOOD, "shapes"), {"width": -1}),
    ((*GOOD, "shapes"), {str(i): i for i in range(51)}),
    ((*GOOD, "when"), "now\x1b[2J"),
    ((*GOOD, "when"), 5),
    ((*GOOD, "contests"), [1]),
    ((*GOOD, "more"), 1),
    ((*GOOD, "imported"), 1),
    ((*GOOD, "contests", "memory_format"), None),
    ((*CONTEST, "choice"), "fp8"),
    ((*CONTEST, "choice"), "tf32"),
    ((*CONTEST, "choice"), ["bf16"]),
    ((*CONTEST, "seconds", "bf16"), float("nan")),
    ((*CONTEST, "seconds", "bf16"), float("inf")),
    ((*CONTEST, "seconds", "bf16"), -1.0),
    ((*CONTEST, "seconds", "bf16"), 0),
    ((*CONTEST, "seconds", "bf16"), True),
    ((*CONTEST, "factors", "bf16"), "2"),
    ((*CONTEST, "factors", "bf16"), 10**400),
    ((*CONTEST, "left_out", "tf32"), "x" * 201),
    ((*CONTEST, "left_out"), []),
    ((*GOOD, "contests"), {"threads": Contest("1", "-1", {"-1": 1.0}, {}, {}).__dict__}),
    ((*GOOD, "contests"), {"threads": Contest("1", "99999", {"99999": 1.0}, {}, {}).__dict__}),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_file_with_one_value_changed_is_refused_by_its_name_and_stops_no_training(path, value):
    write(place(), [entry()])
    good = json.loads(place().read_text())
    place().write_text(json.dumps(changed(good, *path, to=value)))
    with pytest.raises(VglannError, match=r"tune\.json"):
        read(place())
    found, said = lookup(CPU, SHAPES)
    assert found is None
    assert "tune.json" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"null",
        b" " * ((4 << 20) + 1),
        b'{"entries": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "binary", "deep", "null", "huge", "a large number"],
)
def test_a_file_that_is_no_json_of_ours_is_refused(content):
    place().parent.mkdir(parents=True)
    place().write_bytes(content)
    assert "tune.json" in lookup(CPU, SHAPES)[1]


def test_a_file_of_a_newer_version_is_refused_with_all_versions_that_can_be_read():
    place().parent.mkdir(parents=True)
    place().write_text(json.dumps({"format": "vglann-tune", "version": 3, "entries": []}))
    with pytest.raises(VglannError, match="reads versions 1 and 2"):
        read(place())


def test_a_pipe_in_its_place_blocks_nothing():
    place().parent.mkdir(parents=True)
    os.mkfifo(place())
    assert "tune.json" in lookup(CPU, SHAPES)[1]


def test_a_second_tune_is_refused_until_the_first_has_ended():
    with only_tune(), pytest.raises(VglannError, match="another `vglann tune` is running"), only_tune():
        pass
    with only_tune():
        pass


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_measured(monkeypatch):
    def read_only(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(measurements.os, "open", read_only)
    with pytest.raises(VglannError, match=r"Read-only file system.*XDG_CACHE_HOME"), only_tune():
        pass


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch):
    write(place(), [entry()])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(VglannError, match="the disk is full"):
        write(place(), [entry("fp32")])
    assert read(place()) == [entry()]


def test_what_could_not_be_read_again_is_not_written():
    write(place(), [entry()])
    untimed = Contest("reference", "reference", {"triton": 1.0}, {}, {"reference": "out of memory"})
    bad = replace(entry(), shapes={"width": 8}, contests={"upsample_conv 3d 8-4": untimed})
    with pytest.raises(VglannError, match="not timed"):
        write(place(), [entry(), bad])
    assert read(place()) == [entry()]
