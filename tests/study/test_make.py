"""The study: what it draws, what it gives away, what its server takes, and what it refuses."""

import base64
import contextlib
import http.client
import json
import os
import re
import sqlite3
from collections import Counter

import numpy as np
import pytest
from tiny_study import PAIRS, fresh_copy, keys, make_run, served, tiny_study

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.run.folder import RunDir
from vglann_fast.study.database import Answer, Study
from vglann_fast.study.make import CHECKS, make_study
from vglann_fast.study.server import HOST, listening


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_study(tmp_path_factory.mktemp("made"))


@pytest.fixture
def study(made, tmp_path):
    """A fresh copy without answers."""
    opened = Study.open(fresh_copy(made, tmp_path / "study"))
    yield opened
    opened.close()


def test_pairs_and_sides_are_balanced(study):
    pairs = keys(study).values()
    sides = Counter((left[0], right[0]) for left, right in pairs)
    for one, other in (("real", "hazel"), ("real", "maple"), ("hazel", "maple")):
        assert sides[one, other] == sides[other, one] == PAIRS // 2
    assert sides["real", "noised copy"] == sides["noised copy", "real"] == CHECKS // 2
    for one in ("real", "hazel", "maple"):
        for other in {"real", "hazel", "maple"} - {one}:
            shown = [a[1] for pair in pairs for a, b in (pair, pair[::-1]) if (a[0], b[0]) == (one, other)]
            assert len(set(shown)) == PAIRS
    used = Counter(a for pair in pairs for a in pair if "noised copy" not in (pair[0][0], pair[1][0]))
    assert {used["hazel", clip] for clip in range(5)} == {1, 2}  # 8 showings of 5 clips
    for left, right in pairs:
        if "noised copy" in (left[0], right[0]):
            assert left[1] == right[1]


def test_the_seed_draws_the_pairs_but_not_the_ids(made, study, tmp_path):
    runs = [made.parent / "hazel", made.parent / "maple"]
    make_study(runs, made.parent / "clips", tmp_path / "again", pairs=PAIRS, seed=3)
    again = Study.open(tmp_path / "again")
    try:
        assert sorted(keys(again).values()) == sorted(keys(study).values())
        assert not keys(again).keys() & keys(study).keys()
    finally:
        again.close()


def test_videos_are_the_clips_and_noised_copies_are_noisy(study, made, tmp_path):
    import av

    real = np.load(made.parent / "clips" / "clips-00000.npy")
    for trial in study.trials:
        for id, (label, clip) in zip((trial.left, trial.right), keys(study)[trial.id], strict=True):
            if label not in ("real", "noised copy"):
                continue
            file = tmp_path / "one.mp4"
            file.write_bytes(study.video(id))
            with av.open(str(file)) as container:
                shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            small = shown.reshape(8, 32, 4, 32, 4, 3).mean((2, 4))  # stored enlarged
            error = np.abs(small - real[clip].transpose(1, 2, 3, 0)).mean()
            assert (error < 4) if label == "real" else (error > 25)


def test_the_page_gives_nothing_away(study):
    page = (study.path.parent / "page.html").read_text()
    body = re.sub(r'"videos": \{[^}]*\}', "", page.split("</style>")[1])
    for secret in ("hazel", "maple", "noised", "clip", "source"):
        assert secret not in body.lower(), secret
    data = json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', page)[1])
    assert {trial: videos for trial, *videos in data["trials"]} == {
        trial.id: [trial.left, trial.right] for trial in study.trials
    }
    assert [trial for trial, *_ in data["trials"]] == sorted(trial.id for trial in study.trials)
    assert list(data["videos"]) == sorted(data["videos"])
    assert len(data["videos"]) == 2 * len(study.trials)  # two showings of a clip do not share an id
    for id, content in data["videos"].items():
        assert base64.b64decode(content) == study.video(id)
    assert not re.search(r"https?://|@import|url\(", re.sub(r'"videos": \{[^}]*\}', "", page))


