"""The measurements of `vglann tune` as users see them: the table, and what an import keeps."""

import json
from dataclasses import replace

import pytest
import torch
from tuned import AN_ENTRY, CPU

from vglann_fast.diagnostics import tune_file
from vglann_fast.diagnostics.tune_file import import_, table
from vglann_fast.runtime import measurements
from vglann_fast.runtime.measurements import Contest, machine, place, read, write

pytestmark = pytest.mark.usefixtures("own_cache")


def imported(entry):
    return replace(entry, imported=True)


def test_an_import_evicts_no_measurement_of_this_machine_and_replaces_no_newer_one(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "MAX_ENTRIES", 3)
    file = tmp_path / "file.json"

    def own(when, width=1):
        return replace(AN_ENTRY, machine=machine(CPU), shapes={"width": width}, when=when)

    write(file, [replace(AN_ENTRY, shapes={"width": width}) for width in (1, 2, 3)])
    write(place(), [own("2026-02-01")])
    assert "measurements: 2, 0 of them" in import_(file, CPU)
    assert own("2026-02-01") in read(place())
    write(file, [own("2026-01-31"), own("2026-01-31", width=2)])
    assert "measurements: 1, 1 of them" in import_(file, CPU)
    assert [entry for entry in read(place()) if entry.machine == machine(CPU)] == [
        imported(own("2026-01-31", width=2)),
        own("2026-02-01"),
    ]
    # What was measured here stays, whatever comes later; an import is replaced by a newer one.
    write(file, [own("2026-02-02"), own("2026-02-02", width=2)])
    assert "measurements: 1, 1 of them" in import_(file, CPU)
    write(file, [own("2026-01-01", width=2)])
    assert "measurements: 0, 0 of them" in import_(file, CPU)
    assert read(place())[1:] == [imported(own("2026-02-02", width=2)), own("2026-02-01")]
    # Another measurement here replaces both kinds.
    write(place(), [*read(place()), own("2026-01-01", width=2), own("2026-01-01")])
    assert read(place())[1:] == [own("2026-01-01", width=2), own("2026-01-01")]


def test_an_import_says_how_many_measurements_of_this_machine_stayed_and_the_way_out(tmp_path):
    file = tmp_path / "file.json"
    entries = [replace(AN_ENTRY, machine=machine(CPU), shapes={"width": width}) for width in (1, 2, 3)]
    write(file, entries[:2])
    assert "left out" not in import_(file, CPU)
    # Version 1 did not mark imports.
    content = json.loads(place().read_text())
    for entry in content["entries"]:
        del entry["imported"]
    place().write_text(json.dumps({**content, "version": 1}))
    write(file, [replace(entry, when="2026-11-01") for entry in entries])
    said = import_(file, CPU)
    assert "measurements: 1, 1 of them" in said
    assert "left out: 2" in said
    assert f"remove {place()}" in said
    place().unlink()
    assert "measurements: 3, 3 of them" in import_(file, CPU)


def test_imports_that_fill_the_file_make_room_for_newer_ones_and_those_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "MAX_ENTRIES", 3)
    file = tmp_path / "file.json"
    old, new = (
        [replace(AN_ENTRY, machine=machine(CPU), shapes={"width": w}, when=when) for w in widths]
        for widths, when in (((1, 2, 3), "2026-01-01"), ((4, 5), "2026-02-01"))
    )
    # An upgrade of PyTorch makes another machine of this one.
    before = replace(AN_ENTRY, machine={**machine(CPU), "torch": "1.0"}, when="2025-01-01")
    write(place(), [before])
    for entries in (old, new, [AN_ENTRY]):
        write(file, entries)
        import_(file, CPU)
    assert read(place()) == [*map(imported, new), before]


def test_an_import_of_many_newer_ones_of_an_equal_machine_leaves_what_was_measured_here(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(measurements, "MAX_ENTRIES", 3)
    file = tmp_path / "file.json"

    def equal(width, when):
        return replace(AN_ENTRY, machine=machine(CPU), shapes={"width": width}, when=when)

    own = [equal(1, "2026-01-01"), equal(2, "2026-01-02")]
    write(place(), own)
    for first in (10, 20):
        write(file, [equal(first + n, "2026-06-01") for n in range(3)])
        import_(file, CPU)
        assert len(read(place())) == 3
        assert read(place())[1:] == own
        assert read(place())[0] == imported(equal(first + 2, "2026-06-01"))
    # The next one that is measured here pushes out the imported one.
    write(place(), [*read(place()), equal(3, "2026-01-03")])
    assert read(place()) == [*own, equal(3, "2026-01-03")]


def test_an_import_for_the_gpu_leaves_what_was_measured_on_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "MAX_ENTRIES", 3)
    monkeypatch.setattr(tune_file, "machine", lambda device: {**machine(CPU), "device": device.type})
    file, of_gpu = tmp_path / "file.json", {**machine(CPU), "device": "cuda"}
    own = replace(AN_ENTRY, machine={**machine(CPU), "device": "cpu"}, when="2026-01-01")
    write(place(), [own])
    write(file, [replace(AN_ENTRY, machine=of_gpu, shapes={"width": width}) for width in (1, 2, 3)])
    assert "measurements: 2, 2 of them" in import_(file, torch.device("cuda"))
    assert own in read(place())


def test_the_table_has_one_line_for_a_default_that_is_wrong_and_stays():
    precision = replace(AN_ENTRY.contests["precision"], choice="fp32", left_out={"fp32": "its loss differs"})
    found = table(replace(AN_ENTRY, contests={"precision": precision})).splitlines()
    (line,) = [line for line in found if "fp32" in line]
    assert "1.00 default, chosen, its loss differs" in line


def test_the_table_marks_as_chosen_what_a_training_takes():
    contenders = {"fp32", "bf16", "mmap", "resident", "defaults", "choices"}

    def marked(entry):
        return {
            word for line in table(entry).splitlines() if "chosen" in line for word in line.split()
        } & contenders

    assert marked(AN_ENTRY) == {"bf16"}
    together = Contest("defaults", "defaults", {"defaults": 1.0, "choices": 1.1}, {"choices": 0.9}, {})
    slower = replace(AN_ENTRY, contests={**AN_ENTRY.contests, "together": together})
    assert marked(slower) == {"fp32", "defaults"}
    (line,) = [line for line in table(slower).splitlines() if "bf16" in line]
    assert "fastest" in line
    # Two choices that were never compared together.
    data = Contest("mmap", "resident", {"mmap": 2.0, "resident": 1.0}, {"mmap": 1.0, "resident": 2.0}, {})
    assert marked(replace(AN_ENTRY, contests={**AN_ENTRY.contests, "data": data})) == {"fp32", "mmap"}
