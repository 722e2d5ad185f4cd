"""Every JSON file that is read, broken in its values and its bytes."""

import io
import json
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from faults.case import Case, part_of
from faults.fuzz_run import KINDS, rendered, run_with_mappings, sampled, weights_at, weights_of_lite0
from faults.mutations import Reader, fuzz
from tiny_study import answer_all, prefer, tiny_study

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.merge import merge
from vglann_fast.clips.of_run import has_clips, open_clips
from vglann_fast.clips.sources import find_sources
from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.train import train
from vglann_fast.nets.weights import load_weights
from vglann_fast.options.choices import VALUES
from vglann_fast.report.page import write_report
from vglann_fast.report.table_page import write_table_page
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.measurements import Contest, Entry, machine, read, write
from vglann_fast.study.database import Study
from vglann_fast.study.results import report_study

FULL = 600  # broken files for each reader


def cases(share: float) -> Iterable[Case]:
    """`FULL` for each reader."""
    with tempfile.TemporaryDirectory() as root:
        yield from fuzz(readers(Path(root)), part_of(FULL, share))


def readers(root: Path) -> Iterable[Reader]:
    """All of them; `root` is for the good files."""
    run = run_with_mappings(root / "made")
    clips, study = root / "made" / "clips", tiny_study(root / "study")
    lists = _source_list(root / "sources")
    yield Reader("index.json", clips, ("index.json",), lambda folder: ClipSet.open(folder, "train").read([0]))
    yield Reader(
        "index.json and rejected.jsonl, merged",
        _shard(clips, root),
        ("index.json", "rejected.jsonl"),
        _merged,
    )
    yield Reader("sources.json", lists, ("sources.json",), find_sources)
    yield Reader("options.json", run, ("options.json",), _trained)
    state = (_newest(run) + "/state.json",)
    yield Reader("state.json", run, state, lambda folder: load_trained(RunDir.open(folder)))
    yield Reader("state.json, resumed", run, state, _resumed, share=0.1)
    for kind in KINDS:
        file = f"mapping/{kind}/mapping.json"
        yield Reader(f"{kind}/mapping.json", run, (file,), partial(sampled, kind=kind), share=0.5)
    yield Reader("history.jsonl and metrics.jsonl", run, ("history.jsonl", "metrics.jsonl"), _logged)
    records = tuple(sorted(str(file.relative_to(run)) for file in run.glob("evaluation/*.json")))
    several = ("options.json", "environment.json", "metrics.jsonl", "mapping/imle/mapping.json", *records)
    several = (*several, "table.json", "ablation.json", "media/samples/samples.json")
    yield Reader("JSON of a report", run, several, write_report, share=0.3)
    recorded = ("options.json", "environment.json", "history.jsonl", "metrics.jsonl")
    yield Reader("records of a run, replayed", run, recorded, _replayed, share=0.05)
    yield Reader("table.json", run, ("table.json",), write_table_page, share=0.3)
    yield Reader(
        "tune.json", _tuned(root / "tuned"), ("tune.json",), lambda folder: read(folder / "tune.json")
    )
    yield Reader("weights record", weights_of_lite0(root / "weights"), ("lite0.json",), _weights)
    yield Reader("answers to a study", _answered(study, root), ("answers.json",), _answers, share=0.5)


def _tuned(folder: Path) -> Path:
    """A folder with what `vglann tune` writes: every kind of choice."""
    choices = {**{name: values[0] for name, values in VALUES.items()}, "threads": "2", "nearest": "faiss"}
    contests = {
        name: Contest(
            "plain", value, {value: 0.5, "plain": 1.0}, {value: 2.0, "plain": 1.0}, {"other": "wrong"}
        )
        for name, value in choices.items()
    }
    here, shapes = machine(torch.device("cpu")), {"width": 4, "sync_bn": False, "loss": "l1"}
    write(folder / "tune.json", [Entry(here, shapes, "2026-01-02T03:04:05+00:00", contests)])
    return folder


def _shard(clips: Path, root: Path) -> Path:
    """A clip folder that is the only part of a pack, with a clip that could not be stabilized."""
    folder = shutil.copytree(clips, root / "shard")
    index = json.loads((folder / "index.json").read_text())
    index["part"] = {"number": 1, "of": 1, "sources": "0" * 64}
    index["counts"]["unstable"] = 1
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "rejected.jsonl").write_text(json.dumps({"source": "film.mp4", "reason": "shaken", "clip": {}}))
    return folder


def _merged(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        merge([folder], Path(place) / "clips")


def _newest(run: Path) -> str:
    return str(sorted((run / "checkpoints").iterdir())[-1].relative_to(run))


def _source_list(folder: Path) -> Path:
    folder.mkdir()
    (folder / "film.mp4").write_bytes(b"no film")
    entry = {"file": "film.mp4", "first_frame": 3, "last_frame": 40, "credit": "nobody"}
    (folder / "sources.json").write_text(
        json.dumps({"format": "vglann-sources", "version": 1, "sources": [entry]})
    )
    return folder


def _trained(folder: Path) -> None:
    """Read what sample and reconstruct read of a run."""
    run = RunDir.open(folder)
    load_trained(run)
    if has_clips(run):
        open_clips(run)


def _resumed(folder: Path) -> None:
    run = RunDir.open(folder)
    train(open_clips(run), run, resume=True)
    rendered(folder)


def _replayed(folder: Path) -> None:
    with redirect_stdout(io.StringIO()):
        if main(["replay", str(folder)]) == 2:
            raise VglannError("as it printed")


def _logged(folder: Path) -> None:
    run = RunDir.open(folder)
    run.logs.history()
    run.logs.metrics("glo")
    run.logs.drop_metrics("glo", 1)


def _weights(folder: Path) -> None:
    with weights_at(folder):
        load_weights("lite0")


def _answered(study: Path, root: Path) -> Path:
    """A study that one has answered, and the answers of another in a file."""
    opened = Study.open(study)
    answer_all(opened, "a" * 16, prefer("real", "hazel", "maple", "noised copy"))
    answers = [{"trial": t.id, "chosen": t.left, "side": "left"} for t in opened.trials]
    content = {"format": "vglann-study-answers", "version": 1, "study": opened.facts["id"]}
    opened.close()
    (study / "answers.json").write_text(json.dumps({**content, "rater": "b" * 16, "answers": answers}))
    return study


def _answers(folder: Path) -> None:
    report_study(folder, [folder / "answers.json"])
