"""No test has a network, nor has any Python process it starts: only this machine can be reached.

Python processes that tests start find the modules in fixtures/, as the tests do.
"""

import os
import runpy
from pathlib import Path

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures"
NO_NETWORK = FIXTURES / "no_network"

runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))
folders = [str(folder) for folder in (NO_NETWORK, TESTS, FIXTURES)]
os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
