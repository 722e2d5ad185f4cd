"""The rules of the house that a machine can check: what imports what, what is heavy, how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vglann_fast"
KERNELS = ROOT / "kernels" / "vglann_kernels"

# Every room of the package, in the order of the walk: a room imports rooms before it, never one after it.
ROOMS = [
    "errors",
    "progress",
    "options",
    "run",
    "runtime",
    "nets",
    "clips",
    "glo",
    "mapping",
    "samples",
    "metrics",
    "report",
    "study",
    "interop",
    "diagnostics",
    "experiments",
    "interface",
    "cli",
]
# Rooms that only some later rooms may enter.
VISITORS = {
    "interop": {"experiments", "cli"},
    "study": {"cli"},
    "diagnostics": {"cli"},
    "experiments": {"cli"},
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


def room_of(path):
    """The folder or module right under vglann_fast that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_used(path):
    """The rooms that a file imports."""
    names = {name.split(".")[1] for name in imported_modules(path) if name.startswith("vglann_fast.")}
    return names & {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def python_files(folder):
    files = sorted(folder.rglob("*.py"))
    assert files
    return files


def test_every_folder_is_a_room_with_a_place_in_the_order():
    entries = {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}
    assert entries - {"__init__", "__main__", "__pycache__", "py", "py.typed"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_before_it(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in python_files(PACKAGE):
        if room_of(path) == room:
            assert rooms_used(path) <= allowed, path


@pytest.mark.parametrize("room", VISITORS)
def test_a_side_room_is_entered_by_few(room):
    for path in python_files(PACKAGE):
        if room in rooms_used(path):
            assert room_of(path) in {room, *VISITORS[room]}, path


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_name(path): path for path in python_files(PACKAGE)}
    uses = {name: imported_modules(path) & modules.keys() for name, path in modules.items()}
    # Remove modules that import nothing that is left; what stays is a circle or imports one.
    while free := [name for name, used in uses.items() if not used]:
        uses = {name: used.difference(free) for name, used in uses.items() if name not in free}
    assert not uses


def test_the_package_imports_neither_benchmarks_nor_tests():
    outside = {path.stem for folder in ("bench", "tests") for path in (ROOT / folder).rglob("*.py")}
    inside = {path.stem for path in python_files(PACKAGE)}
    for path in python_files(PACKAGE):
        tops = {name.split(".")[0] for name in imported_modules(path)}
        assert not tops & ({"bench", "tests", "pytest"} | (outside - inside - {"conftest"})), path


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not any(name.split(".")[-1].startswith("test_") for name in imported_modules(path)), path


def test_kernels_import_nothing_of_the_product():
    for path in python_files(KERNELS):
        assert not any(name.split(".")[0] == "vglann_fast" for name in imported_modules(path)), path


TRITON_FILES = ("kernel.py", "stencil.py", "weight_gradient.py", "matrices.py", "launch.py", "resources.py")


def test_only_kernel_files_import_triton():
    for path in python_files(KERNELS) + python_files(PACKAGE):
        if path.name not in TRITON_FILES:
            assert not any(name.split(".")[0] == "triton" for name in imported_modules(path)), path


def test_every_op_has_its_four_files_and_its_test():
    ops = [folder for folder in KERNELS.iterdir() if (folder / "op.py").is_file()]
    assert len(ops) >= 4
    for op in ops:
        for name in ("README.md", "reference.py", "kernel.py", "op.py"):
            assert (op / name).is_file(), op / name
        assert (ROOT / "tests" / "kernels" / f"test_{op.name}.py").is_file(), op.name
        bench = ROOT / "bench" / f"bench_{op.name}.py"
        assert bench.is_file(), op.name
        # A group of `pytest --benchmark-only`.
        assert re.search(r"^def test_\w+\(benchmark\b", bench.read_text(), re.MULTILINE), op.name


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
        ("vglann_fast.glo.train", ["faiss", "av", "cv2", "matplotlib", "jinja2", "scipy", "yaml"]),
        ("vglann_fast.mapping.imle", ["faiss", "av", "cv2", "matplotlib", "jinja2", "yaml"]),
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
