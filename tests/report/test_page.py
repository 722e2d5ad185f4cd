"""The report page: what it shows, what it refuses to load, and what it does with a run that lacks things."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_up_run import IDS, make_run, write_arrays, write_json

from vglann_fast.errors import VglannError
from vglann_fast.options.training import TrainOptions
from vglann_fast.report.artifacts import read_artifacts
from vglann_fast.report.curves import phases
from vglann_fast.report.page import write_report


class Page(HTMLParser):
    """A page as a browser finds it: its elements and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.inside):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def views(self) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if (attrs.get("class") or "") == "view"]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def decoded(view: dict[str, str | None], image: dict[str, str | None]) -> np.ndarray:
    """The frames (T, H, W, 3) RGB that the page's player cuts out of a strip."""
    data = base64.b64decode((image["src"] or "").removeprefix("data:image/webp;base64,"), validate=True)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    frames, columns = int(view["data-frames"] or 1), int(view["data-columns"] or 1)
    width, height = map(int, (view["data-size"] or "").split())
    cell_width, cell_height, margin = map(int, (view["data-cell"] or "").split())
    assert picture.shape[1] == columns * cell_width
    corners = [
        (i // columns * cell_height + margin, i % columns * cell_width + margin) for i in range(frames)
    ]
    return np.stack([picture[top : top + height, left : left + width] for top, left in corners])


def test_page_shows_every_clip_and_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "0001-demo", clips=3, samples=2)
    page = page_of(run)
    players = [view for view in page.views() if "data-frames" in view]
    # original, reconstruction, foreground, mask; sample, nearest, foreground, mask; interpolation
    assert len(players) == 3 * 4 + 2 * 4 + 2
    assert len(page.views()) - len(players) == 3 + 2  # backgrounds stand still
    assert {view["data-frames"] for view in players} == {"8"}
    record = json.loads((run / "media/reconstruction/reconstruction.json").read_text())
    assert f"{record['psnr']:.2f} dB" in page.text
    assert f"{record['psnr_over_still']:+.2f} dB" in page.text
    assert f"{record['psnr'] - record['psnr_pca']:+.2f} dB" in page.text
    assert f"motion R² of {record['motion_r2']:.2f}" in page.text
    assert page.text.index("Did it work? Partly") < page.text.index("How to read this page")
    assert "worse than a still" in page.text
    assert "better than PCA" in page.text
    for clip, psnr, motion in zip(
        *(record["per_clip"][key] for key in ("id", "psnr", "motion_r2")), strict=True
    ):
        assert clip in page.text
        assert f"{psnr:.2f} dB" in page.text
        assert f"R² {motion:.2f}" in page.text
    distance = json.loads((run / "media/samples/samples.json").read_text())["nearest"]["latent_distance"][1]
    assert f"distance {distance:.3f}" in page.text
    assert f"of the clips {IDS[40]} and {IDS[41]}." in page.text
    assert "3:18 min" in page.text  # 300 steps of 0.66 s
    assert sum(tag == "svg" and attrs.get("class") == "chart" for tag, attrs in page.elements) == 6
    assert {"lr_latents", "laplacian", "2.13.0+cpu", "0001-demo"} <= set(page.text.split())
    assert "could not be shown" not in page.text


def test_the_curves_say_where_the_background_alone_was_trained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "background alone" not in page_of(run).text
    options = json.loads((run / "options.json").read_text())
    options["train"]["background_share"] = 0.15
    (run / "options.json").write_text(json.dumps(options))
    assert "background alone" in page_of(run).text
    passes = TrainOptions(**options["train"]).background_passes
    # A row is written after its step, so the pass that ends at `passes` is of the background.
    rows = [{"epoch": passes + shift} for shift in (-1, 0, 0.5, 7)]
    assert phases(rows, options) == {"background alone": rows[:2], "both streams": rows[2:]}
    assert phases(rows[:2], options) is None


