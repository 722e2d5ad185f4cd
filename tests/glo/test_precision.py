"""Precision and memory layout around the step: what stays float32, what is refused, what would be noticed."""

import pytest
import torch
from tiny import new_run, tiny_options
from torch.utils._python_dispatch import TorchDispatchMode

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import precision as precision_module
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.batchnorm import VideoNorm, batch_norms
from vglann_fast.glo.generator import TwoStreamGenerator
from vglann_fast.glo.loader import Batch
from vglann_fast.glo.losses import glo_loss
from vglann_fast.glo.optimizer import GeneratorOptimizer
from vglann_fast.glo.precision import LossScale, in_precision, resolve_precision, self_test
from vglann_fast.runtime.distributed import Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("data") / "clips", moving_squares(6))


def small_generator(**changes):
    torch.manual_seed(0)
    return TwoStreamGenerator(latent_dim=8, width=4, frames=16, size=32, **changes).channels_last()


class BrokenLayouts(TorchDispatchMode):
    """Collects every operation that writes a video or picture with channels other than channels-last."""

    def __init__(self):
        super().__init__()
        self.seen, self.broken = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.is_view:  # moves no data, and has the shape of what is in between
            return result
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim in (4, 5) and min(tensor.shape[1:]) > 1:
                form = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
                self.seen += 1
                if not tensor.is_contiguous(memory_format=form):
                    self.broken.append((str(operation), tuple(tensor.shape), tensor.stride()))
        return result


def torch_keeps_channels_last(dtype):
    """Return True if PyTorch's own transposed convolution keeps the layout here, forward and backward.

    On a CPU without bfloat16 units it falls back to a path that does not, and nothing of ours can change that.
    """
    conv = torch.nn.ConvTranspose3d(4, 4, 4, 2, 1, bias=False).to(dtype, memory_format=torch.channels_last_3d)
    x = torch.randn(2, 4, 2, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    with BrokenLayouts() as watch:
        y = conv(x.requires_grad_())
        y.backward(torch.randn_like(y))
    return not watch.broken


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_no_layer_breaks_channels_last(variant, precision):
    if precision == "bf16" and not torch_keeps_channels_last(torch.bfloat16):
        pytest.skip("PyTorch's own bfloat16 convolutions leave channels-last on this CPU")
    generator = small_generator(variant=variant)
    logits = in_precision(generator.logits, precision, CPU)
    z = torch.randn(3, 8, requires_grad=True)
    with BrokenLayouts() as watch:
        head, background = logits(z)
    assert watch.seen > 20
    assert not watch.broken
    seeds = [
        torch.randn_like(head).contiguous(memory_format=torch.channels_last_3d),
        torch.randn_like(background).contiguous(memory_format=torch.channels_last),
    ]
    with BrokenLayouts() as watch:
        torch.autograd.backward([head, background], seeds)
    assert watch.seen > 20
    assert not watch.broken


def test_a_layer_that_breaks_the_layout_is_seen():
    generator = small_generator()
    generator.video.norm3.register_forward_hook(lambda module, args, out: out.contiguous())
    with BrokenLayouts() as watch:
        generator.logits(torch.randn(3, 8))
    assert watch.broken


def test_the_flat_batchnorm_is_the_3d_one():
    x = torch.randn(3, 5, 4, 6, 7).contiguous(memory_format=torch.channels_last_3d)
    ours, theirs = VideoNorm(5), torch.nn.BatchNorm3d(5)
    for norm in (ours, theirs):
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0]), theirs(inputs[1]).relu()]
    for out in outputs:
        (out * torch.arange(7.0)).sum().backward()
    assert torch.allclose(*outputs, atol=1e-6)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    assert torch.allclose(ours.running_var, theirs.running_var)
    assert torch.allclose(ours.eval()(x, relu=False), theirs.eval()(x), atol=1e-6)


