"""No test has a network, nor has any Python process it starts: only this machine can be reached. None reads what
`vglann tune` measured.

Python processes that tests start find the modules in fixtures/, as the tests do. Under pytest-xdist each worker, and
what it starts, computes on one thread: the workers share the machine.
"""

import gc
import os
import runpy
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures"
NO_NETWORK = FIXTURES / "no_network"

if "PYTEST_XDIST_WORKER" in os.environ:
    # OpenMP and BLAS read these when they are loaded, which is later.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}

# A full collection takes half a second in a process that has loaded PyTorch, and by default there are hundreds.
gc.set_threshold(20_000, 50, 50)

# What someone has measured on this machine must not decide what tests compute.
os.environ["VGLANN_TUNE"] = "off"

runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))
folders = [str(folder) for folder in (NO_NETWORK, TESTS, FIXTURES)]
os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A user's cache of its own, from which measurements are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VGLANN_TUNE")


@pytest.fixture
def one_thread():
    """Compute on one thread, as forked processes do: two threads sum in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
