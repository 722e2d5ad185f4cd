"""No test has a network, nor has any Python process it starts: only this machine can be reached."""

import os
import runpy
from pathlib import Path

FOLDER = Path(__file__).parent / "no_network"

runpy.run_path(str(FOLDER / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