def test_bf16_keeps_weights_latents_statistics_adam_and_loss_in_float32(clips, tmp_path):
    options = tiny_options("modern", precision="bf16")
    training = new_training(ClipSet.open(clips, "train"), options, new_run(tmp_path / "run", clips, options))
    assert training.logits(training.latents.rows[:2])[0].dtype == torch.bfloat16
    loss, _, _ = training.train_step()
    kept = [
        loss,
        *training.generator.parameters(),
        *(parameter.grad for parameter in training.generator.parameters()),
        *(norm.running_var for norm in batch_norms(training.generator)),
        *training.optimizer.tensors().values(),
        training.latents.rows,
        training.latents.adam.exp_avg,
    ]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_bf16_trains_like_fp32(clips, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        options = tiny_options("modern", precision=precision, epochs=20, width=8, lr_generator=0.005)
        run = new_run(tmp_path / precision, clips, options)
        training = new_training(ClipSet.open(clips, "train"), options, run)
        losses[precision] = [training.train_step()[0].item() for _ in range(40)]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"][0] == pytest.approx(losses["fp32"][0], rel=0.01)
    assert sum(losses["bf16"][-4:]) == pytest.approx(sum(losses["fp32"][-4:]), rel=0.05)
    assert losses["bf16"][-1] < 0.8 * losses["bf16"][0]


def test_what_auto_means_and_what_is_refused(monkeypatch):
    assert resolve_precision("auto", CPU) == "fp32"
    for asked in ("fp16", "tf32"):
        with pytest.raises(VglannError, match=f"--precision {asked}: needs a GPU"):
            resolve_precision(asked, CPU)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_precision("auto", gpu) == "fp32"
    assert resolve_precision("fp16", gpu) == "fp16"
    with pytest.raises(
        VglannError, match=r"--precision bf16: needs compute capability 8\.0, cuda:0 has 7\.5"
    ):
        resolve_precision("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_precision("auto", gpu) == "bf16"


@pytest.mark.parametrize("variant", ["original", "expanded"])
def test_the_self_test_passes_on_this_machine_and_changes_nothing(variant):
    generator = small_generator(variant=variant).train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    self_test(generator, "bf16", CPU)
    after = generator.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(norm.momentum == 0.1 for norm in batch_norms(generator))


@pytest.mark.parametrize("fault", ["output", "gradient", "nan"])
def test_the_self_test_names_the_versions_of_a_wrong_convolution(monkeypatch, fault):
    generator = small_generator()
    right = precision_module.in_precision

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, head):
            return {"output": 1.3 * head, "gradient": head.clone(), "nan": head / 0 * 0}[fault]

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    def wrong(logits, precision, device):
        inner = right(logits, precision, device)

        def run(z):
            head, background = inner(z)
            return Wrong.apply(head), background

        return run

    monkeypatch.setattr(precision_module, "in_precision", wrong)
    with pytest.raises(
        VglannError, match=f"torch {torch.__version__.split('+')[0]}.*cuDNN.*--precision fp32"
    ):
        self_test(generator, "bf16", CPU)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_clean_steps():
    scale = LossScale(CPU, scale=8.0, patience=3)
    gradients = [torch.full((3,), 16.0), torch.ones(())]
    assert not scale.unscale(gradients)
    assert gradients[0].tolist() == [2.0] * 3
    assert gradients[1].item() == 0.125
    for bad in (float("inf"), float("nan")):
        before = scale.scale.item()
        assert scale.unscale([torch.ones(2), torch.tensor([1.0, bad])])
        assert scale.scale.item() == before / 2
    assert scale.scale.item() == 2.0
    for _ in range(2):
        assert not scale.unscale([torch.ones(2)])
        assert scale.scale.item() == 2.0
    scale.unscale([torch.ones(2)])
    assert scale.scale.item() == 4.0
    assert scale.clean.item() == 0


def test_a_scaled_update_is_the_unscaled_one_and_an_overflow_is_left_out():
    options = tiny_options("modern")
    updated = []
    for scale in (None, LossScale(CPU)):
        generator = small_generator()
        optimizer = GeneratorOptimizer(generator, options, Ranks(), scale)
        z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        batch = Batch(torch.zeros(3, 3, 16, 32, 32, dtype=torch.uint8), torch.arange(3), torch.arange(3))
        optimizer.zero_grad()
        share = optimizer.backward(glo_loss(*generator.logits(z), batch, options, with_video=False)[0])
        loss, overflow = optimizer.gather(share, z.grad)
        assert not overflow
        optimizer.step(skip=torch.tensor(False))
        updated.append([loss.item(), z.grad, generator.stem.weight.detach().clone()])
    assert updated[0][0] == updated[1][0]
    assert torch.allclose(updated[0][1], updated[1][1], rtol=1e-4, atol=1e-10)
    assert torch.allclose(updated[0][2], updated[1][2], atol=1e-5)
    z.grad.fill_(float("inf"))
    _, overflow = optimizer.gather(share, z.grad)
    assert overflow
    optimizer.step(skip=overflow)
    assert torch.equal(generator.stem.weight, updated[1][2])
    assert optimizer.tensors()["step.stem.weight"].item() == 1


@pytest.mark.parametrize(("units", "lines"), [(False, 1), (True, 0), (None, 0)])
def test_bfloat16_on_a_cpu_without_units_for_it_is_one_line(units, lines, monkeypatch, caplog):
    monkeypatch.setattr(precision_module, "bfloat16_units", lambda: units)
    precision_module.warn_of_slow_precision("bf16", CPU)
    assert sum("--precision" in record.message for record in caplog.records) == lines
    caplog.clear()
    precision_module.warn_of_slow_precision("fp32", CPU)
    assert not caplog.records