def test_pictures_are_the_clips_in_order_and_color(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", clips=2, samples=2, frames=11, size=32)
    page = page_of(run)
    pairs = [
        (view, image)
        for (_, view), (tag, image) in zip(page.elements, page.elements[1:], strict=False)
        if view.get("class") == "view" and tag == "img" and "data-frames" in view
    ]
    folders = {"Original": "original", "Foreground": "foreground", "Mask": "mask"}
    reconstruction = run / "media/reconstruction"
    for i, clip in enumerate(IDS[:2]):
        for word, name in {**folders, "Reconstruction": "video"}.items():
            found = [decoded(v, im) for v, im in pairs if im["alt"] == f"{word} of clip {clip}"]
            assert len(found) == 1
            expected = np.load(reconstruction / f"{name}.npy")[i].transpose(1, 2, 3, 0)
            error = np.abs(found[0].astype(float) - expected).mean()
            assert error < (12 if name == "video" else 4)  # the coder smooths the noise of the made-up video
    alts = [image["alt"] for _, image in pairs]
    assert alts.index("Sample of sample 2") + 1 == alts.index("Training clip nearest to sample 2")


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(html)
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name)
    assert not re.search(r"https?:|@import|url\(|//[a-z0-9-]+\.[a-z]", html)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    assert not re.search(r"\beval\b|Function\(|fetch\(|XMLHttpRequest|\bimport\b|innerHTML", script[1])
    policy = next(
        a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "img-src data:" in policy
    # The script runs only if the policy names exactly its digest.
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    attack = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}&amp;\ud800"
    run = make_run(tmp_path / "a<script>alert(3)<")
    folder = run / "media/reconstruction"
    record = json.loads((folder / "reconstruction.json").read_text())
    record["shown"][0] = record["per_clip"]["id"][0] = attack
    write_json(folder / "reconstruction.json", record)
    samples = {"mapping": attack, "seed": attack, "nearest": {"id": [attack, attack]}}
    write_json(run / "media/samples/samples.json", samples)
    write_json(run / "options.json", {attack: {"clips": [attack], attack: attack}, "preset": attack})
    write_json(run / "environment.json", {"started": attack, "command": attack})
    write_json(
        run / "mapping/<b onclick=x>/mapping.json", {attack: attack, "epochs": [{"epoch": 0, "loss": 1}]}
    )
    page = page_of(run)
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert images
    assert all((attrs["src"] or "").startswith("data:image/webp;base64,") for attrs in images)
    assert "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}&amp;?" in page.text
    assert "a<script>alert(3)<" in page.text
    assert "<b onclick=x>" in page.text
    assert "49" not in page.text.split("Settings")[-1]


def test_run_without_anything_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = page_of(tmp_path / "empty")
    assert page.views() == []
    assert "Did it work? Nothing is measured yet" in page.text
    for verb in ("reconstruct RUN", "sample RUN", "interpolate RUN", "map RUN", "train CLIPS --out RUN"):
        assert f"vglann {verb}" in page.text
    assert "could not be shown" not in page.text


