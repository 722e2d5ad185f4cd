"""The background phase: what learns in it, how it becomes the foreground, and that a resume notices nothing."""

import pytest
import torch
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import to_range
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.background import background_options, inflate
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.losses import glo_loss, mean_frames
from vglann_fast.glo.optimizer import learning_rate_factor
from vglann_fast.glo.train import train
from vglann_fast.metrics.reconstruction import reconstruct
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir

# Five epochs: 3 passes of 2 steps for the background, then 5 full passes.
PHASES = {"background_share": 0.03, "epochs": 5}
BOUNDARY, STEPS = 6, 16
RECIPE = {**PHASES, "optimizer": "muon", "ema": 0.9, "loss": "laplacian:1,l2:2"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(6))


def training_on(clips, run, options):
    return new_training(ClipSet.open(clips, "train"), options, run)


def tensors(run):
    _, parts = run.checkpoints.load()
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def different(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(
    ("epochs", "share", "background", "full"),
    [
        (200, 0.0, 0, 200),
        (20, 0.25, 100, 15),  # 218 clips of a film
        (8, 0.25, 40, 6),
        (150, 0.25, 100, 145),  # 20 clips of the demo, and with more epochs 2,000 or 50,000
        (1, 0.9, 18, 1),
        (2, 0.99, 40, 1),
    ],
)
def test_phases_share_the_cost_of_the_epochs(epochs, share, background, full):
    options = TrainOptions(epochs=epochs, background_share=share)
    assert (options.background_passes, options.full_passes) == (background, full)


@pytest.mark.parametrize("schedule", ["cosine", "halve-every-tenth"])
def test_rates_are_constant_in_the_background_phase_and_then_follow_the_schedule(schedule):
    options = TrainOptions(epochs=20, background_share=0.25, schedule=schedule)
    plain = TrainOptions(epochs=15, schedule=schedule)
    factors = [learning_rate_factor(options, epoch) for epoch in range(options.passes)]
    assert factors[:100] == [1.0] * 100
    assert factors[100:] == [learning_rate_factor(plain, epoch) for epoch in range(15)]


def test_the_target_is_the_mean_frame():
    clips = torch.from_numpy(moving_squares(2))
    batch = Batch(clips, torch.arange(2), torch.arange(2))
    background = torch.randn(2, 3, *clips.shape[-2:], dtype=torch.float64)
    options = background_options(
        TrainOptions(loss="l2:3,lite0", frame_reduction="sum-but-last", mask_weight=1.0)
    )
    loss, video = glo_loss(None, background, batch, options, with_video=True)
    real = to_range(clips, torch.float64, (-1.0, 1.0))
    expected = 3 * (background.tanh() - real.mean(2)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(video[:, :, 0], background.tanh())
    torch.testing.assert_close(
        mean_frames(clips, torch.float64, (-1.0, 1.0)), mean_frames(real, torch.float64, (-1.0, 1.0))
    )


def test_a_loss_of_networks_alone_is_a_pyramid_in_the_background_phase():
    assert background_options(TrainOptions(loss="resnet50-3d")).loss_terms == {"laplacian": 1.0}
    assert background_options(TrainOptions(loss="lite0:0.1,l1:2")).loss_terms == {"l1": 2.0}
    assert background_options(TrainOptions(loss="l2,motion:4")).loss_terms == {"l2": 1.0}


def test_the_background_alone_is_the_background_of_the_whole():
    generator = TwoStreamGenerator(latent_dim=8, width=4, frames=32, size=32).channels_last()
    z = torch.randn(3, 8)
    torch.testing.assert_close(generator.background_logits(z), generator.logits(z)[1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_after_inflation_the_foreground_is_the_background_in_every_frame(training):
    torch.manual_seed(0)
    generator = TwoStreamGenerator(latent_dim=8, width=4, frames=48, size=32).channels_last().double()
    for _ in range(3):
        generator.background_logits(torch.randn(4, 8).double())  # statistics of its own
    mask = generator.video.head.weight[:, 3].clone(), generator.video.head.bias[3].clone()
    with torch.no_grad():
        for layer in range(1, 5):
            getattr(generator.background, f"norm{layer}").weight.uniform_(0.5, 2)
    generator.train(training)
    inflate(generator)
    foreground, _, background = generator.streams(torch.randn(5, 8).double())
    assert (foreground - background[:, :, None]).abs().max() < 1e-11
    assert background.std() > 0.01
    assert torch.equal(generator.video.head.weight[:, 3], mask[0])
    assert torch.equal(generator.video.head.bias[3], mask[1])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_only_the_background_and_the_latents_learn_until_the_boundary(clips, tmp_path, optimizer):
    options = tiny_options("modern", **PHASES, optimizer=optimizer)
    run = new_run(tmp_path / "run", clips, options)
    training = training_on(clips, run, options)
    split = training.generator.video_positions * training.generator.channels
    before = {name: value.clone() for name, value in training.generator.state_dict().items()}
    rows = training.latents.rows.clone()
    training.loop(max_steps=BOUNDARY - 1, log_every=1)
    after = {name: value.clone() for name, value in training.generator.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n.startswith("background.")} | {"stem.weight"}
    assert torch.equal(after["stem.weight"][:split], before["stem.weight"][:split])
    assert not torch.equal(rows, training.latents.rows)
    losses = [row["loss"] for row in run.logs.metrics("glo")]
    assert losses[-1] < losses[0]
    training.loop(max_steps=BOUNDARY)
    foreground, _, background = training.generator.streams(training.latents.rows)
    assert (foreground - background[:, :, None]).abs().max() < 1e-5
    kept = {name: tensor.clone() for name, tensor in training.optimizer.tensors().items()}
    assert any(tensor.any() for name, tensor in kept.items() if "background" in name)
    training.loop(max_steps=BOUNDARY + 1)
    assert not torch.equal(training.generator.state_dict()["video.head.weight"], after["video.head.weight"])
    steps = training.optimizer.tensors()
    assert steps["step.background.head.weight"] == BOUNDARY + 1
    assert steps["step.video.head.weight"] == 1


@pytest.mark.parametrize("stop", [3, BOUNDARY, 9])
@pytest.mark.parametrize("changes", [PHASES, RECIPE], ids=["adam", "recipe"])
def test_a_resume_in_any_phase_changes_no_bit(clips, tmp_path, changes, stop):
    options = tiny_options("modern", **changes)
    whole, parts = (new_run(tmp_path / name, clips, options) for name in ("whole", "parts"))
    train(ClipSet.open(clips, "train"), whole, log_every=1)
    training_on(clips, parts, options).loop(max_steps=stop, log_every=1)
    assert parts.checkpoints.load()[0]["step"] == stop
    train(ClipSet.open(clips, "train"), RunDir.open(parts.path), log_every=1, resume=True)
    assert not different(tensors(whole), tensors(parts))
    figures = [[(r["step"], r["loss"], r["psnr"]) for r in run.logs.metrics("glo")] for run in (whole, parts)]
    assert figures[0] == figures[1]
    assert [step for step, *_ in figures[0]] == list(range(1, STEPS + 1))


def test_a_resume_across_the_boundary_takes_other_rates(clips, tmp_path):
    options = tiny_options("modern", **RECIPE)
    run = new_run(tmp_path / "run", clips, options)
    training_on(clips, run, options).loop(max_steps=3)
    rates = ["--lr-muon", "0.001", "--lr-generator", "0.0005", "--lr-latents", "0.002"]
    assert main(["train", "--resume", str(run.path), *rates, "--device", "cpu"]) == 0
    (entry,) = RunDir.open(run.path).options["resumed"]
    assert entry["changed"]["lr_muon"] == [0.005, 0.001]
    saved = tensors(run)
    last = learning_rate_factor(options, options.passes - 1)
    assert saved["optimizer/lr_muon"].item() == pytest.approx(0.001 * last)
    assert saved["optimizer/lr"].item() == pytest.approx(0.0005 * last)


def test_a_run_stopped_in_the_background_phase_shows_the_background(clips, tmp_path):
    options = tiny_options("modern", **PHASES)
    run = new_run(tmp_path / "run", clips, options)
    training_on(clips, run, options).loop(max_steps=4)
    trained = load_trained(run)
    foreground, _, background = trained.generator.streams(trained.latents)
    assert (foreground - background[:, :, None]).abs().max() < 1e-5
    assert reconstruct(run.path)[1]["motion_r2"] == pytest.approx(0, abs=0.05)


def test_the_boundary_is_saved_so_that_a_lack_of_memory_there_loses_nothing(clips, tmp_path):
    options = tiny_options("modern", **PHASES)
    run = new_run(tmp_path / "run", clips, options)
    training = training_on(clips, run, options)

    def full(z):
        raise torch.OutOfMemoryError("no room")

    training.logits = full
    with pytest.raises(torch.OutOfMemoryError):
        training.loop(checkpoint_every=1000)
    assert run.checkpoints.load()[0]["step"] == BOUNDARY


def test_clips_that_are_all_still_are_learned_and_have_no_motion(tmp_path):
    still = moving_squares(4)
    still[:] = still[:, :, :1]
    clips = write_clip_folder(tmp_path / "clips", still)
    run = new_run(tmp_path / "run", clips, tiny_options("modern", **RECIPE))
    train(ClipSet.open(clips, "train"), run)
    assert reconstruct(run.path)[1]["still_clips"] == 4


def test_two_clips_are_enough(tmp_path):
    clips = write_clip_folder(tmp_path / "clips", moving_squares(2))
    run = new_run(tmp_path / "run", clips, tiny_options("modern", **RECIPE))
    train(ClipSet.open(clips, "train"), run)
    assert reconstruct(run.path)[1]["pca_exact"]


BAD = {
    "a share of all": ({"background_share": 1.0}, "--background-share"),
    "a negative share": ({"background_share": -0.1}, "--background-share"),
    "less than a pass": ({"background_share": 0.001, "epochs": 5}, "--background-share"),
    "not a number": ({"background_share": float("nan")}, "--background-share"),
    "a wider background": ({"background_share": 0.2, "variant": "expanded"}, "--variant expanded"),
    "an average of nothing": ({"ema": 1.0}, "--ema"),
    "a negative average": ({"ema": -0.5}, "--ema"),
    "a rate of zero": ({"optimizer": "muon", "lr_muon": 0.0}, "--lr-muon"),
    "a rate without its optimizer": ({"lr_muon": 0.1}, "--optimizer muon"),
}


@pytest.mark.parametrize(("changes", "named"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_in_one_line(changes, named):
    with pytest.raises(VglannError, match=named) as error:
        TrainOptions(**changes)
    assert "\n" not in str(error.value)
