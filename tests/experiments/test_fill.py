"""`bench/report.py --fill`: the measured columns of the READMEs from results."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
report = importlib.util.module_from_spec(specification)
specification.loader.exec_module(report)

GPU = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"}


@pytest.fixture
def root(tmp_path):
    """A copy of the documents that are filled."""
    for pattern in report.FILLED:
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path


def filled(root, *lines):
    """Fill the copy from a file of these results; the text of every document by its path."""
    file = root / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.main([str(file), "--fill", str(root)]) == 0
    return {
        str(path.relative_to(root)): path.read_text()
        for pattern in report.FILLED
        for path in root.glob(pattern)
    }


def row_of(text, group):
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {group} |")]
    return [cell.strip() for cell in row.strip("| ").split("|")]


def loss(**rows):
    return {"group": "laplacian full 256", **GPU, "rows": rows}


def test_every_group_that_is_measured_has_a_row_and_every_row_a_group(root):
    """Names that differ between the documents and the programs would stay "not measured" for ever."""
    source = (ROOT / "bench" / "on_gpu.sh").read_text()
    rows = [
        line.strip("| ").split("|")[0].strip()
        for text in filled(root).values()
        for block in text.split(report.START)[1:]
        for line in block.split(report.END)[0].splitlines()
        if line.startswith("| ")
    ]
    kinds = {row.split()[0] for row in rows} - {"group"}
    losses = {"laplacian", "composite", "composite_laplacian"}
    assert kinds == losses | {"batchnorm_relu", "latent_adam", "nearest", "step", "step_guard"} | {
        "upsample_conv"
    }
    for row in rows:
        if row.startswith("nearest"):
            assert row.removeprefix("nearest ").rsplit(" ", 1)[0] in source
        if row.startswith("step"):
            assert f"--batch {row.split()[1]} " in source


def test_figures_reach_the_documents(root):
    texts = filled(
        root,
        loss(
            reference={"ms": 2.0},
            compile={"failed": "out of memory"},
            triton={"ms": 0.2, "share_of_copy": 0.6},
        ),
        {"group": "step 15", **GPU, "rows": {"author": {"ms": 21.3}}},
        {"group": "step 15", **GPU, "rows": {"bf16 kernels graph": {"ms": 1.02}}},
    )
    row = row_of(texts["kernels/vglann_kernels/laplacian/README.md"], "laplacian full 256")
    assert row == ["laplacian full 256", "117 µs", "2 ms", "failed", "200 µs", "10.00x", "60%"]
    assert row_of(texts["kernels/README.md"], "laplacian full 256")[2:] == ["2 ms", "200 µs", "10.00x"]
    step = texts["docs/step.md"]
    row = row_of(step, "step 15")
    assert row == ["step 15", "21.3 ms", *["not measured"] * 3, "1.02 ms", "20.88x"]
    assert "Measured on NVIDIA H200, torch 2.11.0, Triton 3.6.0." in step
    assert set(row_of(step, "step 256")[1:]) == {"not measured"}
    assert "Measured on" not in texts["kernels/vglann_kernels/composite/README.md"]


def test_rows_of_one_group_in_several_files_are_joined(root):
    first, second = root / "convolutions.jsonl", root / "step.jsonl"
    for file, name in ((first, "bf16 kernels convolutions graph"), (second, "bf16")):
        file.write_text(json.dumps({"group": "step 15", **GPU, "rows": {name: {"ms": 2.0}}}) + "\n")
    assert report.main([str(first), str(second), "--fill", str(root)]) == 0
    row = row_of((root / "docs" / "step.md").read_text(), "step 15")
    assert row[2:5] == ["2 ms", "not measured", "2 ms"]


def test_without_results_of_a_gpu_the_documents_are_as_they_were(root):
    before = filled(root)
    assert filled(root) == before
    on_cpu = loss(reference={"ms": 2.0}, triton={"ms": 0.2}) | {"device": "CPU (small shapes)"}
    assert filled(root, on_cpu) == before
    filled(root, loss(reference={"ms": 2.0}, triton={"ms": 0.2}))
    assert filled(root) == before


def test_a_group_that_failed_is_not_a_figure(root):
    failed = {"group": "laplacian full 256", **GPU, "failed": "AcceleratorError: illegal access"}
    texts = filled(root, failed)
    row = row_of(texts["kernels/vglann_kernels/laplacian/README.md"], "laplacian full 256")
    assert row[2:] == ["failed", "failed", "failed", "not measured", "not measured"]
    assert "Measured on" not in texts["kernels/vglann_kernels/laplacian/README.md"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path, capsys):
    file = tmp_path / "cut.jsonl"
    file.write_text(json.dumps(loss(triton={"ms": 0.2})) + '\n{"group": "step 15", "rows": {"au')
    assert report.main([str(file)]) == 0
    assert "| triton | 0.2000 |" in capsys.readouterr().out


def test_a_document_without_its_end_marker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="end of measured"):
        report.fill(f"{report.START}\n| group |\n", {})
