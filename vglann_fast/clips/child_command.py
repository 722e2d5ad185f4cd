"""The command that starts a decoding process, see `decode_child.py`."""

import os
import sys
from pathlib import Path

import vglann_fast

# The child finds modules where this process does, however its sys.path came about, and this very package, wherever
# else there may be a folder of its name. Nothing is imported from files before its sys.path is set.
_START = """
import sys
memory_mb, seconds, package, *sys.path = sys.argv[1:]
try:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    spec = PathFinder.find_spec("vglann_fast", [package])
    sys.modules["vglann_fast"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    from vglann_fast.clips.decode_child import main
except (Exception, SystemExit) as error:
    print(ascii(error))
    sys.exit(1)
main(int(memory_mb), int(seconds))
"""


def child_command(memory_mb: int, seconds: int) -> list[str]:
    """Return the command of a child that may take so much memory, and so many seconds for a file."""
    return [*_interpreter(), "-c", _START, str(memory_mb), str(seconds), *_module_path()]


def _interpreter() -> list[str]:
    """This Python, told to look for modules where this one was told to, but never in the current folder first."""
    flags = [sys.executable, "-P", "-X", f"utf8={sys.flags.utf8_mode}"]
    given = {"-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site, "-S": sys.flags.no_site}
    return flags + [flag for flag, is_given in given.items() if is_given]


def _module_path() -> list[str]:
    """Return the folder of this package, then the import path with the current folder last, so that a json.py in
    it stays what it is to a program that has imported json before.
    """
    package = Path(vglann_fast.__file__).parent.parent
    # Import passes over anything but strings, such as pathlib.Path; a null character cannot be an argument.
    entries = [entry for entry in sys.path if isinstance(entry, str) and "\0" not in entry]
    here = os.path.realpath(os.curdir)
    return [str(package), *sorted(entries, key=lambda entry: os.path.realpath(entry) == here)]
