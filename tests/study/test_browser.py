"""The study's page in headless Chromium: load, play, choose, reload, report; served, and as a file."""

import json
import shutil

import pytest
from chromium import Chromium, chromium_path
from tiny_study import fresh_copy, keys, served, tiny_study

from vglann_fast.errors import VglannError
from vglann_fast.study.database import Study
from vglann_fast.study.results import report_study
from vglann_fast.study.server import listening

pytestmark = pytest.mark.skipif(chromium_path() is None, reason="no Chromium here: apt-get install chromium")

READY = "!document.getElementById('left').disabled && !document.getElementById('trial').hidden"
RATER = "JSON.parse(Object.values(localStorage)[0]).rater"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_study(tmp_path_factory.mktemp("made"), names=["hazel"], pairs=2)  # 10 trials


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def study(made, tmp_path):
    opened = Study.open(fresh_copy(made, tmp_path / "study"))
    yield opened
    opened.close()


def begin(browser, label="Begin"):
    browser.wait("!document.getElementById('start').hidden")
    assert browser.evaluate("document.getElementById('begin').textContent") == label
    browser.click("#begin")
    browser.wait(READY)


def answered(browser, n):
    """Wait until n answers are in and the next pair, if any, can be answered."""
    browser.wait(f"document.getElementById('count').textContent.startsWith('{n} of ')")
    browser.wait(f"({READY}) || !document.getElementById('done').hidden")


def test_a_rater_loads_plays_chooses_reloads_and_is_reported(study, browser):
    with served(study) as port:
        browser.requests.clear()
        browser.go(f"http://127.0.0.1:{port}/")
        browser.wait("!document.getElementById('start').hidden")
        browser.press("ArrowLeft")  # does nothing before the first pair
        begin(browser)
        # Both videos move and start again after their end.
        times = "[...document.querySelectorAll('video')].map((video) => video.currentTime)"
        for above in ("> 0.05", "< 0.05", "> 0.05"):
            browser.wait(f"{times}.every((time) => time {above})")
        size = "[...document.querySelectorAll('video')].map((v) => [v.videoWidth, v.videoHeight])"
        assert browser.evaluate(size) == [[128, 128], [128, 128]]
        browser.click("#right")
        answered(browser, 1)
        browser.press("ArrowLeft")
        answered(browser, 2)
        browser.press("ArrowRight")
        answered(browser, 3)
        rater = browser.evaluate(RATER)
        stored = study.answers_of(rater)
        assert len(stored) == 3
        assert [r.side for r in study.rated()].count("right") == 2

        browser.go(f"http://127.0.0.1:{port}/")
        begin(browser, "Continue")
        assert browser.evaluate(RATER) == rater
        for i in range(3, len(study.trials)):
            browser.press("ArrowLeft")
            answered(browser, i + 1)
        browser.wait("!document.getElementById('done').hidden")
        assert stored.items() <= study.answers_of(rater).items()
        assert study.answers_of(rater).keys() == {trial.id for trial in study.trials}
        assert browser.evaluate("document.getElementById('download').hidden")

        browser.click("#another")
        begin(browser)
        assert browser.evaluate(RATER) != rater
    ours = (f"http://127.0.0.1:{port}/", f"blob:http://127.0.0.1:{port}/", "data:")
    assert len(browser.requests) > 2 * len(study.trials)
    assert all(url.startswith(ours) for url in browser.requests)

    record = report_study(study.path.parent)
    assert record["raters"] + len(record["excluded"]) == 1
    browser.go((study.path.parent / "results.html").as_uri())
    rows = browser.evaluate("[...document.querySelectorAll('tbody tr')].map((row) => row.innerText)")
    assert len(rows) == 1
    assert "real over hazel" in rows[0]


def test_sides_are_mirrored_for_half_of_the_raters_and_orders_differ(study, browser):
    """Read off the screen: which video stands left for 8 raters, none of whom answers."""
    pairs = {frozenset((trial.left, trial.right)): trial for trial in study.trials}
    first, mirrored = set(), set()
    with served(study) as port:
        for i in range(8):
            browser.go(f"http://127.0.0.1:{port}/")
            state = json.dumps({"rater": f"{i * 7919:016x}", "answers": {}})
            browser.evaluate(f"localStorage.setItem('vglann-study-{study.facts['id']}', {json.dumps(state)})")
            browser.requests.clear()
            browser.go(f"http://127.0.0.1:{port}/")
            browser.wait("!document.getElementById('start').hidden")
            browser.click("#begin")
            browser.wait("!document.getElementById('trial').hidden")
            left, right = [url.rsplit("/", 1)[1] for url in browser.requests if "/videos/" in url][:2]
            trial = pairs[frozenset((left, right))]
            first.add(trial.id)
            mirrored.add(left == trial.right)
    assert len(first) > 3
    assert mirrored == {True, False}


def test_the_page_can_reach_no_other_host(study, browser):
    with served(study) as port, listening(0) as other:
        other.setblocking(False)
        browser.go(f"http://127.0.0.1:{port}/")
        address = f"http://127.0.0.1:{other.getsockname()[1]}/"
        blocked = f"fetch('{address}', {{mode: 'no-cors'}}).then(() => 'reached', () => 'blocked')"
        assert browser.evaluate(blocked) == "blocked"
        picture = (
            f"new Promise((done) => {{ const image = new Image(); image.onload = () => done('reached');"
            f" image.onerror = () => done('blocked'); image.src = '{address}'; }})"
        )
        assert browser.evaluate(picture) == "blocked"
        with pytest.raises(BlockingIOError):
            other.accept()


def test_an_answer_that_could_not_be_stored_can_be_sent_again(study, browser, monkeypatch):
    def full(rater, answers):
        raise VglannError("the disk is full")

    with served(study) as port:
        browser.go(f"http://127.0.0.1:{port}/")
        begin(browser)
        browser.press("ArrowLeft")
        answered(browser, 1)
        with monkeypatch.context() as patch:
            patch.setattr(study, "add", full)
            browser.press("ArrowLeft")
            browser.wait("!document.getElementById('trouble').hidden")
            assert "the disk is full" in browser.evaluate("document.getElementById('reason').textContent")
        browser.click("#retry")
        answered(browser, 2)
        assert len(study.rated()) == 2


def test_the_page_as_a_file_keeps_and_hands_out_the_answers(study, browser, tmp_path):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    alone = tmp_path / "alone.html"
    shutil.copy(study.path.parent / "page.html", alone)
    browser.requests.clear()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    browser.go(alone.as_uri())
    begin(browser)
    browser.wait("document.querySelector('video').currentTime > 0.05")
    browser.press("ArrowLeft")
    answered(browser, 1)
    browser.go(alone.as_uri())
    begin(browser, "Continue")
    for i in range(1, len(study.trials)):
        browser.click("#right")
        answered(browser, i + 1)
    assert browser.evaluate("document.getElementById('another').hidden")  # it would forget the answers
    browser.click("#download")
    browser.wait("!document.getElementById('another').hidden")
    rater = browser.evaluate(RATER)
    file = downloads / f"answers-{rater}.json"
    for _ in range(200):
        if file.exists():
            break
        browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert all(url.startswith(("file://", "blob:", "data:")) for url in browser.requests)
    report_study(study.path.parent, [file])
    rated = study.rated()
    assert {r.trial for r in rated} == keys(study).keys()
    assert [r.side for r in rated].count("left") == 1
