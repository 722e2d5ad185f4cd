"""The script of the README as it stands there, and the tutorial notebook with smaller sizes."""

import ast
import json
import re
from pathlib import Path

import numpy as np

import vglann_fast as vf

ROOT = Path(__file__).parents[2]


def script():
    section = (ROOT / "README.md").read_text().split("## In Python", 1)[1].split("\n## ", 1)[0]
    return re.search(r"```python\n(.*?)```", section, flags=re.DOTALL).group(1)


def write_videos(folder):
    """Six videos of a square that moves over a gradient; each gives three clips of 16 frames."""
    from video_files import write_video

    from vglann_fast.experiments.moving_squares import moving_squares

    folder.mkdir()
    for number in range(6):
        frames = moving_squares(1, frames=50, size=64, seed=number)[0].transpose(1, 2, 3, 0)
        write_video(folder / f"{number}.mkv", np.ascontiguousarray(frames))


def test_the_script_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_videos(tmp_path / "videos")
    *lines, last = ast.parse(script()).body
    assert len(script().splitlines()) <= 12
    names: dict = {}
    exec(compile(ast.Module(lines, []), "README.md", "exec"), names)
    shown = eval(compile(ast.Expression(last.value), "README.md", "eval"), names)
    assert isinstance(shown, vf.Videos)
    assert shown.shape == (16, 3, 16, 32, 32)
    assert "data:image/gif" in shown._repr_html_()
    assert (tmp_path / "samples.gif").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "small-run" / "metrics.jsonl").read_text().splitlines()]
    assert names["run"].step == max(line["step"] for line in lines if line["stage"] == "glo") == 20


def test_the_tutorial_leads_from_videos_to_samples(tiny, tmp_path, monkeypatch):
    """Its first cell of code has the sizes; every other cell runs as it stands."""
    monkeypatch.chdir(tmp_path)
    write_videos(tmp_path / "videos")
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]
    first, *rest = [cell for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    exec("".join(first["source"]), names)
    assert names["videos"] == "videos"
    small = {
        "frames": 16,
        "size": 32,
        "training": tiny | {"epochs": 1},
        "mapping": {"epochs": 2},
        "samples": 3,
    }
    assert small.keys() <= names.keys()
    names |= small
    shown = []
    for cell in rest:
        *lines, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(lines, []), "tutorial", "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), "tutorial", "eval"), names))
    packed, run, compared, mappings, samples, between = shown
    assert all("data:image/gif" in one._repr_html_() for one in (packed, run, compared, samples, between))
    assert mappings == ["imle"]
    assert samples.shape == (3, 3, 16, 32, 32)
    assert (tmp_path / "samples.gif").is_file()


def test_the_tutorial_is_kept_without_outputs():
    for cell in json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]:
        assert not cell.get("outputs"), cell["id"]
        assert not cell.get("execution_count"), cell["id"]
