"""The VAE of latents: the author's recorded numbers, and what a mapping promises."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden_data import golden, normal, normal64, relative_l2, seeded_state

from vglann_fast.errors import VglannError
from vglann_fast.mapping import base
from vglann_fast.mapping.vae import VAE
from vglann_fast.options.presets import PRESETS

# ours -> the author's
LAYERS = {
    "encode1": "e_1",
    "encode2": "e_2",
    "mean": "e_mu",
    "log_variance": "e_logvar",
    "decode1": "d_1",
    "decode2": "d_2",
    "out": "d_out",
}


def author_name(name):
    layer, kind = name.split(".")
    return f"{LAYERS[layer]}.{kind}"


def seeded_vae():
    """As the author's on latents of 100, in float64."""
    vae = VAE(100, PRESETS["paper"].map["vae"], dtype=torch.float64)
    state = {
        name: torch.from_numpy(
            seeded_state.seeded_tensor(author_name(name), tuple(value.shape), math.sqrt(2))
        ).double()
        for name, value in vae.network.state_dict().items()
    }
    vae.network.load_state_dict(state)
    return vae


def test_network_matches_the_author():
    expected, network = golden("vae_forward"), seeded_vae().network
    latents, noise = expected["x"].double(), expected["eps"].double()
    mean, log_variance = network.encode(latents)
    assert relative_l2(mean, expected["mu"]) < 1e-6
    assert relative_l2(log_variance, expected["logvar"]) < 1e-6
    assert relative_l2(network.decode(mean + noise * (log_variance / 2).exp()), expected["rec"]) < 1e-6
    assert relative_l2(network.decode(expected["z"].double()), expected["decode_z"]) < 1e-6


def test_loss_and_gradients_match_the_author():
    expected, network = golden("vae_forward"), seeded_vae().network
    error, divergence = network(expected["x"].double(), expected["eps"].double())
    loss = error + PRESETS["paper"].map["vae"].kl_weight * divergence
    assert error.item() == pytest.approx(expected["bce"].item(), rel=1e-9)
    assert divergence.item() == pytest.approx(expected["kld"].item(), rel=1e-9)
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-9)
    loss.backward()
    for name, parameter in network.named_parameters():
        theirs = author_name(name)
        if f"grad.{theirs}" in expected:
            assert relative_l2(parameter.grad, expected[f"grad.{theirs}"]) < 1e-6, name
        assert probe(f"gradprobe.{theirs}", parameter.grad) == pytest.approx(
            expected[f"gradprobe.{theirs}"].tolist(), rel=1e-6, abs=1e-9
        ), name


def probe(key, value):
    """Sum, norm and dot product with seeded noise."""
    flat = value.detach().double().flatten()
    return [
        flat.sum().item(),
        flat.norm().item(),
        flat.dot(torch.from_numpy(normal64(key, flat.shape))).item(),
    ]


def test_epochs_match_the_author(monkeypatch):
    expected, vae = golden("vae_train"), seeded_vae()
    monkeypatch.setattr(base, "HALVING_EPOCHS", 2)  # as in the recording
    latents = expected["z"].double()
    for epoch in range(3):
        noise = torch.cat(
            [normal(f"vae.train.eps.ep{epoch}.{step}", (128, 16)) for step in range(2)]
        ).double()
        row = vae.train_epoch(latents, expected[f"ep{epoch}.rp"], noise, epoch)
        losses = expected["losses"][2 * epoch : 2 * epoch + 2]
        assert row["loss"] == pytest.approx(losses.sum().item() / 256, rel=1e-8)
    z = golden("vae_forward")["z"].double()
    assert relative_l2(vae.network.decode(z), expected["final_decode_z"]) < 1e-6


def groups(seed, rows=20):
    """Three tight groups on the unit sphere in 8 dimensions, and their centers."""
    centers = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    noise = torch.randn(3 * rows, 8, generator=torch.Generator().manual_seed(seed))
    return F.normalize(centers.repeat_interleave(rows, 0) + 0.02 * noise, dim=1), centers


@pytest.fixture(scope="module", params=["paper", "modern"])
def fitted(request):
    options = replace(
        PRESETS[request.param].map["vae"], noise_dim=4, hidden=32, batch_size=20, lr=5e-3, epochs=120
    )
    vae, rows = VAE(8, options), []
    vae.fit(groups(1)[0], torch.Generator().manual_seed(1), rows.append, groups(2)[0])
    return vae, rows


def test_fit_covers_every_group(fitted):
    vae, rows = fitted
    samples = vae.sample(300, torch.Generator().manual_seed(2))
    assert torch.allclose(samples.norm(dim=1), torch.ones(300))
    distance, nearest = torch.cdist(samples, groups(1)[1]).min(1)
    assert all(((nearest == group) & (distance < 0.3)).sum() > 30 for group in range(3))
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert [row["epoch"] for row in rows] == list(range(120))
    assert rows[-1]["held_out_loss"] < 0.3 * rows[0]["held_out_loss"]


def test_samples_are_a_function_of_the_seed_also_when_loaded(fitted, tmp_path):
    vae, rows = fitted
    vae.save(tmp_path)
    loaded = VAE.load(tmp_path, torch.device("cpu"))
    first, again, other = (
        m.sample(10, torch.Generator().manual_seed(seed)) for m, seed in ((vae, 3), (loaded, 3), (vae, 4))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert loaded.epochs == rows


def test_a_diverging_fit_is_named():
    vae = VAE(8, replace(PRESETS["modern"].map["vae"], lr=1e30, epochs=5))
    with pytest.raises(VglannError, match=r"not finite in epoch \d; lower --lr"):
        vae.fit(groups(1)[0], torch.Generator())
