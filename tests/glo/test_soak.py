"""Nothing grows with the number of steps. `python tests/fixtures/soak.py` takes 100,000 of them."""

from soak import soak


def test_many_steps_leave_nothing_behind(tmp_path):
    grown = soak(120, tmp_path, warm_up=60)
    assert grown["files"] == 0
    assert grown["checkpoints"] == 0
    assert grown["malloc"] < 3e5  # a leak of one video a step would be 20 MB, of its latents' gradients 4 kB
    assert grown["blocks"] < 600  # five objects a step
    assert grown["bytes"] < 4e6
    assert grown["bytes_per_line"] < 1.2
