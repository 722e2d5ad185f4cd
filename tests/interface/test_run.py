"""`vf.Run`: the same arrays as the commands write, whatever was called before, and mistakes in one sentence."""

import base64
import io
import json
import re
import shutil

import av
import numpy as np
import pytest
import torch

import vglann_fast as vf
from vglann_fast.cli.main import main
from vglann_fast.run.folder import RunDir


def test_the_parts_of_a_run_have_the_shapes_that_are_documented(run):
    assert isinstance(run.generator, vf.TwoStreamGenerator)
    assert run.latents.shape == (6, 8)
    assert run.latents.dtype == torch.float32
    assert len(run.ids) == 6
    assert run.step == 6
    assert run.options.width == 4
    assert run.mappings == ["imle"]
    assert run.generator(run.latents[:2]).shape == (2, 3, 16, 32, 32)


def test_a_loaded_run_is_the_one_that_was_trained(run):
    loaded = vf.load(run.path)
    assert torch.equal(loaded.latents, run.latents)
    assert np.array_equal(loaded.sample(3, seed=4), run.sample(3, seed=4))


def test_nothing_that_is_called_before_changes_what_comes_out(run):
    """Sampling estimates BatchNorm statistics of its own; none of them may stay."""
    videos = run.reconstruct(run.ids[:2])
    calls = [
        lambda run: run.sample(4, seed=3),
        lambda run: run.reconstruct(),
        lambda run: run.interpolate(run.ids[0], run.ids[1], 3),
        lambda run: run.invert(videos, starts=1, steps=2).numpy(),
    ]
    first = [call(vf.load(run.path)) for call in calls]
    used = vf.load(run.path)
    for call, result in zip([*calls, *calls], [*first, *first], strict=True):
        used.sample(2, seed=8)
        assert np.array_equal(call(used), result)


def test_samples_are_the_array_that_the_command_writes(run, capsys):
    assert main(["sample", str(run.path), "-n", "5", "--seed", "2"]) == 0
    written = np.load(run.path / "media" / "samples" / "video.npy")
    samples = run.sample(5, seed=2)
    assert samples.dtype == np.uint8
    assert np.array_equal(samples, written)
    assert not np.array_equal(samples, run.sample(5, seed=3))


def test_reconstructions_are_the_array_that_the_command_writes(run, capsys):
    assert main(["reconstruct", str(run.path)]) == 0
    written = np.load(run.path / "media" / "reconstruction" / "video.npy")
    assert np.array_equal(run.reconstruct(), written)
    chosen = [run.ids[4], run.ids[1], run.ids[4]]
    assert np.array_equal(run.reconstruct(chosen), written[[4, 1, 4]])
    assert np.array_equal(run.reconstruct(run.ids[2]), written[2:3])


def test_an_interpolation_is_the_array_that_the_command_writes(run, capsys):
    assert main(["interpolate", str(run.path), "--steps", "4", "--seed", "1"]) == 0
    media = run.path / "media" / "interpolation"
    a, b = json.loads((media / "interpolation.json").read_text())["between"]
    written = np.load(media / "video.npy")
    assert np.array_equal(run.interpolate(a, b, 4), written)
    ends = [run.latents[run.ids.index(clip)] for clip in (a, b)]
    assert np.array_equal(run.interpolate(ends[0], 8 * ends[1], 4), written)


def test_arrays_of_any_layout_are_inverted_with_gradients_switched_off(run):
    videos = run.reconstruct(run.ids[:2])
    frozen = np.ascontiguousarray(videos[:, ::-1])[:, ::-1]
    frozen.flags.writeable = False
    with torch.no_grad():
        latents = run.invert(frozen, starts=2, steps=2)
    assert latents.shape == (2, 8)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(2))
    assert torch.equal(latents, run.invert(videos, starts=2, steps=2))


def test_a_fitted_mapping_is_on_record_for_a_replay(run, tmp_path, capsys):
    shutil.copytree(
        run.path, tmp_path / "run", ignore=shutil.ignore_patterns("media", "report", "evaluation")
    )
    copied = vf.load(tmp_path / "run")
    assert (
        copied.fit_mapping("gaussian", seed=3, holdout_fraction=0.3) == copied.path / "mapping" / "gaussian"
    )
    assert copied.mappings == ["gaussian", "imle"]
    assert copied.sample(2, kind="gaussian").shape == (2, 3, 16, 32, 32)
    last = json.loads((copied.path / "history.jsonl").read_text().splitlines()[-1])
    assert last["verb"] == "map"
    assert main(["replay", str(copied.path)]) == 0
    assert {"SAME mapping/gaussian", "SAME mapping/imle"} <= set(capsys.readouterr().out.splitlines())


