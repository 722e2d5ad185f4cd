"""transnetv2.py against a plain recomputation, and, where its weights are imported, on real footage."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import seeded_state

from vglann_fast.interop.weight_shapes import expected_shapes
from vglann_fast.nets.transnetv2 import TransNetV2


@pytest.fixture(scope="module")
def weights():
    return {
        key: torch.from_numpy(seeded_state.seeded_tensor(key, shape, 2**0.5))
        for key, shape in expected_shapes("transnetv2").items()
    }


def near(x):
    """Cosines of frame t with frames t - 50 to t + 50, one by one; [T, 101]."""
    x = x / x.norm(dim=1, keepdim=True)
    rows = torch.zeros(len(x), 101, dtype=torch.float64)
    for t in range(len(x)):
        for other in range(max(t - 50, 0), min(t + 51, len(x))):
            rows[t, other - t + 50] = x[t] @ x[other]
    return rows


def color_counts(frames):
    """Count each of 8 x 8 x 8 colors in frames (T, h, w, 3); [T, 512]."""
    counts = np.zeros((len(frames), 8, 8, 8))
    for t, frame in enumerate(frames):
        for color in frame.reshape(-1, 3) // 32:
            counts[(t, *color)] += 1
    return torch.from_numpy(counts).flatten(1)


def plain(w, frames):
    """Stage outputs [C, T, h, w] and logits [T], in float64, of uint8 frames (T, 27, 48, 3)."""
    w = {key: tensor.double() for key, tensor in w.items()}

    def block(x, name):
        branches = []
        for dilation in (1, 2, 4, 8):
            space, time = (w[f"{name}.Conv3D_{dilation}.layers.{i}.weight"] for i in (0, 1))
            y = F.conv2d(x.transpose(0, 1), space[:, :, 0], padding=1).transpose(0, 1)
            y = F.pad(y, (0, 0, 0, 0, dilation, dilation))
            count = y.shape[1] - 2 * dilation
            taps = [y[:, i * dilation : i * dilation + count] for i in range(3)]
            branches.append(
                sum(torch.einsum("oc,cthw->othw", time[:, :, i, 0, 0], taps[i]) for i in range(3))
            )
        mean, var, gain, shift = (
            w[f"{name}.bn.{part}"].view(-1, 1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (torch.cat(branches) - mean) / (var + 0.001).sqrt() * gain + shift

    x = torch.from_numpy(frames).permute(3, 0, 1, 2).double() / 255
    stages = []
    for number in range(3):
        first = block(x, f"SDDCNN.{number}.DDCNN.0").clamp(min=0)
        x = block(first, f"SDDCNN.{number}.DDCNN.1").clamp(min=0) + first
        rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        x = sum(x[:, :, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)) / 4
        stages.append(x)

    means = torch.cat([stage.mean((2, 3)) for stage in stages]).T
    projected = means @ w["frame_sim_layer.projection.weight"].T + w["frame_sim_layer.projection.bias"]
    parts = []
    for name, table in (("color_hist_layer", color_counts(frames)), ("frame_sim_layer", projected)):
        parts.append((near(table) @ w[f"{name}.fc.weight"].T + w[f"{name}.fc.bias"]).clamp(min=0))
    parts.append(x.permute(1, 2, 3, 0).reshape(len(frames), -1))
    hidden = (torch.cat(parts, dim=1) @ w["fc1.weight"].T + w["fc1.bias"]).clamp(min=0)
    return stages, (hidden @ w["cls_layer1.weight"].T + w["cls_layer1.bias"])[:, 0]


def test_stages_and_logits(weights):
    frames = seeded_state.integers("transnetv2", (4, 27, 48, 3), 256).astype(np.uint8)
    frames[2:] //= 3  # something for the histograms to see
    stages, logits = plain(weights, frames)
    network = TransNetV2.loaded(weights)
    given = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].expand(2, -1, -1, -1, -1)
    with torch.inference_mode():
        for found, stage in zip(network.stages(given), stages, strict=True):
            torch.testing.assert_close(found[1].double(), stage, rtol=1e-4, atol=1e-4)
        found = network(given)
    assert found.shape == (2, 4)
    torch.testing.assert_close(found[1].double(), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


def test_a_frame_is_compared_with_fifty_on_either_side(weights):
    frames = seeded_state.integers("near", (70, 3, 4, 3), 256).astype(np.uint8)
    layer = TransNetV2.loaded(weights).color_hist_layer
    expected = near(color_counts(frames)) @ layer.fc.weight.double().T + layer.fc.bias
    found = layer(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])[0]
    torch.testing.assert_close(found.double(), expected.clamp(min=0), rtol=1e-5, atol=1e-5)


def test_loading_leaves_the_random_state_and_freezes(weights):
    before = torch.get_rng_state()
    network = TransNetV2.loaded(weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
