"""The hash of what decides the launches of an op, by which `proof` and `resources` know a table of other sources."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path


def sources(op: str, folder: Path = Path(__file__).parent) -> str:
    """Return the sha256 (8 digits) of what decides the launches of an op.

    That is `launch.py` and all modules of the op, and of the ops that they import, except the references.
    """
    folders, known = [op], set()
    digest = hashlib.sha256((folder / "launch.py").read_bytes())
    while folders:
        name = folders.pop()
        known.add(name)
        for path in sorted((folder / name).glob("*.py")):
            if path.name != "reference.py":
                text = path.read_text()
                digest.update(text.encode())
                # Modules beside the folders have no modules of their own.
                imported = re.findall(r"^from \.\.(\w+)", text, re.MULTILINE)
                folders += sorted(set(imported) - known - set(folders))
    return digest.hexdigest()[:8]
