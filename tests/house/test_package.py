"""The distribution: what the wheel holds, and what pytest collects from the root."""

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from forked_process import Forked

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    # With the setuptools of the extra `test`: an environment of its own would be fetched from the network.
    subprocess.run([*command, "--no-build-isolation"], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_both_packages_the_template_and_the_notes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "vglann_fast/py.typed",
        "vglann_fast/report/templates/page.html",
        "vglann_kernels/py.typed",
        "vglann_kernels/laplacian/README.md",
    ):
        assert name in names
    assert not any(name.split("/")[0] in ("tests", "bench", "kernels") for name in names)


def test_wheel_is_pure_and_pins_no_torch(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    required = re.findall(
        r"^Requires-Dist: (torch\b.*)$", archive.read(metadata).decode(), flags=re.MULTILINE
    )
    assert required == ["torch>=2.10"]


def test_wheel_imports_in_an_empty_environment(wheel, tmp_path):
    """Both packages import outside the checkout with nothing else installed, not even torch."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = "import vglann_fast, vglann_kernels; print(vglann_fast.__version__, vglann_fast.__file__)"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    version, path = done.stdout.split()
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert path.startswith(str(tmp_path))


def test_the_citation_names_the_paper_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    bibtex = (ROOT / "README.md").read_text().partition("```bibtex")[2].partition("```")[0]
    assert f"{{{paper['title']}}}" in bibtex
    assert all(f"{author['family-names']}, {author['given-names']}" in bibtex for author in paper["authors"])


# pytest-benchmark refuses to time anything inside a worker of pytest-xdist.
COLLECT = """
import os, sys, pytest
os.chdir(sys.argv[1])
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
    del os.environ[name]
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("flags", "wanted", "unwanted"), [([], "tests/", "bench/"), (["--benchmark-only"], "bench/", "tests/")]
)
def test_pytest_collects_tests_or_benchmarks(flags, wanted, unwanted, tmp_path):
    # A few of the tests: importing all of them is what pytest does anyway. All benchmarks: nothing else does.
    few = ["--ignore-glob", "*/test_[!ab]*.py"]
    process = Forked(COLLECT, [str(ROOT), "--collect-only", *few, *flags], tmp_path / "said.txt")
    assert process.wait(120) == 0, process.said()
    collected = [line for line in process.said().splitlines() if "::" in line]
    assert collected
    assert all(line.startswith(wanted) and not line.startswith(unwanted) for line in collected)
