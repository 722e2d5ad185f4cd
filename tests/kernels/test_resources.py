"""The committed table of registers, stack and shared memory: complete, current, within its limits."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import pytest
from vglann_kernels import resources
from vglann_kernels.configurations import INFORMATIONAL, LARGE, LARGE_TARGET, TARGETS, configurations

STAMP, ROWS = resources.read_table()
# bfloat16 planes of 64x64 are what both presets train on
DEFAULTS = [row for row in ROWS if "64x64" in row.configuration and "bf16" in row.configuration]
DEFAULTS = [row for row in DEFAULTS if not row.configuration.endswith("l1 l2")]


def test_the_table_is_of_these_kernels():
    assert resources.source_hash() in STAMP, "run: python -m vglann_kernels.resources"


@pytest.mark.parametrize(
    ("changed", "stale"),
    [("upsample_conv/tiles.py", True), ("launch.py", True), ("nearest/reference.py", False)],
)
def test_the_table_is_of_all_that_decides_what_is_launched(changed, stale, tmp_path):
    shutil.copytree(resources.FOLDER / "vglann_kernels", tmp_path / "kernels")
    assert resources.source_hash(tmp_path / "kernels") == resources.source_hash()
    with (tmp_path / "kernels" / changed).open("a") as file:
        file.write("TILE = 16\n")
    assert (resources.source_hash(tmp_path / "kernels") != resources.source_hash()) == stale


@pytest.mark.parametrize("target", [*TARGETS, *INFORMATIONAL])
def test_the_table_is_complete(target):
    names = [(c.op, c.name) for c in configurations(target)]
    assert [(r.op, r.configuration) for r in ROWS if r.target == str(target)] == names
    assert len(set(names)) == len(names)
    assert len([name for op, name in names if op not in ("nearest", "upsample_conv")]) <= 40
    if target in INFORMATIONAL:
        assert not any(op in ("nearest", "upsample_conv") for op, name in names)
    assert any(LARGE in name for _, name in names) == (target == LARGE_TARGET)


@pytest.mark.parametrize(("targets", "limit"), [(("90", "100"), 0), (("80", "86", "89", "120"), 64)])
def test_the_defaults_do_not_spill(targets, limit):
    rows = [row for row in DEFAULTS if row.target in targets]
    assert len(rows) == 4 * len(targets)
    for row in rows:
        # The paper's blur leaves no register for the counters of the loop around it.
        loop = (row.op, row.configuration.split()[0]) == ("composite_laplacian", "paper")
        assert row.stack <= (144 if loop else limit), row


def test_the_laplacian_stays_in_registers_and_off_the_matrix_units():
    """Straight code: a program runs each instruction once, in every warp."""
    rows = [row for row in ROWS if row.op == "laplacian" and not row.configuration.startswith("scaling")]
    for row in [row for row in rows if row.target in map(str, TARGETS)]:
        assert row.stack <= (8 if row.configuration.endswith("l1 l2") else 0), row
        assert row.mma == 0, row
    limits = {"binomial bf16 64x64": 6_700, "paper bf16 64x64": 9_000, "binomial bf16 64x64 l1 l2": 8_000}
    limits |= {"binomial bf16 32x32": 2_500, "binomial bf16 128x128": 27_000}
    for row in rows:
        if row.target in ("89", "90") and row.configuration in limits:
            assert row.instructions * row.warps <= limits[row.configuration], row


def test_the_joint_loss_is_the_laplacian_and_little_else():
    """Loops once: the pass of a plane is most of the code; what is made of its gradient and the masks the rest."""
    rows = [row for row in ROWS if row.op == "composite_laplacian" and row.target in ("89", "90")]
    for row in rows:
        assert row.mma == 0, row
        if row.configuration == "binomial bf16 channels-last 64x64":
            assert row.instructions * row.warps <= 9_700, row
            assert row.programs == 4, row


SHARED_MEMORY = {
    "80": 163,
    "86": 99,
    "89": 99,
    "90": 227,
    "100": 227,
    "120": 99,
}  # KB that a program may have


def test_shared_memory_fits_the_card():
    for row in ROWS:
        assert row.shared <= SHARED_MEMORY.get(row.target, 227) * 1024, row


def test_the_search_does_not_spill_and_scans_on_the_matrix_units():
    rows = [row for row in ROWS if row.op == "nearest"]
    assert {row.target for row in rows} == set(map(str, TARGETS))
    for row in rows:
        assert row.stack == 0, row
        assert row.mma >= 4 if "scan" in row.configuration else row.mma == 0, row
    # 128 x 128 or 256 x 128 scores over 112 columns: 16 x 8 x 16 for a warp, 64 x 128 x 16 for four, 128 x 128 x 16
    scans = {row.target: row for row in rows if row.configuration == "scan d=100"}
    products = {target: row.mma for target, row in scans.items()}
    assert products == {"80": 112, "86": 112, "89": 112, "90": 28, "100": 28, "120": 112}
    # The maximum of one program hides behind the products of the other.
    assert scans["90"].programs == 2


def test_the_norms_and_the_guard_do_not_spill():
    rows = [row for row in ROWS if row.op in ("batchnorm_relu", "step_guard")]
    assert {row.target for row in rows} == {*map(str, TARGETS), *map(str, INFORMATIONAL)}
    for row in rows:
        assert row.stack <= 0, row
        assert row.mma <= 0, row


# Stack bytes. The first has x, scale and shift beside its sums, after the products.
CONVOLUTIONS_THAT_SPILL = {
    ("input gradient conv4 bf16 rectifying", "90"): 64,
    ("forward background conv2 bf16", "120"): 8,
}


def test_the_convolutions_hardly_spill_and_multiply_on_the_matrix_units():
    """A step of a 16-bit kernel is one product of tiles; float32 is multiplied exactly, by all threads."""
    rows = [row for row in ROWS if row.op == "upsample_conv"]
    assert {row.target for row in rows} == set(map(str, TARGETS))
    for row in rows:
        assert row.stack <= CONVOLUTIONS_THAT_SPILL.get((row.configuration, row.target), 0), row
        product = row.configuration.startswith(("forward", "input", "weight")) and "bf16" in row.configuration
        assert (row.mma > 0) == product, row
    # 128 x 64 x 64, 128 x 32 x 64, 128 x 128 x 64: by 16 x 8 x 16 for a warp, by 64 x N x 16 for four.
    for configuration, products in (
        ("forward conv4 bf16", {"80": 64, "89": 64, "90": 8}),
        ("forward head bf16", {"80": 32, "89": 32, "90": 8}),
        ("input gradient conv4 bf16", {"80": 64, "89": 64, "90": 4}),
        ("weight gradient conv4 bf16", {"80": 64, "89": 64, "90": 4}),
    ):
        counted = {row.target: row.mma for row in rows if row.configuration == configuration}
        assert products.items() <= counted.items()


def test_a_worse_row_is_found():
    row = DEFAULTS[0]
    assert not resources.worse([row], ROWS)
    assert resources.worse([replace(row, stack=row.stack + 8)], ROWS)
    assert resources.worse([replace(row, mma=row.mma - 1)], ROWS)
    assert resources.worse([replace(row, registers=row.registers + 1)], ROWS)
    assert resources.worse([replace(row, programs=row.programs - 1)], ROWS)
    assert resources.worse([replace(row, instructions=row.instructions + 1)], ROWS)
    assert not resources.worse([replace(row, instructions=row.instructions - 1)], ROWS)
    assert resources.worse([row], [])


def test_compiling_again_is_no_worse():
    """Four configurations on one target, in a process without the interpreter."""
    version = ".".join(metadata.version("triton").split(".")[:2])
    if not resources.table_of(version).is_file():
        pytest.skip(f"no table of Triton {version} to compare with")
    code = (
        "import json\n"
        "from vglann_kernels import bounds, resources, sass\n"
        "from vglann_kernels.configurations import configurations\n"
        "names = ('laplacian binomial bf16 64x64', 'latent_adam step sparse sphere', 'nearest scan d=100',\n"
        "         'step_guard 15 rows')\n"
        "if __name__ == '__main__':\n"
        "    table = resources.table_of(resources.triton_version())\n"
        "    for name in names:\n"
        "        (c,) = [c for c in configurations(90) if f'{c.op} {c.name}' == name]\n"
        "        row, text = resources.compile_one(c, 90)\n"
        "        limits = bounds.bounds_of(c, '90', text, row.programs)\n"
        "        print(row, limits)\n"
        "        assert not resources.worse([row], resources.read_table(table)[1])\n"
        "        assert not bounds.worse([limits], bounds.read(table))\n"
        "        if name.startswith('laplacian'):\n"
        "            code = [(i.opcode, i.operands, i.stall) for i in sass.instructions_of(text)]\n"
        "            print('sums', json.dumps(code))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (code,) = (line for line in done.stdout.splitlines() if line.startswith("sums "))
    waits = waits_for_a_float(json.loads(code.removeprefix("sums ")))
    # The result of a float32 sum or product is ready after 4 cycles: no wait is shorter, and many are as long.
    assert min(waits) == 4
    assert waits.count(4) > 100


def waits_for_a_float(code):
    """Return the cycles between a float32 sum or product and the next one that reads it, in straight code."""
    waits, ready, clock = [], {}, 0
    for opcode, operands, stall in code:
        written, *read = re.findall(r"\bR\d+", operands) or [""]
        if opcode.split(".")[0] in ("FADD", "FFMA", "FMUL"):
            waits += [clock - ready.pop(register) for register in set(read) if register in ready]
            ready[written] = clock
        elif opcode.startswith(("BRA", "CALL", "RET", "EXIT", "BSYNC")):
            ready.clear()
        else:
            # Anything else may write it, too.
            ready = {register: time for register, time in ready.items() if register != written}
        clock += stall
    return waits


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("90", 178, 24_576, 4, 2),
        ("90", 168, 24_576, 4, 3),
        ("89", 40, 0, 4, 12),
        ("89", 235, 24_576, 4, 2),
        ("86", 32, 0, 1, 16),
        ("90", 64, 100_000, 4, 2),
        ("75", 255, 0, 8, 1),
        ("90", 106, 2048, 2, 8),
    ],
)
def test_programs_at_once(target, registers, shared, warps, programs):
    """By NVIDIA's occupancy calculator: registers of a quarter in 256 a warp, shared memory with 1 KB beside it."""
    assert resources.programs_at_once(target, registers, shared, warps) == programs


def test_every_committed_table_is_of_these_kernels():
    tables = sorted(resources.FOLDER.glob("RESOURCES*.md"))
    assert resources.DEFAULT_TABLE in tables
    for path in tables:
        stamp, rows = resources.read_table(path)
        assert resources.source_hash() in stamp, path
        version = stamp.split()[1].strip(",").rpartition(".")[0]
        assert resources.table_of(version) == path
        expected = [(c.op, c.name, str(t)) for t in resources.targets_of(version) for c in configurations(t)]
        assert sorted((row.op, row.configuration, row.target) for row in rows) == sorted(expected)


def test_a_table_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resources.main(["--check", "--out", str(tmp_path / "none.md")]) == 2
    assert "none.md does not exist; write it first, without --check" in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
