"""Hook of MkDocs: collect the pages of the site from the whole repository, and make its references.

Every document is a page at its own path, and so its relative links hold. The references of Python names are made from
`__all__` of both packages. A public name without a docstring is an error.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("*.md", "LICENSE", "CITATION.cff", "docs/*.*", "docs/guides/*.md", "kernels/**/*.md")
LEFT_OUT = ("docs/mkdocs.yml",)
HEADS = {
    "vglann_fast": """# Python

`import vglann_fast as vf` imports each name when it is first used. `vglann train --help` lists the options of
`vf.train`, and `vglann map --help` the options of `Run.fit_mapping`.
""",
    "vglann_kernels": """# Kernel functions

Every op takes `impl`: "auto", "triton" or "reference". `vglann_kernels.use_impl` sets it for the process.
""",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of `docs_dir` with the documents of the repository and the generated pages."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if name not in LEFT_OUT:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    references = {
        "reference/python.md": _reference("vglann_fast"),
        "reference/kernels.md": _reference("vglann_kernels"),
        "docs/tutorial.md": _tutorial(ROOT / "docs" / "tutorial.ipynb"),
    }
    for name, content in references.items():
        files.append(File.generated(config, name, content=content))
    return files


def _tutorial(notebook: Path) -> str:
    """Return a page of a notebook's text and code. Its outputs are not in the repository."""
    cells = [
        (cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]
    ]
    texts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells]
    head, *rest = texts
    return "\n\n".join([head, f"[Download the notebook]({notebook.name}).", *rest]) + "\n"


def _reference(package: str) -> str:
    """Return the page of a package's public names. Raises `PluginError` for a name without a docstring."""
    names = _public(package)
    module: Any = griffe.load(package, search_paths=[ROOT, ROOT / "kernels"], resolve_aliases=True)
    bare = [path for name in names for path in _undocumented(module[name])]
    if bare:
        raise PluginError(f"no docstring: {', '.join(bare)}")
    return HEADS[package] + "".join(f"\n::: {package}.{name}\n" for name in names)


def _public(package: str) -> list[str]:
    """Return the public names of a package, without its version. Importing it loads neither torch nor NumPy."""
    return [name for name in import_module(package).__all__ if not name.startswith("_")]


def _undocumented(item: Any) -> Iterator[str]:
    """Yield the paths of a function or class, and of its public methods, that have no docstring."""
    target = item.final_target if item.is_alias else item
    if not target.has_docstring:
        yield target.path
    if target.is_class:
        for name, member in target.members.items():
            if member.is_function and not name.startswith("_") and not member.has_docstring:
                yield member.path
