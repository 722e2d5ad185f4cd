"""Benchmark results to Markdown tables: `python bench/report.py FILE ... [--fill [ROOT]] [--plot PLOT.png]`.

A FILE.json is of pytest-benchmark (extra_info only is read). A FILE.jsonl has one result a line, as bench/on_gpu.sh
writes them: {"group", "device", "torch", "triton", "rows": {contender: {"ms", ...} or {"cannot_run"} or {"failed"}}}.

--fill writes the figures into docs/step.md and the READMEs of the kernels under ROOT (default: this repository),
between the lines `<!-- measured -->` and `<!-- end of measured -->`. There the first cell of a row names a group. A
column headed by a contender gets its time, "times" the first contender's time over the last one's, "share of copy"
what the last one reaches of the bandwidth of a copy. Columns headed by a word in FIXED stay. What the files have no
figure for is "not measured", and results without a GPU are not figures.

The plot, which needs matplotlib, has a bar for each contender: how many times faster than the eager reference, in the
same run.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

START, END = "<!-- measured -->", "<!-- end of measured -->"
NOT_MEASURED = "not measured"
# Headings of columns that are not times of a contender, and beginnings of headings whose columns stay.
FIGURES, FIXED = ("times", "share of copy"), ("floor", "what")
# Documents that are filled.
FILLED = ("kernels/README.md", "docs/step.md", "kernels/vglann_kernels/*/README.md")


def groups(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Name of a group -> its result. Rows of one group, which may be in several lines and files, are joined."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for name, info in results(path):
            rows = found.get(name, {}).get("rows", {})
            found[name] = info | {"rows": rows | info.get("rows", {})}
    return found


def results(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and result of each group in a file."""
    if path.suffix != ".jsonl":
        for benchmark in json.loads(path.read_text())["benchmarks"]:
            if "rows" in benchmark["extra_info"]:
                yield benchmark["name"], benchmark["extra_info"]
        return
    for line in path.read_text().splitlines():
        try:
            info = json.loads(line)
        except ValueError:  # cut off where the writer was killed
            continue
        yield info["group"], info


def table(name: str, info: dict[str, Any]) -> str:
    """One Markdown table; a contender that could not run says why."""
    if "floor_bytes" not in info:
        return plain_table(name, info)
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
        if "ms" not in row:
            lines.append(f"| {contender} | {row.get('cannot_run') or row['failed']} | | | | | |")
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


def plain_table(name: str, info: dict[str, Any]) -> str:
    """One Markdown table of times alone: of a step, of a search, of a group that failed."""
    lines = [f"### {name}\n", f"{info['device']}, torch {info['torch']}\n"]
    if "failed" in info:
        return "\n".join([*lines, f"failed: {info['failed']}\n"])
    lines += ["| contender | ms |", "|---|---|"]
    for contender, row in info["rows"].items():
        value = f"{row['ms']:.4f}" if "ms" in row else row.get("cannot_run") or row["failed"]
        lines.append(f"| {contender} | {value} |")
    return "\n".join([*lines, ""])


def fill(text: str, found: dict[str, dict[str, Any]]) -> str:
    """Return a document with the measured columns between its markers written from the results."""
    parts = text.split(START)
    for number, part in enumerate(parts[1:], 1):
        inside, end, after = part.partition(END)
        if not end:
            raise ValueError(f"a line {START} without a line {END}")
        parts[number] = filled_block(inside, found) + END + after
    return START.join(parts)


def filled_block(block: str, found: dict[str, dict[str, Any]]) -> str:
    """Return what stands between two markers: a line that says where it was measured, and the table."""
    header: list[str] = []
    rows, seen = [], []
    for line in block.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if header and not set(line) <= set("|-: "):
            info = found.get(cells[0].strip("`"), {})
            on_gpu = not info.get("device", "CPU").startswith("CPU")
            seen += [info] * (on_gpu and "failed" not in info)
            cells = filled_row(header, cells, info if on_gpu else {})
            line = f"| {' | '.join(cells)} |"
        header = header or cells
        rows.append(line)
    conditions = {
        f"{info['device']}, torch {info['torch']}, Triton {info.get('triton', 'unknown')}" for info in seen
    }
    where = f"Measured on {'; '.join(sorted(conditions))}." if conditions else "No GPU has measured this yet."
    return "\n".join(["", "", where, "", *rows, "", ""])


def filled_row(header: list[str], cells: list[str], info: dict[str, Any]) -> list[str]:
    """Return the cells of one row; a column in FIXED, or the first one, stays."""
    rows = info.get("rows", {})
    contenders = [title for title in header[1:] if title not in FIGURES and not title.startswith(FIXED)]
    times = [rows.get(title, {}).get("ms") for title in contenders]
    first, last = times[0], times[-1]
    out = cells[:1]
    for title, old in zip(header[1:], [*cells[1:], *[""] * len(header)], strict=False):
        if title == "times":
            out.append(f"{first / last:.2f}x" if first and last else NOT_MEASURED)
        elif title == "share of copy":
            share = rows.get(contenders[-1], {}).get("share_of_copy")
            out.append(NOT_MEASURED if share is None else f"{share:.0%}")
        elif title in contenders:
            out.append(cell(rows.get(title, {}), info))
        else:
            out.append(old)
    return out


def cell(row: dict[str, Any], info: dict[str, Any]) -> str:
    """Return a time with three digits and its unit, or "failed", or "not measured"."""
    if "failed" in row or "failed" in info:
        return "failed"
    if "ms" not in row:
        return NOT_MEASURED
    return f"{1e3 * row['ms']:.3g} µs" if row["ms"] < 0.9995 else f"{row['ms']:.3g} ms"


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
    parser.add_argument("--fill", type=Path, nargs="?", const=Path(__file__).parents[1], metavar="ROOT")
    a = parser.parse_args(arguments)
    found = groups(a.files)
    print("\n".join(table(name, info) for name, info in found.items()))
    if a.fill:
        for path in sorted(path for pattern in FILLED for path in a.fill.glob(pattern)):
            text = path.read_text()
            if START in text:
                path.write_text(fill(text, found))
                print(f"filled {path}", file=sys.stderr)
    if a.plot:
        try:
            plot(found, a.plot)
        except ImportError:
            print("report: --plot needs matplotlib: pip install matplotlib", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
