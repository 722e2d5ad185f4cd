"""TensorFlow's "same" padding, which the public weights of these networks were trained with."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad the last axes of `x` with zeros so that a window of this kernel and stride gives ceil(size / stride).

    Of an odd number of zeros the one more goes to the end, where PyTorch's own padding cannot put it.
    """
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape), reversed(kernel), reversed(stride), strict=False):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]  # F.pad counts from the last axis
    return F.pad(x, pads) if any(pads) else x
