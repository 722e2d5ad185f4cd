"""Bounds from machine code: a handwritten disassembly with known answers, and the committed tables."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from vglann_kernels import bounds, resources, sass
from vglann_kernels.configurations import Configuration, Work, configurations
from vglann_kernels.product_configurations import LAYERS

TEXT = (Path(__file__).parents[1] / "fixtures" / "loops.sass").read_text()
# The outer loop moves 16 bytes in and 2 out; the inner one moves 8, the bytes of two trips.
WORK = Work(1320, "row", 2640, 4.3e6, ((4, 18), (16, 4)))
TABLES = sorted(resources.FOLDER.glob("RESOURCES*.md"))


def configuration(*loops):
    return Configuration("op", "name", print, (), {}, replace(WORK, loops=loops), warps=2)


def test_a_stall_is_read_from_the_control_word():
    stalls = {i.address: i.stall for i in sass.instructions_of(TEXT)}
    # A multiply-add whose result the next one needs: 4 cycles, as in all code for these GPUs.
    assert (stalls[0x50], stalls[0x10], stalls[0x110]) == (4, 5, 8)
    # What has no stall still takes the cycle in which it is issued.
    assert stalls[0x170] == 1


def test_loops_are_found_with_what_is_in_them():
    loops = {loop.address: sorted(loop.body) for loop in sass.code_of(TEXT).loops}
    assert loops == {
        0x30: [0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xB0, 0xC0, 0xD0],
        0x40: [0x40, 0x50, 0x60, 0x70],
        0xE0: [0xE0, 0xF0],
    }
    assert [loop.address for loop in sass.code_of(TEXT).loops if loop.waits] == [0xE0]


def test_slow_paths_and_what_lies_behind_the_end_do_not_count():
    left_out = {0x90, 0xA0, 0x140, 0x150, 0x160, 0x170}
    assert set(sass.code_of(TEXT).instructions) == set(range(0, 0x180, 0x10)) - left_out


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.128", 16), ("STG.E.U8", 1), ("LDGSTS.E.BYPASS.LTC128B.64", 8), ("LDG.E", 4), ("LDS.128", 0)],
)
def test_bytes_of_an_access_to_global_memory(opcode, size):
    assert sass.Instruction(0, "", opcode, "", 1).access == size


@pytest.mark.parametrize(
    ("opcode", "operations"),
    [
        ("HMMA.16816.F32.BF16", 4096),
        ("HMMA.1688.F32", 2048),
        ("HGMMA.64x128x16.F32", 65536),
        ("HFMA2.MMA", 0),
        ("FFMA", 0),
    ],
)
def test_operations_of_a_matrix_product(opcode, operations):
    """For each warp: four of them share one HGMMA."""
    assert sass.Instruction(0, "", opcode, "", 1).products == operations


def test_bounds_of_known_code():
    found = bounds.bounds_of(configuration((4, 18), (16, 4)), "90", TEXT, 5)
    # 8 instructions once, 5 in 4 passes and 4 in 4 x 8, with 34, 17 and 15 cycles; two warps.
    assert (found.instructions, found.cycles) == (2 * (8 + 20 + 128), 34 + 4 * 17 + 32 * 15)
    assert (found.loop_instructions, found.loop_cycles) == (4, 15)
    # 528 schedulers at 1.98 GHz; 1,320 programs, 660 at a time; a product a warp; 4.3 MB at 4.3 TB/s.
    assert (found.issue, found.latency, found.matrix, found.bytes) == ("0.394", "0.588", "0.010", "1.00")
    assert found.per_unit == "156"


def test_a_launch_that_leaves_the_gpu_empty_takes_as_long_as_a_program():
    alone = configuration((4, 18), (16, 4))
    alone = replace(alone, work=replace(alone.work, programs=1))
    assert bounds.bounds_of(alone, "90", TEXT, 5).latency == bounds.figure(582 / 1980)


@pytest.mark.parametrize(
    "loops",
    [(), ((4, 18),), ((4, 18), (16, 4), (1, 8)), ((4, 18), (16, 5)), ((4, 18), (16, 0)), ((4, 18), (16, 64))],
    ids=["none", "too few", "too many", "other bytes", "no bytes", "more bytes"],
)
def test_loops_that_are_not_in_the_code_are_an_error_that_names_the_kernel(loops):
    with pytest.raises(sass.CodeError, match=r"op name, target 90.*change `work`"):
        bounds.bounds_of(configuration(*loops), "90", TEXT, 5)


def test_code_whose_trips_are_all_written_out_needs_no_loops():
    text = TEXT.replace("BRA 0x40 ", "BRA 0x80 ").replace("BRA 0x30 ", "BRA 0xe0 ")
    text = text.replace("BRA 0x100 ", "BRA 0x30 ")
    assert bounds.bounds_of(configuration((1, 18), (2, 4)), "90", text, 5).instructions == 2 * (8 + 4 + 4)
    with pytest.raises(sass.CodeError, match="op name, target 90"):
        bounds.bounds_of(configuration((4, 18), (16, 4)), "90", text, 5)


def test_code_that_a_forward_branch_may_skip_does_not_count():
    """Straight code, and code in a loop; what leads to a loop that runs counts, though a branch leads around it."""
    code, entered = sass.code_of(TEXT), {0x30, 0x40}
    # Behind the first end.
    assert code.skippable(entered) == {0x130}
    assert code.skippable({0x30}) == {0x130}
    # A branch leads around both loops, and around the one that waits behind them.
    assert code.skippable(set()) == {0x130, 0xE0, 0xF0}
    skipping = TEXT.replace("    FFMA R22, R23, R22, 1 ", "@P6 BRA 0x70 ")
    assert sass.code_of(skipping).skippable(entered) == {0x60, 0x130}
    found = bounds.bounds_of(configuration((4, 18), (16, 4)), "90", skipping, 5)
    assert found.instructions == 2 * (8 + 20 + 32 * 3)
    skipping = TEXT.replace("STG.E desc[UR4][R2.64], R19 ", "@P7 BRA 0x120 ")
    assert sass.code_of(skipping).skippable(entered) == {0x110, 0x130}


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("DFMA", "arithmetic"),
        ("DSETP.GEU.AND", "arithmetic"),
        ("F2F.F64.F32", "conversion"),
        ("I2F.F64", "conversion"),
        ("DEPBAR.LE", ""),
        ("F2F.BF16.F32", ""),
    ],
)
def test_float64_arithmetic_and_conversions_are_told_apart(opcode, kind):
    assert sass.Instruction(0, "", opcode, "", 1).double == kind


@pytest.mark.parametrize(
    ("target", "time"), [("89", 32 * 128 / 2 / 128 / 2520), ("90", 32 * 128 / 64 / 132 / 1980)]
)
def test_the_bound_by_float64(target, time):
    """32 passes of one instruction, by two warps of 32 lanes in 1,320 programs."""
    text = TEXT.replace("FFMA R22", "DFMA R22")
    found = bounds.bounds_of(configuration((4, 18), (16, 4)), target, text, 5)
    assert found.double == bounds.figure(time * 1320 * 2 * 32 / 128)


def test_code_that_work_does_not_describe_costs_its_own_row_only(tmp_path):
    limits = bounds.read(resources.DEFAULT_TABLE)[:2]
    row = bounds.unknown(configuration((4, 18)), "90")
    assert (row.instructions, row.issue, row.bytes) == (None, "-", "1.00")
    (tmp_path / "table.md").write_text(bounds.section([*limits, row]))
    assert bounds.read(tmp_path / "table.md") == [*limits, row]
    assert not bounds.worse([row], [row])
    # Unknown where it was known is worse, and the other way round it is not.
    known = replace(limits[0], op=row.op, configuration=row.configuration, target=row.target)
    assert bounds.worse([row], [known])
    assert not bounds.worse([known], [row])


def test_a_problem_of_one_row_is_reported_beside_the_table(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (_, rows), limits = resources.read_table(), bounds.read(resources.DEFAULT_TABLE)
    monkeypatch.setattr(resources, "compile_all", lambda *_: (rows, limits, ["op name: other loops"]))
    monkeypatch.setattr(resources, "triton_version", lambda: resources.DEFAULT_VERSION)
    written = []
    monkeypatch.setattr(resources, "write_table", lambda *table: written.append(table[:2]))
    for arguments in ([], ["--check"]):
        assert resources.main([*arguments, "--out", str(resources.DEFAULT_TABLE)]) == 1
        assert "op name: other loops" in capsys.readouterr().out
    assert written == [(rows, limits)]


def test_a_computed_branch_is_an_error():
    with pytest.raises(sass.CodeError, match="BRX"):
        sass.code_of(TEXT.replace("BRA 0x40 ", "BRX R2 -0x40 "))


def test_a_worse_bound_is_found(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (_, rows), limits = resources.read_table(), bounds.read(resources.DEFAULT_TABLE)
    for worse in (
        [],
        [replace(limits[0], instructions=limits[0].instructions + 1)],
        [replace(limits[0], cycles=limits[0].cycles + 1)],
        [replace(limits[0], matrix="1")],
        [replace(limits[0], double="1")],
        [replace(limits[0], configuration="another")],
    ):
        found = [*worse, *limits[1:], replace(limits[0], instructions=limits[0].instructions - 1)]
        monkeypatch.setattr(resources, "compile_all", lambda *_, found=found: (rows, found, []))
        arguments = ["--check", "--out", str(resources.DEFAULT_TABLE)]
        assert resources.main(arguments) == (1 if worse else 0)
        assert (limits[0].op in capsys.readouterr().out) == bool(worse)


def test_a_written_table_is_read_back(tmp_path):
    limits = bounds.read(resources.DEFAULT_TABLE)
    (tmp_path / "table.md").write_text(bounds.section(limits))
    assert bounds.read(tmp_path / "table.md") == limits


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_committed_bounds_are_complete_and_of_this_work(path):
    """Instructions and cycles come from a compiler; all else follows from them and from `work`."""
    rows = {(r.op, r.configuration, r.target): r for r in resources.read_table(path)[1]}
    limits = bounds.read(path)
    expected = {(c.op, c.name, target): c for target in bounds.GPUS for c in configurations(int(target))}
    assert {(b.op, b.configuration, b.target) for b in limits} == expected.keys()
    for b in limits:
        known = expected[b.op, b.configuration, b.target]
        at_once = rows[b.op, b.configuration, b.target].programs
        assert b.instructions is not None, b
        times = bounds.times_of(known, b.target, b.instructions, b.cycles, at_once)
        issue, latency, _, _, moved = map(bounds.figure, times)
        assert (b.issue, b.latency, b.bytes) == (issue, latency, moved), b
        assert (b.unit, b.programs) == (known.work.unit, known.work.programs), b


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_matrix_units_do_what_a_layer_needs_and_no_more(path):
    """The matrix instructions that the loops run, against 2 x positions x channels x outputs x taps."""
    matrix = {(b.configuration, b.target): b.matrix for b in bounds.read(path) if b.op == "upsample_conv"}
    for layer, (channels, outputs, grid) in LAYERS.items():
        positions = 256
        for size in grid:
            positions *= size
        needed = 2 * positions * channels * outputs * 4 ** len(grid)
        # The head's columns have more than its outputs need.
        for kind in ("forward", "input gradient", "weight gradient"):
            for target, gpu in bounds.GPUS.items():
                if "head" not in layer:
                    time = bounds.figure(needed / gpu.matrix * 1e6)
                    assert matrix[f"{kind} {layer} bf16", target] == time


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_matrix_units_do_what_a_search_needs_and_no_more(path):
    """Every query of a portion with every row, over the 112 or 144 columns of one part."""
    for target, gpu in bounds.GPUS.items():
        units = {c.name: c.work.units for c in configurations(int(target)) if c.op == "nearest"}
        matrix = {b.configuration: b.matrix for b in bounds.read(path) if b.target == target}
        for name, columns in (("scan d=100", 112), ("scan d=128", 144)):
            time = 2 * units[name] * 128 * columns / gpu.matrix * 1e6
            assert float(matrix[name]) == pytest.approx(time, rel=1e-3)


def test_the_readme_has_the_issue_bounds_of_the_table():
    text = (resources.FOLDER / "README.md").read_text()
    limits = {(b.op, b.configuration, b.target): b.issue for b in bounds.read(resources.DEFAULT_TABLE)}
    for op, configuration in (
        ("laplacian", "binomial bf16 64x64"),
        ("composite_laplacian", "binomial bf16 channels-last 64x64"),
    ):
        rows = re.search(rf"^\| {op} \| instructions.*?\n(?:\| \|.*\n)*", text, re.MULTILINE)
        h200, rtx = re.search(r"issue bound.*\| (\d+) / (\d+) µs", rows[0]).groups()
        assert (limits[op, configuration, "90"], limits[op, configuration, "89"]) == (h200, rtx)
