"""docs/cases.md: every test that the table of situations names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def functions_in(file):
    """The names of the test functions of a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_situation_names_tests_that_exist():
    rows = [row for row in (ROOT / "docs" / "cases.md").read_text().splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 28
    for row in rows:
        named = NAMED.findall(row)
        assert named, row
        for file, name in named:
            assert name in functions_in(file), f"{file}::{name}"


def test_the_page_of_faults_leads_to_the_situations():
    assert "(cases.md)" in (ROOT / "docs" / "faults.md").read_text()
