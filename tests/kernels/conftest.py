"""Runs each file of interpreted/ in a process of its own, where Triton interprets the kernels on the CPU.

Triton reads TRITON_INTERPRET when it is imported, so the tests of a kernel cannot share a process with others.
Each file is one test here, so the workers of `make test` share the files. None shows bfloat16, whose products
and rounding the interpreter does not compute right; `python -m vglann_kernels.proof` does, by the compiler's IR.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "interpreted"
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


# Reads the path of a file of tests and where to write what they say, runs them in a process forked for it, and
# writes its exit code: importing torch and Triton for each would take as long as many of the tests.
SERVER = """
import gc, os, signal, sys, pytest, torch._dynamo, torch.testing._internal.optests, vglann_kernels.verify
# What is loaded here stays: no collection of a process forked from this one looks at it.
gc.freeze()
for line in sys.stdin:
    path, log = line.rstrip("\\n").split("\\t")
    process = os.fork()
    if process == 0:
        signal.alarm(600)
        with open(log, "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", path])
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@cache
def server() -> subprocess.Popen:
    """Start what interprets; it ends when this process does."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VGLANN_KERNELS", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)


class Interpreted(pytest.Item):
    """The tests of one file, in a process of their own."""

    def runtest(self) -> None:
        with tempfile.NamedTemporaryFile("r", suffix=".txt") as log:
            server().stdin.write(f"{self.path}\t{log.name}\n")
            code = server().stdout.readline().strip()
            assert code == "0", log.read()[-8000:]


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
    time restores them when the launch ends; the scopes of other times have no use.
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


def broadcast_only_what_differs_in_shape() -> None:
    """A sixth of what is left: Triton compares equal shapes, value by value, for each operation."""
    from triton.language.semantic import TritonSemantic

    broadcast = getattr(TritonSemantic, "broadcast_impl_value", None)
    if broadcast is None:
        return

    def differing(semantic, left, right):
        if left.type.is_block() and right.type.is_block() and [*left.type.shape] == [*right.type.shape]:
            return left, right
        return broadcast(semantic, left, right)

    TritonSemantic.broadcast_impl_value = differing


if INTERPRETS:
    patch_the_language_once_a_launch()
    broadcast_only_what_differs_in_shape()
