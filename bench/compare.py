"""Compare two benchmark files: `python bench/compare.py OLD.json NEW.json`.

Compares ratios within a run (the reference's time over the contender's), never times of different runs. Exits with 1
when a ratio fell by more than 10 %, or a contender that ran no longer does.
"""

import json
import sys
from pathlib import Path


def ratios(path: Path) -> dict[tuple[str, str], float]:
    """(benchmark, contender) -> reference's milliseconds over the contender's."""
    found = {}
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        rows = benchmark["extra_info"].get("rows", {})
        if "ms" not in rows.get("reference", {}):
            continue
        for name, row in rows.items():
            if "ms" in row and name != "reference":
                found[benchmark["name"], name] = rows["reference"]["ms"] / row["ms"]
    return found


def fallen(
    old: dict[tuple[str, str], float], new: dict[tuple[str, str], float], share: float = 0.1
) -> list[str]:
    """A line for each ratio that is missing or more than `share` lower."""
    lines = []
    for key, before in old.items():
        now = new.get(key)
        if now is None or now < (1 - share) * before:
            lines.append(f"{key[0]} {key[1]}: {before:.2f} -> {'gone' if now is None else f'{now:.2f}'}")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    worse = fallen(*(ratios(Path(name)) for name in sys.argv[1:]))
    print("\n".join(worse) or "no ratio fell by more than 10 %")
    sys.exit(1 if worse else 0)
