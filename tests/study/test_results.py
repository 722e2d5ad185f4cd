"""The report of a study: shares, intervals, agreement, who is counted, and files that are wrong."""

import contextlib
import json
import sqlite3

import pytest
from tiny_study import answer_all, fresh_copy, prefer, tiny_study

from vglann_fast.cli.main import main
from vglann_fast.errors import VglannError
from vglann_fast.study.database import Answer, Study
from vglann_fast.study.make import CHECKS
from vglann_fast.study.results import attentive, krippendorff_alpha, report_study


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_study(tmp_path_factory.mktemp("made"))


@pytest.fixture
def study(made, tmp_path):
    """A fresh copy without answers."""
    opened = Study.open(fresh_copy(made, tmp_path / "study"))
    yield opened
    opened.close()


def test_shares_intervals_and_agreement(study, capsys):
    """Two raters see through everything, one prefers `maple`; one guesses and one stops early: both are left out."""
    for i in range(2):
        answer_all(study, f"{i:016x}", prefer("real", "hazel", "maple", "noised copy"))
    answer_all(study, "a" * 16, prefer("maple", "real", "hazel", "noised copy"), sides=("right", "left"))
    answer_all(study, "b" * 16, lambda left, right: 0)
    one = study.trials[0]
    study.add("c" * 16, [Answer(one.id, one.left, "left")])
    folder = str(study.path.parent)
    assert main(["study", "report", folder]) == 0
    out = capsys.readouterr().out
    assert "real over hazel: 100.0 % [73.5, 100.0] of 12 answers" in out  # 0.025 ** (1 / 12) = 0.7354
    record = json.loads((study.path.parent / "results.json").read_text())
    shares = {(p["first"], p["second"]): p for p in record["preferences"]}
    assert shares.keys() == {("real", "hazel"), ("real", "maple"), ("hazel", "maple")}
    two_thirds = shares["real", "maple"]
    assert (two_thirds["for_first"], two_thirds["answers"]) == (8, 12)
    # Clopper and Pearson's bounds: where P(X >= 8) and P(X <= 8) are 2.5 %.
    assert two_thirds["low"] == pytest.approx(0.3489, abs=1e-4)
    assert two_thirds["high"] == pytest.approx(0.9008, abs=1e-4)
    assert two_thirds["p_value"] == pytest.approx(2 * (495 + 220 + 66 + 12 + 1) / 4096)
    assert (record["raters"], record["answers"]) == (3, 36)
    assert record["excluded"].keys() == {"b" * 16, "c" * 16}
    assert record["excluded"]["b" * 16] == {"passed": CHECKS // 2, "checks": CHECKS}
    assert record["chosen_left"] == 18  # 6 of 12 for each of the three
    # 4 pairs all agree on, 8 pairs 2 to 1: 8 * (9 - 4 - 1) / 2 = 16 disagreeing pairs; by chance 2 * 18 * 18 / 35.
    disagreements = 8 * 2
    labels = [r for r in study.rated() if r.rater in ("0" * 16, f"{1:016x}", "a" * 16)]
    left = sum(
        r.chose_left
        for r in labels
        if "noised copy" not in (study.sources[r.left].label, study.sources[r.right].label)
    )
    assert record["alpha"] == pytest.approx(1 - disagreements * 35 / (2 * left * (36 - left)))
    page = (study.path.parent / "results.html").read_text()
    for text in ("100.0 %", "73.5 to 100.0 %", "8 of 12", "passed 4 of 8 checks"):
        assert text in page


def test_alpha_is_krippendorffs():
    """The examples of "Computing Krippendorff's Alpha-Reliability" (2011): A, two observers; C, four with gaps."""
    a = zip("0100000010", "1110010000", strict=True)
    assert krippendorff_alpha(list(a)) == pytest.approx(0.095, abs=5e-4)
    rows = ["1233214 12...", "1233224 125.3", ".333234 2251.", "1233244 1251."]
    units = [[value for value in unit if value not in ". "] for unit in zip(*rows, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([[1, 1], [2, 2]]) == 1
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert krippendorff_alpha([[1], [2]]) is None


@pytest.mark.parametrize(
    ("passed", "checks", "counted"),
    [(0, 0, False), (4, 4, False), (5, 5, True), (4, 5, False), (6, 7, False), (7, 8, True), (6, 8, False)],
)
def test_who_is_counted(passed, checks, counted):
    assert attentive([True] * passed + [False] * (checks - passed)) is counted


def answers_file(study, path, changes=()):
    trial = study.trials[0]
    content = {
        "format": "vglann-study-answers",
        "version": 1,
        "study": study.facts["id"],
        "rater": "0123456789abcdef",
        "answers": [{"trial": trial.id, "chosen": trial.left, "side": "left"}],
    }
    path.write_text(json.dumps({**content, **dict(changes)}))
    return path


def test_files_of_answers_are_taken_in_once(study, tmp_path):
    file = answers_file(study, tmp_path / "a.json")
    for _ in range(2):
        report_study(study.path.parent, [file])
        assert [r.chose_left for r in study.rated()] == [True]


WRONG_FILES = {
    "another study": ({"study": "0" * 16}, "answers to another study"),
    "another format": ({"format": "x"}, "no answers to a study"),
    "unknown trial": (
        {"answers": [{"trial": "f" * 16, "chosen": "f" * 16, "side": "left"}]},
        "is not one of this",
    ),
    "no side": ({"answers": [{"trial": "f" * 16, "chosen": "f" * 16}]}, "no 'side'"),
    "no list": ({"answers": 3}, "damaged or changed"),
    "a number": ({"rater": 3}, "expected a text, got 3"),
    "a path": ({"rater": "../../../tmp/x"}, "16 hexadecimal digits"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_of_answers_is_one_line(study, tmp_path, capsys, name):
    changes, message = WRONG_FILES[name]
    file = answers_file(study, tmp_path / "a.json", changes)
    assert main(["study", "report", str(study.path.parent), str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vglann: error: {file}: ")
    assert message in error
    assert study.rated() == []
    assert not (study.path.parent / "results.json").exists()


def test_a_torn_missing_or_huge_file_of_answers_is_named(study, tmp_path):
    for name, content in (("torn.json", b'{"format'), ("huge.json", b" " * 10_000_001), ("none.json", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(VglannError, match=name):
            report_study(study.path.parent, [tmp_path / name])


def test_a_study_without_answers_says_how_to_get_some(study):
    with pytest.raises(VglannError, match="vglann study serve"):
        report_study(study.path.parent)


def test_a_full_disk_is_said_and_leaves_whole_answers(study):
    """SQLite may not add pages, as on a full disk."""
    study._connection.execute("pragma max_page_count = 1")
    with pytest.raises(VglannError, match=r"study\.sqlite: the disk is full"):
        for i in range(100):
            answer_all(study, f"{i:016x}", lambda left, right: 0)
    assert len(study.rated()) % len(study.trials) == 0


def damage_nothing_left(path):
    path.unlink()


def damage_other_file(path):
    path.write_bytes(b"PK\x03\x04 a video or so" * 100)


def damage_other_database(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table trials (id)")


def damage_other_version(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma user_version = 2")


def damage_torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_rows_gone(path):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("delete from videos where source = 0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_left, "make one with `vglann study`"),
        (damage_other_file, "damaged, or not a study"),
        (damage_other_database, "not a file of vglann-fast"),
        (damage_other_version, "version 2, this program reads 1"),
        (damage_torn, "damaged, or not a study"),
        (damage_rows_gone, "others that are gone"),
    ],
)
def test_a_damaged_or_foreign_database_is_one_line(study, capsys, damage, message):
    study.close()
    damage(study.path)
    for verb in ("serve", "report"):
        assert main(["study", verb, str(study.path.parent)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
