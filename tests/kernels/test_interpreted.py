"""Run every Triton kernel in its interpreter on the CPU: each file of interpreted/ in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so the tests of a kernel cannot share a process with others.
Not shown here: bfloat16, whose products and rounding the interpreter does not compute right; a GPU shows it
(`python -m vglann_kernels.verify`).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vglann_kernels.impl import OPS

FILES = sorted((Path(__file__).parent / "interpreted").glob("*.py"))


def interpret(path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VGLANN_KERNELS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def interpreted(request):
    """The future output of each file that is asked for; two run at a time."""
    tests = [
        item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")
    ]
    wanted = {item.callspec.params["path"] for item in tests}
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(interpret, path) for path in FILES if path in wanted}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path, interpreted):
    done = interpreted[path].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_op_with_a_kernel_is_interpreted():
    assert {path.stem for path in FILES} >= set(OPS)
