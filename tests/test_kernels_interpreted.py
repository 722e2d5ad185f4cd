"""Run every Triton kernel in its interpreter on the CPU: tests/interpreted/, each file in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so the tests of a kernel cannot share a process with others.
Not shown here: bfloat16, whose products and rounding the interpreter does not compute right; a GPU shows it
(`python -m vglann_kernels.verify`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VGLANN_KERNELS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_op_with_a_kernel_is_interpreted():
    assert {path.stem for path in FILES} >= {"composite", "laplacian", "composite_laplacian", "latent_adam"}
