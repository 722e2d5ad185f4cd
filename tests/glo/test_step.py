"""The step and what is put around it: accumulation, activation checkpointing, compilation, CUDA graphs."""

import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from tiny import new_run, tiny_options
from torch import nn
from vglann_kernels.impl import implementations, preferring, requested, resolve, using_impl
from vglann_kernels.upsample_conv import op as upsample_conv

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.pixels import to_range
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import ImageNorm, VideoNorm, batch_norms
from vglann_fast.glo.compatibility import check_compatibility, use_graph, why_no_graph
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.memory import checkpoint_activations
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime.distributed import Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(6))


def training_of(clips, path, dtype=torch.float32, **changes):
    preset = changes.pop("preset", "modern")
    options = tiny_options(preset, **changes)
    return new_training(ClipSet.open(clips, "train"), options, new_run(path, clips, options), dtype=dtype)


class ReferenceTwin:
    """The same training in the plainest form: contiguous, 3-D BatchNorm, floating-point targets, one op at a time."""

    def __init__(self, training):
        self.training = training
        generator = training.generator
        for module in generator.modules():
            if isinstance(module, VideoNorm):
                module.forward = lambda x, norm=module: nn.functional.relu(
                    nn.functional.batch_norm(
                        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, norm.eps
                    )
                )
        for name, parameter in generator.named_parameters():
            parameter.data = parameter.data.contiguous()
            state = training.optimizer.state.get(name, {})
            for moment in state.keys() & {"exp_avg", "exp_avg_sq"}:
                state[moment] = state[moment].contiguous()
        table = torch.from_numpy(training.clips.read())
        self.table = to_range(table, training.latents.rows.dtype, training.options.target_limits)

    def train_step(self):
        def batch(rows, following=None):
            at = torch.from_numpy(rows)
            return Batch(self.table, at, at)

        self.training.source.batch = batch
        return self.training.train_step()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("preset", ["modern-2026a", "paper"])
def test_twin_training_is_equal_to_rounding_over_30_steps(clips, tmp_path, preset, dtype, tolerance):
    changes = {"preset": preset, "epochs": 15, "data": "resident"}
    fast = training_of(clips, tmp_path / "fast", dtype, **changes)
    twin = ReferenceTwin(training_of(clips, tmp_path / "reference", dtype, **changes))
    assert_twins(fast, twin, 30, tolerance)


def test_twins_with_both_phases_and_muon_are_equal_to_rounding(clips, tmp_path):
    """10 passes of 2 steps for the background, then 5 full ones."""
    changes = {"epochs": 25, "data": "resident", "optimizer": "muon", "background_share": 0.02, "ema": 0.9}
    changes["loss"] = "laplacian:1,l2:2"
    fast = training_of(clips, tmp_path / "fast", torch.float64, **changes)
    twin = ReferenceTwin(training_of(clips, tmp_path / "reference", torch.float64, **changes))
    assert_twins(fast, twin, 30, 1e-8)
    averages = [one.average.generator.stem.weight for one in (fast, twin.training)]
    torch.testing.assert_close(*averages, atol=1e-6, rtol=0)


def assert_twins(fast, twin, steps, tolerance):
    losses = [[one.train_step()[0].item() for one in (fast, twin)] for _ in range(steps)]
    for quick, plain in losses:
        assert quick == pytest.approx(plain, rel=tolerance)
    assert losses[-1][0] < 0.9 * losses[0][0]
    error = (fast.latents.rows - twin.training.latents.rows).norm() / fast.latents.rows.norm()
    assert error < 10 * tolerance


def former_forward(self, x, *, relu=True):
    """The layers before they were an op: PyTorch's 2-D layer, by way of time and rows joined, and ReLU in place."""
    flat = x.flatten(2, 3) if x.ndim == 5 else x
    self.num_batches_tracked.add_(1)
    running = self.running_mean, self.running_var
    y = nn.functional.batch_norm(flat, *running, self.weight, self.bias, True, self.momentum, self.eps)
    y = nn.functional.relu(y, inplace=True) if relu else y
    return y.unflatten(2, x.shape[2:4]) if x.ndim == 5 else y