def test_a_refit_leaves_no_trace_in_a_run_that_was_loaded_before(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    copied = vf.load(tmp_path / "run")
    before = copied.sample(3)
    copied.fit_mapping("imle", epochs=2, seed=9)
    assert not np.array_equal(copied.sample(3), before)
    copied.fit_mapping("imle", epochs=3)
    assert np.array_equal(copied.sample(3), before)


def test_an_evaluation_writes_its_records_and_warns(run, caplog):
    result = vf.evaluate(run, features=(), kinds="imle")
    assert result.folder == run.path / "evaluation"
    assert json.loads((result.folder / "imle.json").read_text()) == result.records["imle"]
    assert result.records["reconstruction"]["train"]["clips"] == 6
    assert any("held out" in line for line in caplog.messages)


def test_a_report_is_a_page_in_the_run(run):
    page = run.report()
    assert page == run.path / "report" / "index.html"
    assert page.is_file()


def test_a_run_that_is_being_written_takes_no_mapping(run):
    with RunDir.open(run.path).locked():
        for write in (lambda: run.fit_mapping("gaussian"), lambda: run.evaluate(features=())):
            with pytest.raises(vf.VglannError, match="being written"):
                write()
    assert run.mappings == ["imle"]


def frames_of(page):
    """The number of pictures in the GIF of a page."""
    data = re.search(r'src="data:image/gif;base64,([^"]+)"', page).group(1)
    with av.open(io.BytesIO(base64.b64decode(data))) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_run_shows_itself(run):
    page = run._repr_html_()
    assert str(run.path) in page
    assert "imle" in page
    assert frames_of(page) == 16


@pytest.fixture
def unmapped(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("mapping"))
    return vf.load(tmp_path / "run")


def test_sampling_without_a_mapping_says_how_to_fit_one(unmapped):
    for kind in (None, "vae"):
        with pytest.raises(vf.VglannError, match="vglann map"):
            unmapped.sample(2, kind=kind)
    assert "mappings: none" in unmapped._repr_html_()


def test_of_several_mappings_without_imle_one_must_be_named(unmapped):
    unmapped.fit_mapping("gaussian")
    assert unmapped.sample(1).shape[0] == 1
    unmapped.fit_mapping("gmm", components="1", holdout_fraction=0.0)
    with pytest.raises(vf.VglannError, match="gaussian, gmm"):
        unmapped.sample(1)


MISTAKES = {
    "no samples": (lambda run: run.sample(0), "n"),
    "half a sample": (lambda run: run.sample(1.5), "n"),
    "negative seed": (lambda run: run.sample(1, seed=-1), "seed"),
    "unknown clip": (lambda run: run.reconstruct(["0" * 16]), "Run.ids"),
    "no clips": (lambda run: run.reconstruct([]), "Run.ids"),
    "one step": (lambda run: run.interpolate(run.ids[0], run.ids[1], 1), "steps"),
    "latent of another length": (lambda run: run.interpolate(run.ids[0], torch.ones(9), 3), "b: "),
    "latent of zeros": (lambda run: run.interpolate(torch.zeros(8), run.ids[0], 3), "a: "),
    "latent that is not finite": (
        lambda run: run.interpolate(run.ids[0], torch.full((8,), torch.nan), 3),
        "b: ",
    ),
    "opposite latents": (lambda run: run.interpolate(torch.ones(8), -torch.ones(8), 3), "opposite"),
    "floats to invert": (lambda run: run.invert(np.zeros((1, 3, 16, 32, 32))), "uint8"),
    "one video to invert": (lambda run: run.invert(np.zeros((3, 16, 32, 32), np.uint8)), "n, 3, T, H, W"),
    "larger videos": (lambda run: run.invert(np.zeros((1, 3, 16, 64, 64), np.uint8)), "the run makes"),
    "nothing to invert": (lambda run: run.invert(np.zeros((0, 3, 16, 32, 32), np.uint8)), "at least one"),
    "no starts": (lambda run: run.invert(np.zeros((1, 3, 16, 32, 32), np.uint8), starts=0), "starts"),
    "unknown kind": (lambda run: run.fit_mapping("gan"), "imle"),
    "misspelled option": (lambda run: run.fit_mapping("imle", epoch=3), "did you mean epochs?"),
    "option of another kind": (lambda run: run.fit_mapping("gaussian", epochs=3), "imle"),
    "wrong type": (lambda run: run.fit_mapping("imle", epochs="3"), "epochs"),
    "unknown preset": (lambda run: run.fit_mapping("imle", preset="best"), "modern"),
    "unknown features": (lambda run: run.evaluate(features="pixels"), "pixels"),
    "negative number to invert": (lambda run: run.evaluate(features=(), invert=-1), "invert"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence(run, name):
    call, words = MISTAKES[name]
    before = {file for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(vf.VglannError, match=re.escape(words)) as caught:
        call(run)
    assert "\n" not in str(caught.value)
    assert {file for file in run.path.rglob("*") if file.is_file()} - before <= {run.path / ".lock"}


def test_what_is_not_a_run_cannot_be_loaded(run, clips, tmp_path):
    with pytest.raises(vf.VglannError, match="vglann train"):
        vf.load(clips)
    with pytest.raises(vf.VglannError, match="give the run folder"):
        vf.load(run.path / "options.json")
    with pytest.raises(vf.VglannError, match="not a run"):
        vf.load(tmp_path / "nothing")


def test_a_run_of_a_newer_version_says_to_update(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    file = tmp_path / "run" / "options.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(vf.VglannError, match="pip install -U vglann-fast"):
        vf.load(tmp_path / "run")


def test_a_run_without_a_checkpoint_says_how_to_continue(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(vf.VglannError, match="--resume"):
        vf.load(tmp_path / "run")
    assert "--resume" in vf.Run(tmp_path / "run")._repr_html_()


@pytest.mark.parametrize(("name", "value"), [("device", "tpu9"), ("kernels", "warp"), ("kernels", "triton")])
def test_a_device_or_kernels_that_cannot_be_used_are_refused_when_loading(run, monkeypatch, name, value):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(vf.VglannError, match=f"--{name}"):
        vf.load(run.path, **{"device": "cpu", name: value})
