"""`vglann evaluate --features-file`: features from elsewhere, and files that are not such features."""

import os

import numpy as np
import pytest

from vglann_fast.cli.main import main
from vglann_fast.metrics.given_features import compare_files
from vglann_fast.metrics.kernel_distance import jedi_distance, kernel_distance


def rows(n, d=6, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(dtype)


@pytest.fixture
def files(tmp_path):
    """files(real, generated) -> their paths."""

    def save(*arrays):
        paths = [tmp_path / name for name in ("real.npy", "generated.npy")]
        for path, array in zip(paths, arrays, strict=True):
            np.save(path, array)
        return [str(path) for path in paths]

    return save


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_two_files_are_compared(files, capsys, dtype):
    real, generated = (10 * rows(60, seed=0)).astype(dtype), (10 * rows(50, seed=1)).astype(dtype)
    paths = files(real, generated)
    assert main(["evaluate", "--features-file", *paths]) == 0
    printed = capsys.readouterr()
    figures = compare_files(*paths)
    assert figures["mmd"] == kernel_distance(real, generated)["mmd"]
    assert (figures["n"], figures["dimensions"], figures["truth"]["n"]) == (50, 6, 30)
    lines = printed.out.splitlines()
    assert lines[0].index("kernel distance") < lines[0].index("Fréchet distance")
    assert "precision" in printed.out
    assert "coverage" in printed.out
    assert "real against real (truth)" in printed.out
    assert "JEDi" not in printed.out
    assert "60 real and 50 generated" in printed.err


def test_jedi_is_its_statistic_and_warns_below_its_number(files, capsys):
    real, generated = rows(60, seed=0), rows(60, seed=1)
    assert main(["evaluate", "--features-file", *files(real, generated), "--protocol", "jedi"]) == 0
    printed = capsys.readouterr()
    assert f"{jedi_distance(real, generated):.6g}" in printed.out
    assert "JEDi is published for 5,000" in printed.err


def test_two_rows_have_no_neighbors_and_no_error(files, capsys):
    assert main(["evaluate", "--features-file", *files(rows(2), rows(2, seed=1))]) == 0
    printed = capsys.readouterr()
    assert "too few for precision" in printed.err
    assert "†" in printed.out
    assert "truth" not in printed.out


BAD = {
    "no row": (rows(0), "has 0 rows"),
    "one row": (rows(1), "at least 2 videos"),
    "equal rows": (np.ones((5, 6)), "are the same"),
    "another length": (rows(5, 7), "take both from one network"),
    "NaN": (np.where(np.eye(6) == 1, np.nan, 1.0), "NaN or infinity in 6 of 6 rows"),
    "a vector": (rows(5)[0], "numbers [videos, features]"),
    "no features": (np.zeros((5, 0)), "numbers [videos, features]"),
    "text": (np.array([["a", "b"], ["c", "d"]]), "numbers [videos, features]"),
    "complex numbers": (rows(5) + 1j, "numbers [videos, features]"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("side", [0, 1])
def test_bad_features_are_one_line(files, capsys, name, side):
    bad, expected = BAD[name]
    pair = [rows(8), rows(8, seed=1)]
    pair[side] = bad
    assert main(["evaluate", "--features-file", *files(*pair)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vglann: error: --features-file")
    assert expected in line


def bad_files(folder):
    np.save(folder / "pickled.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_text("1,2,3")
    np.save(folder / "torn.npy", rows(100))
    whole = (folder / "torn.npy").read_bytes()
    (folder / "torn.npy").write_bytes(whole[: len(whole) // 2])
    (folder / "huge.npy").write_bytes(whole.replace(b"(100, 6)", b"(99999999999, 6)", 1))
    os.mkfifo(folder / "pipe.npy")


@pytest.mark.parametrize(
    "name", ["pickled.npy", "empty.npy", "text.npy", "torn.npy", "huge.npy", "pipe.npy", "missing.npy", "."]
)
def test_files_that_hold_no_array_are_named(files, tmp_path, capsys, name):
    good, _ = files(rows(8), rows(8))
    bad_files(tmp_path)
    assert main(["evaluate", "--features-file", good, str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vglann: error: --features-file: {tmp_path / name} ")
    if name == "pickled.npy":
        assert "allow_pickle=False" in line


def test_what_does_not_go_together_is_named(files, tmp_path, capsys):
    paths = files(rows(8), rows(8, seed=1))
    for words, expected in (
        ([str(tmp_path), "--features-file", *paths], "RUN"),
        ([str(tmp_path), "--protocol", "jedi"], "add --features-file"),
        ([], "RUN missing"),
        (["--features-file", paths[0]], "expected 2 arguments"),
        (["--features-file", *paths, "--protocol", "fvd"], "--protocol: expected jedi"),
    ):
        assert main(["evaluate", *words]) == 2
        assert expected in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["--kind", "imle"],
        ["-n", "4"],
        ["--features", "none"],
        ["--features=transnetv2,lite0,lite0-step"],
        ["--invert", "8"],
        ["--seed", "0"],
        ["--device", "auto"],
        ["--kernels", "reference"],
    ],
)
def test_what_two_files_have_no_use_for_is_refused_by_name_also_at_its_default(files, capsys, words):
    paths = files(rows(8), rows(8, seed=1))
    for around in (
        [*words, "--features-file", *paths],
        ["--features-file", *paths, *words, "--threads", "1"],
    ):
        assert main(["evaluate", *around]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"leave {words[0].split('=')[0]} out" in line


def test_how_it_is_computed_may_be_said_of_two_files(files, capsys):
    paths = files(rows(8), rows(8, seed=1))
    words = ["--protocol", "jedi", "--threads", "1", "--deterministic"]
    assert main(["evaluate", "--features-file", *paths, *words]) == 0
    assert "JEDi" in capsys.readouterr().out