@pytest.mark.parametrize(
    "changes",
    [{"preset": "paper"}, {"precision": "bf16"}, {"variant": "expanded", "optimizer": "muon"}],
    ids=str,
)
def test_norm_and_relu_as_one_op_train_as_the_two_layers_did_bit_for_bit(
    clips, tmp_path, monkeypatch, changes
):
    trained = []
    for path in ("now", "before"):
        if path == "before":
            monkeypatch.setattr(VideoNorm, "forward", former_forward)
            monkeypatch.setattr(ImageNorm, "forward", former_forward)
        training = training_of(clips, tmp_path / path, **changes)
        losses = [training.train_step()[0] for _ in range(3)]
        trained.append([*losses, *training.generator.state_dict().values(), training.latents.rows])
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))


def test_accumulation_is_the_mean_over_batches_and_updates_once(clips, tmp_path):
    training = training_of(clips, tmp_path / "two", torch.float64, batch_size=3, accumulate=2)
    before = training.latents.rows.clone()
    _, _, batch = training.train_step()
    gradient = training.generator.stem.weight.grad.clone()
    assert training.optimizer.tensors()["step.stem.weight"].item() == 1
    assert training.latents.adam.row_step.tolist() == [1] * 6
    assert len(batch.rows) == 3
    assert training.steps_per_epoch == 1

    apart = training_of(clips, tmp_path / "one", torch.float64, batch_size=3)
    table = torch.from_numpy(apart.clips.read())
    from vglann_fast.glo.loader import clip_order
    from vglann_fast.glo.losses import glo_loss

    apart.begin_epoch(0)
    expected = 0
    for part in torch.from_numpy(clip_order(0, 0, 6)).split(3):
        z = before[part].clone().requires_grad_()
        loss, _ = glo_loss(
            *apart.generator.logits(z), Batch(table, part, part), apart.options, with_video=False
        )
        expected = expected + torch.autograd.grad(loss, apart.generator.stem.weight)[0] / 2
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_activation_checkpointing_changes_no_number(variant):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        generator = TwoStreamGenerator(variant, 8, 4, frames=16, size=32).channels_last().train()
        if checkpointed:
            checkpoint_activations(generator)
        z = torch.randn(3, 8, requires_grad=True)
        head, background = generator.logits(z)
        (head.square().mean() + background.square().mean()).backward()
        statistics = [
            s for norm in batch_norms(generator) for s in (norm.running_mean, norm.num_batches_tracked)
        ]
        results.append([z.grad, *(p.grad for p in generator.parameters()), *statistics])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("block", [using_impl("reference"), preferring({"step_guard": "triton"})])
def test_a_layer_that_runs_again_in_another_thread_takes_the_same_kernels(block, monkeypatch):
    """As on a GPU, where the backward pass has a thread of its own."""
    monkeypatch.setitem(implementations("step_guard"), "triton", lambda device: None)
    generator = TwoStreamGenerator("original", 2, 2, frames=16, size=16)
    checkpoint_activations(generator)
    seen = []

    def layer(x):
        seen.append((requested("nearest"), resolve("step_guard", device="cpu")))
        return x.square()

    x = torch.ones(2, requires_grad=True)
    with block:
        y = generator.video.run(layer, x).sum()
    backward = threading.Thread(target=y.backward)
    backward.start()
    backward.join()
    assert len(seen) == 2
    assert seen[0] == seen[1] != (requested("nearest"), resolve("step_guard", device="cpu"))
    assert x.grad.tolist() == [2.0, 2.0]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "processes", "source", "precision", "reason"),
    [
        ({"accumulate": 2}, 1, "resident", "bf16", "--accumulate 2"),
        ({}, 4, "resident", "bf16", "4 processes"),
        ({}, 1, "pinned", "bf16", "--data pinned"),
        ({"compile": True}, 1, "resident", "bf16", "--compile true"),
        ({"checkpoint_activations": True}, 1, "resident", "bf16", "--checkpoint-activations true"),
        ({}, 1, "resident", "fp16", "--precision fp16"),
    ],
)
def test_graphs_not_tested_are_refused(changes, processes, source, precision, reason, monkeypatch):
    gpu = torch.device("cuda", 0)
    given = {"processes": processes, "source": source, "precision": precision}
    assert reason in why_no_graph(TrainOptions(**changes), gpu, **given)
    with pytest.raises(VglannError, match=f"--cuda-graph on: it was not tested with {reason}"):
        use_graph(TrainOptions(cuda_graph="on", **changes), gpu, **given)
    assert not use_graph(TrainOptions(cuda_graph="off", **changes), gpu, **given)
    assert not use_graph(TrainOptions(**changes), gpu, **given)


