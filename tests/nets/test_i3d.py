"""i3d.py: the endpoints and logits of the public network, with seeded weights."""

import numpy as np
import torch
from golden_data import golden, network_state, relative_l2, seeded_state

from vglann_fast.metrics.features import i3d_input
from vglann_fast.nets.i3d import I3D


def test_endpoints_and_logits():
    network = I3D.loaded(network_state("i3d_cdfvd", 2**0.5))
    expected = golden("i3d_eval")
    small = seeded_state.integers("i3d.video", (1, 16, 64, 64, 3), 256)[:, :, ::8, ::8]
    video = np.repeat(np.repeat(small, 8, axis=2), 8, axis=3).astype(np.uint8)[0]
    clip = torch.from_numpy(video).permute(3, 0, 1, 2)
    found = {}
    for name in ("Mixed_4b", "Mixed_5c", "avg_pool"):
        getattr(network, name).register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
    with torch.inference_mode():
        logits = network(i3d_input(clip))
    found["Mixed_4b"] = found["Mixed_4b"][:, :, 0]  # the first of four steps was recorded
    for name in found:
        assert found[name].shape == expected[name].shape
        assert relative_l2(found[name], expected[name]) < 3e-6, name
    # three times what the public network in float32 deviates from itself in float64
    assert (logits.double() - expected["logits"]).abs().max() < 3 * 1.4e-6