def ask(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def post(port, value, kind="application/json", **headers):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    response, content = ask(port, "POST", "/answers", body, Content_Type=kind, **headers)
    return response.status, content.decode()


def test_the_server_takes_each_answer_once_and_only_answers(study):
    trial = study.trials[0]
    good = {"rater": "0123456789abcdef", "trial": trial.id, "chosen": trial.left, "side": "left"}
    with served(study) as port:
        assert post(port, good) == (204, "")
        assert post(port, {**good, "chosen": trial.right, "side": "right"}) == (204, "")
        wrong = [
            ({**good, "trial": "f" * 16}, "is not one of this study"),
            ({**good, "chosen": study.trials[1].left}, "is not one of the videos of trial"),
            ({**good, "side": "above"}, "side must be left or right"),
            ({**good, "rater": "../../etc/passwd"}, "16 hexadecimal digits"),
            ({**good, "rater": ["0123456789abcdef"]}, "texts only"),
            ({**good, "more": "1"}, "expected an object with"),
            ([good], "expected an object with"),
            (b"{", "Expecting"),
            (b'"\xff"', "decode"),
            (b"[" * 1000, "expected an object with"),
        ]
        for value, message in wrong:
            status, text = post(port, value)
            assert (status, message in text) == (400, True), (value, text)
        assert post(port, b" " * 5000)[0] == 413
        assert post(port, good, kind="text/plain")[0] == 415  # what a form of another site can send
        assert post(port, good, Host="study.example")[0] == 400  # a name that was made to lead here
        _, content = ask(port, "GET", "/answers/0123456789abcdef")
        assert json.loads(content) == {trial.id: trial.left}
        assert ask(port, "GET", "/answers/fedcba9876543210")[1] == b"{}"
        for path in ("/study.sqlite", "/videos/..%2fstudy.sqlite", "/videos/" + "0" * 16, "/page.html"):
            assert ask(port, "GET", path)[0].status == 404
        assert ask(port, "PUT", "/answers")[0].status == 405
    assert len(study.rated()) == 1


def test_every_response_forbids_other_hosts(study):
    with served(study) as port:
        video = f"/videos/{study.trials[0].left}"
        for path in ("/", video, "/none", "/answers/0"):
            response, _ = ask(port, "GET", path)
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; connect-src 'self'; media-src blob:;")
            assert "unsafe" not in policy
            assert "http" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Cache-Control"] == "no-store"
        assert ask(port, "GET", video)[0].headers["Content-Type"] == "video/mp4"
        assert b'"videos": null' in ask(port, "GET", "/")[1]


def test_the_server_listens_on_this_machine_only(capsys, study):
    with listening(0) as socket:
        address, port = socket.getsockname()
        assert address == "127.0.0.1"
        assert main(["study", "serve", str(study.path.parent), "--port", str(port)]) == 2
        assert f"--port {port}: cannot be used" in capsys.readouterr().err
    with pytest.raises(VglannError, match="--port 70000"):
        listening(70000)


def test_answers_survive_a_crash_and_a_second_process(study):
    study.add("0" * 16, [Answer(study.trials[0].id, study.trials[0].right, "right")])
    with contextlib.closing(sqlite3.connect(study.path)) as other:
        assert other.execute("pragma journal_mode").fetchone() == ("wal",)
        assert other.execute("select chosen from answers").fetchall() == [(study.trials[0].right,)]
        with pytest.raises(sqlite3.IntegrityError):
            row = ("0" * 16, study.trials[0].id, study.trials[0].left, "left")
            other.execute("insert into answers values (?, ?, ?, ?)", row)


def test_a_study_needs_samples_and_test_clips_that_fit(made, tmp_path, capsys):
    good = str(made.parent / "hazel")
    empty = make_run(tmp_path / "empty", None)
    long = make_run(tmp_path / "long", moving_squares(4, frames=16))
    broken = make_run(tmp_path / "broken", moving_squares(4, frames=8))
    (broken / "media" / "samples" / "video.npy").write_bytes(b"\x93NUMPY")
    floats = make_run(tmp_path / "floats", np.zeros((4, 3, 8, 32, 32), np.float32))
    train = write_clip_folder(tmp_path / "train", moving_squares(4, frames=8))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "study.sqlite").touch()
    real, out = str(made.parent / "clips"), str(tmp_path / "out")
    for runs, clips, folder, pairs, message in [
        ([empty], real, out, 4, "make them with `vglann sample"),
        ([made.parent / "clips"], real, out, 4, "is not a run"),
        ([good, long], real, out, 4, "long: its samples are of (frames, height, width) (16, 32, 32)"),
        ([broken], real, out, 4, "video.npy: damaged"),
        ([floats], real, out, 4, "holds no videos (float32"),
        ([good], train, out, 4, "has no test clips"),
        ([good], tmp_path, out, 4, "no clip folder"),
        ([good], real, out, 6, "hazel: 5 samples for 6 pairs"),
        ([good], real, out, 8, "clips: 6 test clips for 8 pairs"),
        ([good], real, out, 3, "--pairs: expected an even number"),
        ([good, good], real, out, 4, "given twice"),
        ([good], real, taken, 4, "is there already"),
    ]:
        words = [
            "study",
            "make",
            *map(str, runs),
            "--real",
            str(clips),
            "--out",
            str(folder),
            "--pairs",
            str(pairs),
        ]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_run_that_was_trained_on_the_real_clips_is_warned_of(made, tmp_path, caplog):
    runs = [make_run(tmp_path / name, moving_squares(5, frames=8)) for name in ("knows", "does-not", "new")]
    ids = ClipSet.open(made.parent / "clips", "test").ids
    for run, trained in zip(runs, ([*ids[:2], "another"], ["another"]), strict=False):
        RunDir.open(run).checkpoints.save(1, {}, {"ids": trained})
    make_study(runs, made.parent / "clips", tmp_path / "study", pairs=2)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{runs[0]} was trained on 2 of the 6 real clips" in said


def test_runs_of_one_name_are_told_apart(made, tmp_path):
    twin = make_run(tmp_path / "hazel", moving_squares(2, frames=8))
    make_study([made.parent / "hazel", twin], made.parent / "clips", tmp_path / "study", pairs=2)
    study = Study.open(tmp_path / "study")
    study.close()
    labels = [source.label for source in study.sources.values()]
    assert labels == ["real", str(made.parent / "hazel"), str(twin), "noised copy"]


def test_a_study_is_made_once(made, tmp_path, capsys):
    words = ["--pairs", "2", "--real", str(made.parent / "clips"), "--out", str(tmp_path / "study")]
    assert main(["study", "make", str(made.parent / "maple"), *words]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "study")
    assert main(["study", "make", str(made.parent / "maple"), *words]) == 2


def test_a_run_whose_name_is_not_utf_8_is_shown_with_escapes(made, tmp_path):
    run = make_run(tmp_path / os.fsdecode(b"caf\xe9"), moving_squares(2, frames=8))
    make_study([run], made.parent / "clips", tmp_path / "study", pairs=2)
    study = Study.open(tmp_path / "study")
    study.close()
    assert r"caf\udce9" in [source.label for source in study.sources.values()]