def test_auto_takes_a_graph_only_where_it_was_measured(caplog):
    gpu, given = torch.device("cuda", 0), {"processes": 1, "source": "resident", "precision": "bf16"}
    assert use_graph(TrainOptions(cuda_graph="on"), gpu, **given)
    assert "`vglann tune`" in caplog.text
    assert not use_graph(TrainOptions(), gpu, **given)
    caplog.clear()
    assert use_graph(TrainOptions(), gpu, **given, measured=True)
    assert use_graph(TrainOptions(cuda_graph="on"), gpu, **given, measured=True)
    assert not use_graph(TrainOptions(cuda_graph="off"), gpu, **given, measured=True)
    assert not use_graph(TrainOptions(), gpu, **{**given, "source": "pinned"}, measured=True)
    assert not caplog.text


def test_options_nobody_tried_together_are_refused():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    check_compatibility(TrainOptions(compile=True), Ranks(0, 2), "bf16", gpu)
    check_compatibility(TrainOptions(deterministic=True), Ranks(0, 2), "fp32", cpu)
    for options, ranks, precision in (
        (TrainOptions(compile=True, sync_bn=True), Ranks(0, 2), "bf16"),
        (TrainOptions(compile=True, checkpoint_activations=True), Ranks(), "bf16"),
        (TrainOptions(compile=True, deterministic=True), Ranks(), "fp32"),
        (TrainOptions(deterministic=True), Ranks(0, 2), "fp32"),
        (TrainOptions(), Ranks(0, 2), "fp16"),
    ):
        with pytest.raises(VglannError, match="not tested together"):
            check_compatibility(options, ranks, precision, gpu)


def test_a_resumed_run_may_choose_its_machine_anew_and_nothing_else(clips, tmp_path, capsys):
    run = new_run(tmp_path / "run", clips, tiny_options("modern", epochs=1))
    command = ["train", "--resume", str(run.path), "--device", "cpu"]
    assert main([*command, "--accumulate", "2"]) == 2
    assert "--accumulate 2" in capsys.readouterr().err
    assert main([*command, "--data", "resident", "--checkpoint-activations"]) == 0
    options = RunDir.open(run.path).options
    assert options["train"]["data"] == "resident"
    (entry,) = options["resumed"]
    assert entry["step"] == 0
    assert entry["changed"] == {"data": ["auto", "resident"], "checkpoint_activations": [False, True]}
    assert run.checkpoints.load()[0]["finished"]


def test_a_compiled_generator_takes_the_kernels_of_its_own_training(clips, tmp_path, monkeypatch):
    """torch.compile keeps what it traced by the code of a function, which all generators share."""
    taken = []

    def convolve(name, x, weight, *rest):
        taken.append(name)
        return reference(x, weight, *rest)

    reference = upsample_conv.IMPLEMENTATIONS["reference"]
    for name in ("reference", "other"):
        monkeypatch.setitem(upsample_conv.IMPLEMENTATIONS, name, partial(convolve, name))
    monkeypatch.setitem(implementations("upsample_conv"), "other", lambda device: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for kernels in ("reference", "reference,upsample_conv=other"):
        with using_impl(kernels):
            training = training_of(clips, tmp_path / kernels, compile=True)
            training.train_step()
            taken.clear()
            training.train_step()
        assert set(taken) == {kernels.rpartition("=")[2]}


def test_a_compiled_generator_trains_the_same(clips, tmp_path):
    """In a process of its own: the compiler imports setuptools, which refuses one where distutils came first."""
    losses = {}
    for compiled in (False, True):
        options = tiny_options("modern", width=4, epochs=2, compile=compiled)
        run = new_run(tmp_path / str(compiled), clips, options)
        words = ["train", "--resume", str(run.path), "--log-every", "1", "--device", "cpu"]
        if compiled:
            command = [sys.executable, "-m", "vglann_fast", *words]
            subprocess.run(command, check=True, capture_output=True)
        else:
            assert main(words) == 0
        losses[compiled] = [row["loss"] for row in run.logs.metrics("glo")]
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
