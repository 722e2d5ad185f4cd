"""The rules of the house that a machine can check: what imports what, what is heavy, how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vglann_fast"
KERNELS = ROOT / "kernels" / "vglann_kernels"

ROUTE = ["clips", "glo", "mapping", "samples", "metrics", "report"]
LEAVES = {
    "nets",
    "config",
    "options",
    "mapping_options",
    "errors",
    "atomic",
    "progress",
    "run_dir",
    "environment",
    "__init__",
}


def imported_modules(path):
    """Dotted names of everything a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def parts_used(path):
    """The folders or modules right under vglann_fast that a file imports."""
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("vglann_fast.")}


def python_files(folder):
    files = sorted(folder.rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("stage", ROUTE)
def test_a_stage_imports_only_the_stages_before_it(stage):
    allowed = set(ROUTE[: ROUTE.index(stage) + 1]) | LEAVES | {"__version__"}
    for path in python_files(PACKAGE / stage):
        assert parts_used(path) <= allowed, path


def test_only_the_command_line_imports_the_checkpoints_of_others():
    for path in python_files(PACKAGE):
        if "interop" not in path.parts and path != PACKAGE / "verbs.py":
            assert "interop" not in parts_used(path), path
    for path in python_files(PACKAGE / "interop"):
        assert parts_used(path) <= {"interop", "nets", "glo"} | LEAVES, path


def test_leaves_import_no_stage():
    for name in LEAVES - {"nets"}:
        assert not parts_used(PACKAGE / f"{name}.py") & {*ROUTE, "interop", "cli", "verbs"}, name
    for path in python_files(PACKAGE / "nets"):
        assert parts_used(path) <= LEAVES, path


def test_kernels_import_nothing_of_the_product():
    for path in python_files(KERNELS):
        assert not any(name.split(".")[0] == "vglann_fast" for name in imported_modules(path)), path


def test_only_kernel_files_import_triton():
    for path in python_files(KERNELS) + python_files(PACKAGE):
        if path.name not in ("kernel.py", "launch.py", "resources.py"):
            assert not any(name.split(".")[0] == "triton" for name in imported_modules(path)), path


def test_every_op_has_its_four_files_and_its_test():
    ops = [folder for folder in KERNELS.iterdir() if (folder / "op.py").is_file()]
    assert len(ops) >= 4
    for op in ops:
        for name in ("README.md", "reference.py", "kernel.py", "op.py"):
            assert (op / name).is_file(), op / name
        assert (ROOT / "tests" / f"test_{op.name}.py").is_file(), op.name
        assert (ROOT / "bench" / f"bench_{op.name}.py").is_file(), op.name


def test_no_file_over_400_lines():
    for folder in (PACKAGE, KERNELS, ROOT / "tests", ROOT / "bench"):
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_no_pickle():
    for path in python_files(PACKAGE) + python_files(KERNELS):
        names = imported_modules(path)
        assert not names & {"pickle", "shelve", "marshal", "dill", "joblib"}, path
        # Checkpoints of others are pickles; they are read, without running what is in them, in one place.
        text = path.read_text()
        if path.parent == PACKAGE / "interop":
            text = re.sub(r"torch\.load\([^()]*weights_only=True\)", "", text)
        assert "torch.load(" not in text, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vglann_fast", ["torch", "triton", "faiss", "av", "cv2", "matplotlib", "numpy"]),
        ("vglann_kernels", ["torch", "triton", "faiss"]),
        ("vglann_fast.glo.train", ["faiss", "av", "cv2", "matplotlib", "jinja2", "jsonargparse", "scipy"]),
        ("vglann_fast.mapping.imle", ["faiss", "av", "cv2", "matplotlib", "jinja2", "jsonargparse"]),
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
