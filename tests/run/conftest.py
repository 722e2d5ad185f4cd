"""A folder for the tests that write folders a thousand times."""

import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def in_memory(tmp_path):
    """A new folder in memory, or on the disk of a machine without /dev/shm: a disk takes ms to remove a folder."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
