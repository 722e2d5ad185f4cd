"""The documents and the site made of them: links, pages, and docstrings of public names."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docs" / "mkdocs.yml"
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")]


def pages(navigation):
    """The paths in a navigation of MkDocs, at any depth."""
    for entry in navigation:
        ((_, target),) = entry.items()
        yield from [target] if isinstance(target, str) else pages(target)


def anchors(document):
    """The anchors of a document's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_document_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        name, _, anchor = link.partition("#")
        if not re.match(r"https?:", link):
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_document_is_a_page_of_the_site():
    named = list(pages(yaml.safe_load(CONFIG.read_text())["nav"]))
    assert len(named) == len(set(named))
    made = {"reference/python.md", "reference/kernels.md", "docs/tutorial.md"}
    assert made <= set(named)
    assert set(named) - made == {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}


@pytest.mark.parametrize("package", ["vglann_fast", "vglann_kernels"])
def test_every_public_name_is_documented(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        item = getattr(module, name)
        if isinstance(item, str):
            continue
        # A dataclass without a docstring shows its signature in its place.
        assert not (item.__doc__ or f"{name}(").startswith(f"{name}("), name
        if inspect.isclass(item) and item.__module__.startswith("vglann"):
            for member, value in vars(item).items():
                documented = member.startswith("_") or not inspect.isfunction(value) or value.__doc__
                assert documented, f"{name}.{member}"


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs MkDocs: pip install -e '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        str(CONFIG),
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "reference" / "python.html").read_text()
    for name in ("vglann_fast.pack", "vglann_fast.Run.sample"):
        assert f'id="{name}"' in reference