@pytest.mark.parametrize("gone", ["original", "video", "mask", "background", "foreground"])
def test_missing_stream_leaves_the_others(tmp_path: Path, gone: str) -> None:
    run = make_run(tmp_path / "run", clips=2, samples=1)
    (run / f"media/reconstruction/{gone}.npy").unlink()
    (run / "media/reconstruction/reconstruction.json").unlink()
    alts = {attrs["alt"] for tag, attrs in page_of(run).elements if tag == "img"}
    of_clips = {alt for alt in alts if alt and alt.endswith(" of clip 2")}
    labels = {"original": "Original", "video": "Reconstruction"}
    everything = {
        f"{labels.get(n, n.title())} of clip 2"
        for n in ("original", "video", "mask", "background", "foreground")
    }
    assert of_clips == (
        set() if gone == "video" else everything - {f"{labels.get(gone, gone.title())} of clip 2"}
    )


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    media = run / "media"
    whole = (media / "reconstruction/video.npy").read_bytes()
    (media / "reconstruction/video.npy").write_bytes(whole[: len(whole) // 2])
    np.save(media / "samples/mask.npy", np.zeros((2, 1, 8, 16, 15), np.uint8))
    np.save(media / "samples/foreground.npy", np.zeros((2, 3, 8, 16, 16), np.float32))
    np.save(media / "samples/background.npy", np.array([{"a": 1}], dtype=object))  # needs pickle
    np.save(media / "nearest/video.npy", np.zeros((1, 3, 8, 16, 16), np.uint8))
    (media / "interpolation/video.npy").write_bytes(b"")
    (media / "reconstruction/reconstruction.json").write_text("{")
    write_json(media / "samples/samples.json", [1, 2])
    (run / "options.json").write_bytes(b"\xff\xfe")
    (run / "environment.json").write_text("[" * 100_000)
    (run / "metrics.jsonl").write_text('{"stage": "glo", "step": 1, "loss": 2}\nnonsense\n3\n{"stage": "gl')
    write_json(run / "mapping/imle/mapping.json", {"epochs": [3, {"epoch": "x"}, {"epoch": 1, "loss": None}]})
    page = page_of(run)
    problems = page.text.split("Files that could not be shown")[1]
    for name in (
        "media/reconstruction/video.npy: ",
        "media/samples/mask.npy: shape (2, 1, 8, 16, 15) does not fit video.npy",
        "media/samples/foreground.npy: unexpected float32 array of shape (2, 3, 8, 16, 16)",
        "media/samples/background.npy: ",
        "media/nearest/video.npy: does not belong to these samples",
        "media/interpolation/video.npy: ",
        "media/reconstruction/reconstruction.json: ",
        "media/samples/samples.json: not a JSON object",
        "options.json: ",
        "environment.json: ",
        "metrics.jsonl: 1 damaged lines were passed over",
    ):
        assert name in problems
    assert len([view for view in page.views() if "data-frames" in view]) == 2  # the samples


def test_header_that_promises_too_much_costs_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "media/samples"
    write_arrays(folder, video=np.zeros((1, 3, 1, 1, 1), np.uint8))
    data = (folder / "video.npy").read_bytes()
    huge = b"(10000000, 3, 32, 64, 64)"
    header = data[:128].replace(b"(1, 3, 1, 1, 1), }" + b" " * (len(huge) - 15), huge + b", }")
    assert huge in header
    assert len(header) == 128
    (folder / "video.npy").write_bytes(header + data[128:])
    found = read_artifacts(run)
    assert found.samples.video is None
    assert len(found.problems) == 1


def test_numbers_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = run / "media/reconstruction"
    record = {"psnr": math.nan, "psnr_mean_color": "x", "clips": True, "shown": 5, "per_clip": {"id": 3}}
    write_json(folder / "reconstruction.json", record)
    rows = [
        {"stage": "glo", "step": i, "loss": [math.nan, 1e308, -1e308, 0, 5][i], "psnr": math.inf}
        for i in range(5)
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "glo", "step": 1%s}' % ("0" * 400)
    )
    page = page_of(run)
    assert "Reconstruction PSNR" not in page.text
    assert "nan" not in page.text.lower().split()
    assert "inf dB" not in page.text


def test_more_clips_than_a_page_takes(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", clips=2, samples=30, frames=2))
    assert sum((attrs.get("alt") or "").startswith("Sample of ") for _, attrs in page.elements) == 24
    assert "24 of 30 are shown" in page.text


def test_full_page_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", clips=20, samples=16, frames=32, size=64)
    first = write_report(run).read_bytes()
    assert len(first) < 10e6
    assert write_report(run).read_bytes() == first


def test_run_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VglannError, match="nowhere"):
        write_report(tmp_path / "nowhere")
