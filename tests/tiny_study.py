"""A study small enough to make in a moment, the key to it, and answers."""

import contextlib
import sqlite3
import threading

import numpy as np
from tiny import moving_squares, write_clip_folder

from vglann_fast.report.study import make_study
from vglann_fast.report.study_database import Answer
from vglann_fast.report.study_server import listening, make_app
from vglann_fast.run.files import write_json
from vglann_fast.run.folder import RunDir

PAIRS = 4


def tiny_study(folder, names=("hazel", "maple"), pairs=PAIRS):
    """Six real clips and runs of five samples each, in `folder`, and a study of them in folder/study."""
    write_clip_folder(folder / "clips", moving_squares(6, frames=8), split="test")
    runs = [make_run(folder / name, moving_squares(5, frames=8, seed=i + 1)) for i, name in enumerate(names)]
    return make_study(runs, folder / "clips", folder / "study", pairs=pairs, seed=3)


def fresh_copy(made, folder):
    """Without answers."""
    folder.mkdir()
    for name in ("study.sqlite", "page.html"):
        (folder / name).write_bytes((made / name).read_bytes())
    return folder


def make_run(folder, videos):
    """A run that holds nothing but samples."""
    options = {"preset": "demo", "seed": 0, "clips": None, "frames": 8, "size": 32, "train": {}}
    write_json(folder / "options.json", RunDir.new(folder, options).options)
    if videos is not None:
        (folder / "media" / "samples").mkdir(parents=True)
        np.save(folder / "media" / "samples" / "video.npy", videos)
    return folder


def keys(study):
    """Trial -> ((source label, clip) of left, the same of right), read as only the maker can."""
    with contextlib.closing(sqlite3.connect(study.path)) as connection:
        rows = connection.execute(
            "select t.id, ls.label, l.clip, rs.label, r.clip from trials t join videos l on l.id = t.left "
            "join videos r on r.id = t.right join sources ls on ls.number = l.source "
            "join sources rs on rs.number = r.source"
        ).fetchall()
    return {row[0]: (row[1:3], row[3:5]) for row in rows}


def answer_all(study, rater, choose, sides=("left", "right")):
    """choose(left label, right label) -> 0 or 1."""
    key, answers = keys(study), []
    for trial in study.trials:
        picked = choose(key[trial.id][0][0], key[trial.id][1][0])
        answers.append(Answer(trial.id, (trial.left, trial.right)[picked], sides[picked]))
    return study.add(rater, answers)


def prefer(*order):
    return lambda left, right: 0 if order.index(left) < order.index(right) else 1


@contextlib.contextmanager
def served(study):
    """The study on a free port; yields the port."""
    import uvicorn

    with listening(0) as socket:
        server = uvicorn.Server(uvicorn.Config(make_app(study), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        try:
            yield socket.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
