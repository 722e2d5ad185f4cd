"""The committed table of registers, stack and shared memory: complete, current, within its limits."""

import os
import subprocess
import sys

import pytest
from vglann_kernels import resources

STAMP, ROWS = resources.read_table()
CONFIGURATIONS = [(c.op, c.name) for c in resources.configurations()]
# bfloat16 planes of 64x64 are what both presets train on
DEFAULTS = [row for row in ROWS if "64x64" in row.configuration and "bf16" in row.configuration]


def test_the_table_is_of_these_kernels():
    assert resources.source_hash() in STAMP, "run: python -m vglann_kernels.resources"


def test_the_table_is_complete():
    assert len(CONFIGURATIONS) <= 24
    assert len(set(CONFIGURATIONS)) == len(CONFIGURATIONS)
    for target in map(str, resources.TARGETS):
        assert [(r.op, r.configuration) for r in ROWS if r.target == target] == CONFIGURATIONS


def test_informational_targets_are_there_but_for_the_largest_planes():
    expected = [c for c in CONFIGURATIONS if resources.TOO_LARGE not in c[1]]
    for target in map(str, resources.INFORMATIONAL):
        assert [(r.op, r.configuration) for r in ROWS if r.target == target] == expected


@pytest.mark.parametrize(("targets", "limit"), [(("90", "100"), 0), (("80", "86", "89", "120"), 64)])
def test_the_defaults_do_not_spill(targets, limit):
    rows = [row for row in DEFAULTS if row.target in targets]
    assert len(rows) == 4 * len(targets)
    for row in rows:
        assert row.stack <= limit, row


def test_shared_memory_fits_consumer_cards():
    for row in ROWS:
        if row.target in ("86", "89", "120"):
            assert row.shared <= 99 * 1024, row


def test_a_worse_row_is_found():
    row = DEFAULTS[0]
    worse = resources.Row(
        row.op, row.configuration, row.target, row.registers, row.stack + 8, row.shared, row.warps
    )
    assert not resources.worse([row], ROWS)
    assert resources.worse([worse], ROWS)
    assert resources.worse([row], [])


def test_compiling_again_is_no_worse():
    """Two configurations on the target the issue measures, in a process without the interpreter."""
    code = (
        "from vglann_kernels import resources\n"
        "if __name__ == '__main__':\n"
        "    for name in ('laplacian binomial bf16 64x64', 'latent_adam step row sphere'):\n"
        "        (c,) = [c for c in resources.configurations() if f'{c.op} {c.name}' == name]\n"
        "        print(resources.compile_one(c, 90))\n"
        "        assert not resources.worse([resources.compile_one(c, 90)], resources.read_table()[1])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
