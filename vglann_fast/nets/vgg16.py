"""VGG16's convolutions (Simonyan and Zisserman 2015, configuration D), with or without HED's fine-tuning.

Thirteen 3x3 convolutions in five blocks, each followed by a ReLU, a 2x2 maximum between the blocks. The keys are
torchvision's, `features.N.weight` and `features.N.bias`; N also counts ReLUs and maxima, which have no tensors.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vglann_fast.errors import VglannError

_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
DEPTH = 31  # layers of `features`, 0 to 30

# What the weights were trained on: (mean, standard deviation) of each of R, G, B in 0..255.
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # torchvision's 0.485, 0.456, ... times 255
CAFFE = ((122.67892, 116.66877, 104.00699), (1.0, 1.0, 1.0))  # HED's, whose channels come as B, G, R


class VGG16(nn.Module):
    """The layers 0 to `depth` - 1 of `features`. `loaded` gives it numbers, frozen and in eval mode."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block in _BLOCKS:
            for out in block:
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:depth])

    @classmethod
    def loaded(
        cls, tensors: Mapping[str, Tensor], *, depth: int = DEPTH, swap_colors: bool = False
    ) -> "VGG16":
        """The network with these tensors, without the tensors of deeper layers.

        swap_colors: the tensors are of a network that reads B, G, R; this one still reads R, G, B.

        Raises `VglannError` naming tensors that are missing or of another shape.
        """
        with torch.device("meta"):
            network = cls(depth)
        wanted = network.state_dict()
        wrong = [k for k, like in wanted.items() if k not in tensors or tensors[k].shape != like.shape]
        if wrong:
            raise VglannError(f"not the weights of VGG16: {len(wrong)} tensors differ, the first {wrong[0]}")
        chosen = {name: tensors[name] for name in wanted}
        if swap_colors:
            chosen["features.0.weight"] = chosen["features.0.weight"].flip(1)
        network.load_state_dict(chosen, assign=True)
        return network.requires_grad_(False).eval()

    def forward(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """The outputs of layers `taps` of `features`, ascending, for x [B, 3, H, W]; deeper ones are not run.

        Between tap and tap no value is kept that the backward pass does not need: a ReLU overwrites what goes
        into it unless that is a tap.
        """
        outputs = []
        for index, layer in enumerate(list(self.features)[: taps[-1] + 1]):
            over = isinstance(layer, nn.ReLU) and index - 1 not in taps
            x = torch.relu_(x) if over else layer(x)
            if index in taps:
                outputs.append(x)
        return outputs
