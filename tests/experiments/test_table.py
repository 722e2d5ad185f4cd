"""`vglann table`: what it makes, keeps, refuses, and shows."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from evaluated import instead_of_networks, mixed_folder
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.cli.words import parse
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments import table as module
from vglann_fast.experiments.table import CONTINUE, KEEP, NEW, Grid, plan_table
from vglann_fast.glo.assemble import new_training
from vglann_fast.options.presets import preset
from vglann_fast.report.evaluation import shown
from vglann_fast.report.table_page import COLUMN, as_markdown, distance_tables, read_table, write_table_page

TINY = ["--width=4", "--latent-dim=8", "--levels=2", "--batch-size=3", "--epochs=2", "--background-share=0"]


@pytest.fixture(autouse=True)
def colors_only(monkeypatch, tmp_path):
    instead_of_networks(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return mixed_folder(tmp_path_factory.mktemp("clips") / "clips", training=12, held_out=7)


def command(clips, out, losses="laplacian,l1", mappings="imle,gaussian", *more):
    words = ["table", clips, "--losses", losses, "--mappings", mappings, "--out", out, *TINY]
    return [str(word) for word in (*words, "--features", "lite0", *more)]


def grid(clips, out, losses=("laplacian", "l1"), kinds=("imle", "gaussian"), **options):
    small = tiny_options("modern", epochs=2, **options)
    return Grid(clips, out, "modern", 0, small, losses, kinds, ("lite0",), None)


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "table"
    with pytest.MonkeyPatch.context() as patch:
        instead_of_networks(patch, out.parent / "cache")
        assert main(command(clips, out)) == 0
    return out


def test_every_cell_is_there(made):
    record = json.loads((made / "table.json").read_text())
    assert (record["format"], record["version"]) == ("vglann-table", 1)
    assert list(record["runs"]) == ["laplacian", "l1"]
    for loss, run in record["runs"].items():
        for kind in ("imle", "gaussian"):
            evaluated = json.loads((made / loss / "evaluation" / f"{kind}.json").read_text())
            assert run["records"][kind] == evaluated
            assert np.load(made / "samples" / loss / kind / "video.npy").shape == (8, 3, 16, 32, 32)
            value = evaluated["features"]["frechet[lite0]"]["generated"]["frechet"]
            assert shown(value) in (made / "table.md").read_text()
        assert json.loads((made / loss / "options.json").read_text())["train"]["loss"] == loss
    assert len(np.load(made / "samples" / "real" / "video.npy")) == 7


def test_without_a_truth_nothing_is_bold(made):
    """Seven real clips have no halves with five neighbors in them."""
    (found,) = distance_tables(read_table(made, []))
    assert found.head == ["frechet[lite0], n = 7", "laplacian", "Fréchet", "l1", "Fréchet"]
    names = ["real clips (floor)", "real against real (truth)", "training-latents", "imle", "gaussian"]
    assert [row[0] for row in found.rows] == names
    assert all(row[2].endswith("†") for row in found.rows if row[2] != "–")  # 7 videos, 4 features
    assert not found.best
    assert not re.search(r"\*\*[\d.,]+", (made / "table.md").read_text())


def test_the_mapping_nearest_to_the_truth_is_bold(tmp_path):
    def one(mmd):
        splits = {"n": 20, "splits": 20, "mmd": {"mean": mmd, "sd": 0.5}}
        figures = {"n": 40, "dimensions": 4, "mmd": mmd, "frechet": 10 - mmd, "splits": splits}
        truth = {"n": 20, "splits": 20, "mmd": {"mean": 2.0, "sd": 0.1}}
        return {"features": {"x": {"generated": figures, "floor": figures, "truth": truth}}}

    records = {"imle": one(3.5), "vae": one(2.25), "gmm": one(9.0), "training-latents": one(2.0)}
    content = {
        "format": "vglann-table",
        "losses": ["l1"],
        "mappings": ["imle", "vae", "gmm"],
        "runs": {"l1": {"records": records}},
    }
    (tmp_path / "table.json").write_text(json.dumps(content))
    table = read_table(tmp_path, [])
    ((found,), text) = distance_tables(table), as_markdown(table)
    ((row, column),) = found.best
    assert (found.rows[row][0], found.head[column]) == ("vae", "of splits")
    assert "**2.25 ± 0.5**" in text


def test_the_pages_show_it(made):
    page = (made / "table.html").read_text()
    assert page.count("data:image/webp") == 4 * 8 + 7
    assert "frechet[lite0], n = 7" in page
    assert "none is comparable" in page
    assert COLUMN not in page
    assert not re.search(r"https?:|@import|url\(", page)
    run = (made / "l1" / "report" / "index.html").read_text()
    assert 'href="../../table.html"' in run
    assert "frechet[lite0], n = 7" in run
    assert run.count('class="series series-1 cloud"') == 2  # samples of both mappings over the latents
    assert "match_diversity" in run


def test_a_second_time_nothing_is_made(made, clips, monkeypatch, capsys):
    before = (made / "table.md").read_bytes()
    for name in ("train", "fit_mapping", "evaluate"):
        monkeypatch.setattr(module, name, None)
    assert main(command(clips, made)) == 0
    assert (made / "table.md").read_bytes() == before
    plan = plan_table(grid(clips, made, ("l1", "laplacian"), ("imle", "gaussian", "vae")))
    assert list(plan) == ["l1", "laplacian"]
    kept = {"imle": KEEP, "gaussian": KEEP, "vae": NEW}
    assert plan["l1"].summary == {"training": KEEP, "mappings": kept, "measuring": NEW}


def test_a_dry_run_tells_the_plan_and_prints_a_config(made, clips, tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        assert main(command(clips, made, "l1,laplacian", "imle,vae", "--dry-run")) == 0
    assert '"training": "keep", "mappings": {"imle": "keep", "vae": "new"}' in caplog.text
    printed = capsys.readouterr().out
    (tmp_path / "table.yaml").write_text(printed)
    assert main(["table", "--config", str(tmp_path / "table.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == printed
    assert json.loads(printed)["losses"] == ["l1", "laplacian"]


def test_other_figures_are_measured_again(made, clips):
    few = Grid(**{**vars(grid(clips, made)), "n": 6})
    for part in plan_table(few).values():
        assert part.summary == {
            "training": KEEP,
            "mappings": dict.fromkeys(few.kinds, KEEP),
            "measuring": NEW,
        }


def test_a_mapping_that_is_not_the_tables_is_fitted_again(made, clips):
    file = made / "l1" / "mapping" / "imle" / "mapping.safetensors"
    before = file.read_bytes()
    assert main(["map", str(made / "l1"), "--kind", "imle", "--seed", "5"]) == 0
    try:
        plan = plan_table(grid(clips, made))
        assert plan["l1"].mappings == {"imle": NEW, "gaussian": KEEP}
        assert plan["laplacian"].measuring == KEEP
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "3"], "epochs 2, not 3"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--preset", "demo"], "preset modern, not demo"),
        (["--width", "5"], "width 4, not 5"),
    ],
)
def test_other_options_are_named(made, clips, capsys, more, message):
    assert main(command(clips, made, "laplacian,l1", "imle,gaussian", *more)) == 2
    error = capsys.readouterr().err
    assert "laplacian was made with other options" in error
    assert message in error


def test_options_of_the_machine_may_differ(made, clips):
    for part in plan_table(grid(clips, made, data="resident")).values():
        assert part.training == KEEP


def test_a_mapping_with_other_options_is_named(made, clips, capsys):
    record = made / "l1" / "mapping" / "imle" / "mapping.json"
    before = record.read_text()
    try:
        record.write_text(before.replace('"pool_factor": 10', '"pool_factor": 7'))
        assert main(command(clips, made)) == 2
    finally:
        record.write_text(before)
    assert "pool_factor 7, not 10" in capsys.readouterr().err


def test_a_training_that_was_cut_goes_on(clips, tmp_path):
    options = tiny_options("modern", epochs=2, loss="l1")
    run = new_run(tmp_path / "l1", clips, options, preset="modern")
    new_training(ClipSet.open(clips, "train"), options, run).loop(max_steps=3)
    assert plan_table(grid(clips, tmp_path, ("l1",)))["l1"].training == CONTINUE
    assert main(command(clips, tmp_path, "l1", "gaussian")) == 0
    assert json.loads((tmp_path / "table.json").read_text())["runs"]["l1"]["step"] == 8
    assert main(["replay", str(tmp_path / "l1")]) == 0  # what the table did to it is in its history


MISTAKES = {
    "unknown loss": (["--losses", "laplacian,gan"], "--losses"),
    "a sum": (["--losses", "laplacian:1,l1:2"], "--losses"),
    "twice": (["--losses", "l1,l1"], "twice"),
    "unknown mapping": (["--mappings", "imle,gan"], "--mappings"),
    "no weights": (["--losses", "laplacian,vgg16"], "vglann weights import vgg16"),
    "too few clips": (["-n", "8"], "-n: 8 videos"),
    "too few for FVD": (["--features", "i3d"], "2048 videos"),
    "more components than latents": (["--preset", "paper", "--mappings", "gmm"], "--components 100"),
    "a batch of one": (["--accumulate", "9"], "--accumulate 9"),
    "no clips": (["--losses", "l1", "--seed", "0"], "no clip folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows_before_anything_is_made(name, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "weights"))
    more, message = MISTAKES[name]
    folder = tmp_path / "none" if name == "no clips" else clips
    words = ["table", str(folder), "--out", str(tmp_path / "table"), "--losses", "laplacian", *TINY, *more]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_something_else_in_its_place_stays(clips, tmp_path, capsys):
    (tmp_path / "l1").mkdir()
    (tmp_path / "l1" / "letter.txt").write_text("dear")
    assert main(command(clips, tmp_path, "l1")) == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "table.md").write_text("a table of mine")
    assert main(command(clips, tmp_path, "laplacian")) == 2
    assert "table.md: is there already" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_text() == "a table of mine"
    (tmp_path / "table.json").write_text("{}")
    assert main(command(clips, tmp_path, "laplacian")) == 2
    assert "not a table" in capsys.readouterr().err


def table_of(folder, title, losses, mappings):
    quarters = {"n": 512, "mean": 400.0, "sd": 3.0}
    figures = {
        "n": 2048,
        "dimensions": 400,
        "mmd": 0.25,
        "frechet": 300.0,
        "quarters": quarters,
        "warnings": [],
    }
    one = {"features": {title: {"generated": figures, "floor": {**figures, "frechet": 200.0}}}}
    runs = {loss: {"records": dict.fromkeys(mappings, one)} for loss in losses}
    content = {"format": "vglann-table", "version": 1, "losses": losses, "mappings": mappings, "runs": runs}
    (folder / "table.json").write_text(json.dumps(content))
    return read_table(folder, [])


def test_the_papers_values_stand_beside_fvd_alone(tmp_path):
    losses, mappings = ["laplacian", "resnext101-3d", "l1"], ["imle", "vae", "gmm", "gaussian"]
    (found,) = distance_tables(table_of(tmp_path, "FVD", losses, mappings))
    paper = [i for i, name in enumerate(found.head) if name == COLUMN]
    assert [found.head[i - 3] for i in paper] == ["laplacian", "resnext101-3d"]
    values = {row[0]: [row[i] for i in paper] for row in found.rows}
    assert values["imle"] == ["2,651", "2,305"]
    assert values["vae"] == ["2,891", "2,422"]
    assert values["gmm"] == ["2,701", "2,587"]
    assert values["gaussian"] == values["real clips (floor)"] == ["–", "–"]
    assert found.rows[0][1:4] == ["0.25", "200", "400 ± 3 †"]
    assert not found.best
    for title in ("frechet[i3d, 16 videos]", "frechet[transnetv2]"):
        (found,) = distance_tables(table_of(tmp_path, title, losses, mappings))
        assert COLUMN not in found.head
        assert "none is comparable" in as_markdown(read_table(tmp_path, []))


def test_hostile_and_damaged_tables_do_no_harm(tmp_path):
    attack = "\"'><script>alert(1)</script>|[x](javascript:alert(1))"
    odd = [attack, "../../secret", "/etc", "javascript:alert(1)//", "x" * 5000, "a\0b", "\ud800"]
    table = table_of(tmp_path, attack, [*odd, "l1", "l1"], [*odd, "imle", "imle", "training-latents"])
    assert (table.losses, table.mappings) == (["l1"], ["imle"])
    write_table_page(tmp_path)
    page = (tmp_path / "table.html").read_text()
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "&#39;../../secret&#39; is not a name" in page
    assert 'href="l1/report/index.html"' in page
    assert 'href="javascript' not in page
    text = (tmp_path / "table.md").read_text()
    assert "&lt;script>alert(1)&lt;/script>\\|[x]\\(javascript" in text
    (tmp_path / "table.json").write_text(
        json.dumps(
            {"format": "vglann-table", "losses": [3, "l1"], "mappings": 7, "runs": {"l1": [], "x": {}}}
        )
    )
    write_table_page(tmp_path)
    assert "Nothing was compared" in (tmp_path / "table.html").read_text()
    (tmp_path / "table.json").write_text("{")
    write_table_page(tmp_path)
    assert "Files that could not be shown" in (tmp_path / "table.html").read_text()


@pytest.mark.parametrize("part", ["features", "motion", "nearest_training_clip"])
def test_damaged_records_are_said_to_be(made, tmp_path, part):
    """Figures of one run; the figures of the other are shown."""
    content = json.loads((made / "table.json").read_text())
    for value in (None, "x", 10**400, [], {}, {"generated": 3}, {"FVD": {"generated": {"warnings": 7}}}):
        content["runs"]["l1"]["records"]["imle"][part] = value
        (tmp_path / "table.json").write_text(json.dumps(content))
        whole, damaged = write_table_page(tmp_path).read_text().split("## l1")
        assert "training clips" in whole
        assert "damaged" not in whole
        assert damaged.split() == ["Its", "records", "are", "damaged."]
        assert "imle" in (tmp_path / "table.html").read_text()


def test_the_documented_commands_are_commands():
    text = (Path(__file__).parents[2] / "docs" / "table1.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines() if line]
    verbs = []
    for words in commands:
        start = words.index("vglann" if words[0] == "vglann" else "vglann_fast") + 1
        chosen = parse(words[start:])
        verbs.append(chosen.command)
        if chosen.command == "table" and chosen.preset == "paper":
            paper = chosen
    assert verbs.count("table") == 2
    assert verbs.count("train") == 2
    assert (paper.losses, paper.mappings) == (["laplacian", "resnext101-3d"], ["imle", "vae", "gmm"])
    assert all(kind in preset("paper").map for kind in paper.mappings)
