"""The update asks the device for no value and touches nothing on the host: what a CUDA graph of it needs, and what
lets the host run ahead. Shown without a GPU.

Everything lies on PyTorch's device "meta", whose tensors have shapes and no values, so that asking for one raises;
modes around the update raise for every operation with a tensor of the host. Two things stand in for a GPU's:
autocast, which meta tensors have not (the logits are rounded as it would leave them), and launches of the kernels,
whose fake implementations run. What a launcher does by itself is not seen here.
"""

import pytest
import torch
from feature_weights import import_lite0
from on_meta import all_on_meta, patch_for_meta
from tiny import tiny_options
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vglann_kernels import impl as switch

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.guard import Guard
from vglann_fast.glo.loader import Batch
from vglann_fast.run.folder import RunDir


class OnTheHost(RuntimeError):
    """An operation of the update read, made or copied a tensor of the host."""


class NoNumbers(TorchFunctionMode):
    """Raises `OnTheHost` where numbers of Python become a tensor; later it would look as if made on the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            raise OnTheHost(function.__name__)
        return function(*args, **(kwargs or {}))


class DeviceAlone(TorchDispatchMode):
    """Raises `OnTheHost` for operations that have to do with a tensor of the host; `seen` counts all."""

    seen = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen += 1
        result = operation(*args, **(kwargs or {}))
        if not all_on_meta(args, kwargs, result):
            raise OnTheHost(str(operation))
        return result


@pytest.fixture
def like_a_gpu(monkeypatch):
    patch_for_meta(monkeypatch)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return ClipSet.open(write_clip_folder(folder / "clips", moving_squares(6)), "train")


def update_of(clips, preset, **changes):
    """`Training.update` of such a training, after a first one: as before a capture, it may make what is kept."""
    options = tiny_options(preset, data="resident", **changes)
    training = new_training(clips, options, RunDir(clips.folder, {}), device="meta")
    training.begin_epoch(0)
    rows = torch.zeros(training.batch_size, dtype=torch.int64, device="meta")
    batches = [Batch(training.source.table, rows, rows) for _ in range(options.accumulate)]
    training.update(batches, True)
    return lambda with_video: training.update(batches, with_video)


def check(update):
    """Raises where one of these updates has to do with the host."""
    for with_video in (True, False):
        with DeviceAlone() as watch, NoNumbers():
            loss, video = update(with_video)
        assert watch.seen > 60
        assert loss.device.type == "meta"
        assert (video is not None) == with_video


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize(("preset", "precision"), [("paper", "fp32"), ("modern", "bf16"), ("modern", "fp16")])
def test_an_update_is_one_of_the_device_alone(clips, preset, precision, kernels):
    with switch.using_impl(kernels):
        check(update_of(clips, preset, precision=precision))


LAZY = {"latent_mode": "lazy", "accumulate": 2, "checkpoint_activations": True}
RECIPE = {"optimizer": "muon", "ema": 0.99, "loss": "laplacian:1,l2:2"}
BACKGROUND = {**RECIPE, "background_share": 0.5}
BY_FEATURES = {"variant": "expanded", "mask_weight": 0.1, "loss": "l1,l2,lite0"}


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize(
    ("kernels", "changes"),
    [
        ("reference", LAZY),
        ("triton", LAZY),
        ("triton", BY_FEATURES),
        *((kernels, changes) for kernels in ("reference", "triton") for changes in (RECIPE, BACKGROUND)),
    ],
    ids=str,
)
def test_with_other_options(clips, tmp_path, monkeypatch, kernels, changes):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "weights"))
    import_lite0(tmp_path / "weights")
    with switch.using_impl(kernels):
        check(update_of(clips, "modern", precision="bf16", **changes))


LOOKS = [
    lambda loss: loss.item(),
    lambda loss: bool(loss < 0),
    lambda loss: loss.cpu(),
    lambda loss: torch.zeros(3).to(loss.device),
    lambda loss: torch.tensor([1.0, 2.0], device=loss.device),
    lambda loss: loss * torch.ones(()),
    lambda loss: loss.reshape(1).nonzero(),
    lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
]


@pytest.mark.usefixtures("like_a_gpu")
def test_an_update_that_waits_is_seen(clips, monkeypatch):
    """One that does what has to do with the host, each of the ways, in the middle of it."""
    watch, look = Guard.watch, []
    with switch.using_impl("triton"):
        update = update_of(clips, "modern", precision="bf16")
        monkeypatch.setattr(Guard, "watch", lambda self, *given: look[-1](given[0]) or watch(self, *given))
        look.append(lambda loss: None)
        check(update)
        for one in LOOKS:
            look.append(one)
            with pytest.raises(RuntimeError, match=r"meta|aten|^tensor$"):
                check(update)
