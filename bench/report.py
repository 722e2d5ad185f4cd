"""Benchmark JSON to Markdown tables: `python bench/report.py FILE.json ... [--plot PLOT.png]`.

Reads extra_info only. The plot, which needs matplotlib, has a bar for each contender: how many times faster than the
eager reference, in the same run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def groups(path: Path) -> dict[str, dict[str, Any]]:
    """Name of a benchmark -> its extra_info, for those of a pytest-benchmark file that timed a group."""
    found = {b["name"]: b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]}
    return {name: info for name, info in found.items() if "rows" in info and "floor_bytes" in info}


def table(name: str, info: dict[str, Any]) -> str:
    """One Markdown table; a contender that could not run says why."""
    clocks = info["clocks"]
    seen = clocks.get("not_sampled") or (
        f"SM {clocks['sm_mhz'][0]} to {clocks['sm_mhz'][1]} MHz, throttle reasons: "
        f"{', '.join(clocks['throttle_reasons']) or 'none'}"
    )
    lines = [
        f"### {name}\n",
        f"{info['device']}, torch {info['torch']}, {info['dtype']}; floor {info['floor_bytes'] / 1e6:.2f} MB; "
        f"copy {info['copy_gb_per_s']:.0f} GB/s, matrix product {info['matmul_tflop_per_s']:.3g} TFLOP/s; "
        f"L2 {info['l2']}; clocks: {seen}\n",
        "| contender | ms | over reference | GB/s of the floor | share of copy | share of matmul | timing |",
        "|---|---|---|---|---|---|---|",
    ]
    eager = info["rows"].get("reference", {}).get("ms")
    for contender, row in info["rows"].items():
        if "cannot_run" in row:
            lines.append(f"| {contender} | {row['cannot_run']} | | | | | |")
            continue
        faster = f"{eager / row['ms']:.1f}x" if eager else ""
        product = f"{row['share_of_matmul']:.1%}" if "share_of_matmul" in row else ""
        lines.append(
            f"| {contender} | {row['ms']:.4f} | {faster} | {row['gb_per_s']:.0f} | {row['share_of_copy']:.0%} "
            f"| {product} | {row['timing']}, {row['calls']} calls |"
        )
    named = [(name, row["kernels"]) for name, row in info["rows"].items() if row.get("kernels")]
    lines += [""] * bool(named) + [f"- {name} ran {', '.join(kernels)}" for name, kernels in named]
    return "\n".join([*lines, ""])


def plot(found: dict[str, dict[str, Any]], out: Path) -> None:
    """Write a bar chart. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    bars = [
        (f"{name}  {contender}", info["rows"]["reference"]["ms"] / row["ms"], contender)
        for name, info in found.items()
        if "ms" in info["rows"].get("reference", {})
        for contender, row in info["rows"].items()
        if "ms" in row and contender != "reference"
    ]
    colors = {name: f"C{i}" for i, name in enumerate(sorted({bar[2] for bar in bars}))}
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh([b[0] for b in bars], [b[1] for b in bars], color=[colors[b[2]] for b in bars])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times faster than the eager reference")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    devices = sorted({info["device"] for info in found.values()})
    axes.set_title(", ".join(devices), fontsize=9)
    figure.savefig(out, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args(arguments)
    found = {name: info for path in a.files for name, info in groups(path).items()}
    print("\n".join(table(name, info) for name, info in found.items()))
    if a.plot:
        try:
            plot(found, a.plot)
        except ImportError:
            print("report: --plot needs matplotlib: pip install matplotlib", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
