"""Benchmark JSON to Markdown tables: `python bench/report.py FILE.json ...` (reads extra_info only)."""

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """One table per benchmark of a pytest-benchmark file; a contender that could not run says why."""
    parts = []
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        info = benchmark["extra_info"]
        if "rows" not in info or "floor_bytes" not in info:
            continue
        parts.append(f"### {benchmark['name']}\n\n{info['device']}, torch {info['torch']}\n")
        parts.append(
            "| contender | ms | GB/s of the floor's bytes | share of an in-run copy |\n|---|---|---|---|"
        )
        for name, row in info["rows"].items():
            if "cannot_run" in row:
                parts.append(f"| {name} | {row['cannot_run']} | | |")
            else:
                parts.append(
                    f"| {name} | {row['ms']:.3f} | {row['gb_per_s']:.0f} | {row['share_of_copy']:.0%} |"
                )
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n".join(table(Path(name)) for name in sys.argv[1:]))
