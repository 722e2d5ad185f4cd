"""resume.py: latents follow their clips when a training resumes with other clips."""

import json

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.of_run import clip_changes
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.latents import LatentTable
from vglann_fast.glo.resume import check_clips, matched_latents
from vglann_fast.run.folder import RunDir

VIDEOS = moving_squares(9)


@pytest.fixture(params=["sparse", "dense", "lazy"])
def stopped(request, tmp_path):
    """A run on clips 0..5, stopped in the middle of its second pass; then the folder holds 8, 4, 5, 2, 6."""
    folder = write_clip_folder(tmp_path / "clips", VIDEOS[:6])
    options = tiny_options(batch_size=2, latent_mode=request.param)
    run = new_run(tmp_path / "run", folder, options)
    new_training(ClipSet.open(folder), options, run).loop(max_steps=4)  # 3 a pass
    trained = load_trained(run)
    write_clip_folder(tmp_path / "other", VIDEOS[[8, 4, 5, 2, 6]])
    run.options["clips"] = str(tmp_path / "other")
    (run.path / "options.json").write_text(json.dumps(run.options))
    return run, trained


def resumed(run, on_mismatch):
    clips = ClipSet.open(run.options["clips"])
    from vglann_fast.options.fields import options_from_json
    from vglann_fast.options.training import TrainOptions

    training = new_training(clips, options_from_json(TrainOptions, run.options["train"]), run)
    training.resume(on_mismatch)
    return training


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


def test_error_lists_what_is_missing_and_new(stopped, capsys):
    run, trained = stopped
    present = ClipSet.open(run.options["clips"]).ids
    with pytest.raises(VglannError, match=r"3 missing .*2 new .*--latents-on-mismatch keep") as caught:
        resumed(run, "error")
    for clip in set(trained.ids) ^ set(present):
        assert clip in str(caught.value)
    assert main(["train", "--resume", str(run.path)]) == 2
    assert "3 missing" in capsys.readouterr().err
    assert load_trained(RunDir.open(run.path)).ids == trained.ids


def test_keep_moves_latents_with_their_clips(stopped, caplog):
    run, trained = stopped
    training = resumed(run, "keep")
    ids = list(training.latents.ids)
    for clip in set(ids) & set(trained.ids):
        mine, old = training.latents.rows[ids.index(clip)], trained.latents[trained.ids.index(clip)]
        torch.testing.assert_close(unit(mine[None]), unit(old[None]), rtol=0, atol=1e-2)
    assert (training.epoch, training.position) == (1, 0)
    assert "3 missing" in training.run.warnings[-1]
    assert "3 latents were kept, 2 are new" in training.run.warnings[-1]
    generator = run.checkpoints.load()[1]["generator"]
    for key, value in training.generator.state_dict().items():
        assert torch.equal(value, generator[key]), key
    assert main(["train", "--resume", str(run.path), "--latents-on-mismatch", "keep"]) == 0
    assert "3 latents were kept" in caplog.text
    after = load_trained(RunDir.open(run.path))
    assert after.ids == ids
    assert torch.isfinite(after.latents).all()
    assert main(["reconstruct", str(run.path)]) == 0  # the run belongs to the clips it has now


def test_init_starts_all_latents_anew_and_keeps_the_generator(stopped):
    run, _ = stopped
    clips = ClipSet.open(run.options["clips"])
    training = resumed(run, "init")
    fresh = new_training(clips, training.options, run)
    flushed = training.latents.retraction is None
    torch.testing.assert_close(
        training.latents.rows, unit(fresh.latents.rows) if flushed else fresh.latents.rows
    )
    assert not training.latents.adam.exp_avg.any()
    generator = run.checkpoints.load()[1]["generator"]
    assert torch.equal(training.generator.stem.weight, generator["stem.weight"])
    training.loop(max_steps=training.step + 1)


def test_the_same_clips_resume_as_ever_with_any_choice(stopped, tmp_path):
    run, trained = stopped
    run.options["clips"] = str(tmp_path / "clips")
    for choice in ("keep", "init"):
        training = resumed(run, choice)
        assert training.position == 1
        assert torch.equal(training.latents.rows, trained.latents)
        assert not training.run.warnings


def test_moments_and_counts_go_along():
    table = LatentTable(torch.zeros(2, 8), ["new", "b"], tiny_options())
    saved = {
        "rows": torch.arange(24.0).reshape(3, 8),
        "adam.exp_avg": torch.arange(100.0, 124).reshape(3, 8),
        "adam.exp_avg_sq": torch.ones(3, 8),
        "adam.row_step": torch.tensor([4, 5, 6]),
        "adam.step": torch.tensor(7),
    }
    matched = matched_latents(saved, ["a", "b", "c"], table, "keep")
    assert matched.keys() == saved.keys()
    assert matched["rows"].tolist() == [[0.0] * 8, list(range(8, 16))]
    assert matched["adam.exp_avg"].tolist() == [[0.0] * 8, list(range(108, 116))]
    assert matched["adam.row_step"].tolist() == [7, 5]
    assert matched["adam.step"].item() == 7
    assert matched_latents(saved, ["a", "b", "c"], table, "init")["adam.step"].item() == 0


def test_changes_in_words():
    assert clip_changes(["a", "b"], ["a", "b"]) == ""
    assert clip_changes(["a", "b"], ["b", "a"]) == "the clips are in another order"
    assert clip_changes(["a", "b"], ["b", "c"]) == "1 missing (a), 1 new (c)"
    many = [f"{i:02d}" for i in range(30)]
    assert clip_changes(many, many[:1]).startswith("29 missing (01, 02,")
    assert clip_changes(many, many[:1]).endswith("10, ...), 0 new")
    assert check_clips(many, many, "error") == ""
    assert "0 latents were kept, 1 are new" in check_clips(many, many[:1], "init")
