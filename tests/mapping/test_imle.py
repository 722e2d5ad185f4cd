"""IMLE: the author's recorded epochs, and what a mapping promises."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden_data import golden, normal, relative_l2, seeded_state

from vglann_fast.errors import VglannError
from vglann_fast.mapping import base
from vglann_fast.mapping.imle import IMLE
from vglann_fast.options.presets import PRESETS

# ours -> the author's
LAYERS = {"linear1": "lin1", "norm1": "bn1", "linear2": "lin2", "norm2": "bn2", "out": "lin_out"}


def seeded_mapping(gain):
    mapping = IMLE(100, PRESETS["paper"].map["imle"], dtype=torch.float64)
    state = {}
    for name, value in mapping.network.state_dict().items():
        layer, kind = name.split(".")
        seeded = seeded_state.seeded_tensor(f"{LAYERS[layer]}.{kind}", tuple(value.shape), gain)
        state[name] = torch.from_numpy(seeded).to(value.dtype)
    mapping.network.load_state_dict(state)
    return mapping


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_network_matches_the_author(mode):
    expected = golden("icp_netT")
    mapping = seeded_mapping(1.4)
    mapping.network.train(mode == "train")
    noise = expected["e"].double().requires_grad_()
    out = mapping(noise)
    loss = F.mse_loss(out, expected["tgt"].double())
    loss.backward()
    assert relative_l2(out, expected[f"{mode}.out"]) < 1e-6
    assert loss.item() == pytest.approx(expected[f"{mode}.mse"].item(), rel=1e-6)
    assert relative_l2(noise.grad, expected[f"{mode}.grad.e"]) < 1e-6
    for name, parameter in mapping.network.named_parameters():
        layer, kind = name.split(".")
        assert relative_l2(parameter.grad, expected[f"{mode}.grad.{LAYERS[layer]}.{kind}"]) < 1e-6, name


def test_epochs_match_the_author(monkeypatch):
    expected = golden("icp_train")
    monkeypatch.setattr(base, "HALVING_EPOCHS", 2)  # as in the recording
    mapping = seeded_mapping(0.15)
    latents = expected["z"].double()
    for epoch in range(3):
        drawn = mapping.draw_pool(len(latents), torch.Generator())
        blocks = [normal(f"icp.train.e.ep{epoch}.{b}", (128, 16)).double() for b in range(len(drawn))]
        assert torch.equal(torch.cat(blocks).float(), expected[f"ep{epoch}.e"])
        row = mapping.train_epoch(latents, blocks, expected[f"ep{epoch}.rp"], epoch)
        assert row["loss"] == pytest.approx(expected[f"ep{epoch}.losses"].mean().item(), rel=1e-6)
        assert row["match_distance"] == pytest.approx(
            expected[f"ep{epoch}.dist2"].sqrt().mean().item(), rel=1e-5
        )
        assert row["match_diversity"] == expected[f"ep{epoch}.index"].unique().numel() / 300
    for name, value in mapping.network.state_dict().items():
        layer, kind = name.split(".")
        assert relative_l2(value.double(), expected[f"final.{LAYERS[layer]}.{kind}"]) < 1e-6, name


def test_blocks_at_once_are_blocks_in_train_mode():
    noise = normal("blocks", (5, 7, 16)).double()
    one, all_at_once = seeded_mapping(1.4).network.train(), seeded_mapping(1.4).network.train()
    expected = torch.stack([one(block) for block in noise])
    torch.testing.assert_close(all_at_once.forward_blocks(noise), expected, rtol=1e-12, atol=1e-14)
    for name, value in all_at_once.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-12, atol=1e-14)


def clustered_latents():
    """Three tight groups on the unit sphere in 8 dimensions."""
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    rows = centers.repeat_interleave(20, 0) + 0.02 * torch.randn(60, 8, generator=generator)
    return F.normalize(rows, dim=1), centers


@pytest.fixture(scope="module", params=["paper", "modern"])
def fitted(request):
    latents, centers = clustered_latents()
    options = replace(
        PRESETS[request.param].map["imle"], noise_dim=4, hidden=32, epochs=80, batch_size=20, lr=5e-3
    )
    mapping = IMLE(8, options)
    rows = []
    mapping.fit(latents, torch.Generator().manual_seed(1), rows.append)
    return mapping, latents, centers, rows


def test_fit_covers_every_group(fitted):
    mapping, _, centers, rows = fitted
    samples = mapping.sample(200, torch.Generator().manual_seed(2))
    nearest = torch.cdist(F.normalize(samples, dim=1), centers).argmin(1)
    assert all((nearest == group).sum() > 20 for group in range(3))
    assert rows[-1]["match_distance"] < 0.5 * rows[0]["match_distance"]
    assert [row["epoch"] for row in rows] == list(range(80))


def test_samples_are_a_function_of_the_seed_and_leave_the_mapping_as_it_was(fitted):
    mapping, *_ = fitted
    before = {name: value.clone() for name, value in mapping.network.state_dict().items()}
    first, again, other = (mapping.sample(30, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert all(torch.equal(before[name], value) for name, value in mapping.network.state_dict().items())


def test_save_and_load(fitted, tmp_path):
    mapping, *_ = fitted
    mapping.save(tmp_path)
    loaded = IMLE.load(tmp_path, torch.device("cpu"))
    samples = [m.sample(10, torch.Generator().manual_seed(3)) for m in (mapping, loaded)]
    assert torch.equal(*samples)
    assert loaded.epochs == mapping.epochs


def test_a_second_fit_matches_anew():
    mapping = IMLE(8, replace(PRESETS["modern"].map["imle"], noise_dim=4, hidden=32, epochs=3, rematch=0.5))
    for sign in (1, -1):
        rows = []
        mapping.fit(sign * clustered_latents()[0], torch.Generator().manual_seed(1), rows.append)
        assert rows[0]["rematched"] == 1
        assert rows[1]["rematched"] < 1


def test_normalized_mapping_stays_on_the_sphere():
    mapping = IMLE(8, replace(PRESETS["modern"].map["imle"], noise_dim=4, hidden=32))
    samples = mapping.sample(50, torch.Generator().manual_seed(0))
    assert torch.allclose(samples.norm(dim=1), torch.ones(50))


def test_bad_latents():
    mapping = IMLE(4, PRESETS["modern"].map["imle"])
    with pytest.raises(VglannError, match="NaN"):
        mapping.fit(torch.full((5, 4), float("nan")), torch.Generator())
    for shape in ((1, 4), (5, 3), (5,)):
        with pytest.raises(VglannError, match="expected at least 2 rows of 4"):
            mapping.fit(torch.zeros(shape), torch.Generator())


def test_bad_folders(tmp_path):
    with pytest.raises(VglannError, match="run `vglann map` again"):
        IMLE.load(tmp_path, torch.device("cpu"))
    IMLE(4, PRESETS["modern"].map["imle"]).save(tmp_path)
    record = json.loads((tmp_path / "mapping.json").read_text())
    (tmp_path / "mapping.json").write_text(json.dumps({**record, "kind": "gmm"}))
    with pytest.raises(VglannError, match="not a mapping of this kind"):
        IMLE.load(tmp_path, torch.device("cpu"))
    (tmp_path / "mapping.json").write_text(json.dumps(record))
    (tmp_path / "mapping.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(VglannError, match="not a mapping that can be read"):
        IMLE.load(tmp_path, torch.device("cpu"))
