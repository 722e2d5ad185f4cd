"""Runs each file of interpreted/ in a process of its own, where Triton interprets the kernels on the CPU.

Triton reads TRITON_INTERPRET when it is imported, so the tests of a kernel cannot share a process with others.
Each file is one test here: with `--dist loadfile` the workers share them. Not shown by any: bfloat16, whose products
and rounding the interpreter does not compute right; a GPU shows it (`python -m vglann_kernels.verify`).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "interpreted"
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


class Interpreted(pytest.Item):
    """The tests of one file, in a process of their own."""

    def runtest(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("VGLANN_KERNELS", None)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(self.path)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


class InterpretedFile(pytest.File):
    """A file of interpreted/, not imported here."""

    def collect(self) -> Iterator[pytest.Item]:
        yield Interpreted.from_parent(self, name="interpreted")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """Take the files of interpreted/ as one test each, but in the process that interprets."""
    if INTERPRETS or module_path.parent != FOLDER:
        return None
    return InterpretedFile.from_parent(parent, path=module_path)


def patch_the_language_once_a_launch() -> None:
    """Half the time of a launch in the interpreter.

    Triton replaces the functions of `triton.language` when a launch begins and again whenever a kernel calls a
    function of its own, which changes nothing more and costs more than most functions do. The scope of the first
    time restores them when the launch ends; those of other times have no use.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, []

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        new = [module for module in (language, language.core) if module in modules and module not in patched]
        if not new:
            return None
        scope = patch(function)
        if not patched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.extend(new)
        return scope

    interpreter._patch_lang = patch_once


if INTERPRETS:
    patch_the_language_once_a_launch()
