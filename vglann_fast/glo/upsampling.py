"""The transposed convolutions of the generator: each doubles images or videos, by one op of the kernel library."""

from torch import Tensor, nn
from vglann_kernels import upsample_convolution, upsample_convolution_statistics
from vglann_kernels.upsample_conv.op import statistics_pay

from vglann_fast.glo.batchnorm import ImageNorm, VideoNorm


class ImageUpsampling(nn.ConvTranspose2d):
    """Doubles images: kernel 4, stride 2, padding 1."""

    def __init__(self, channels: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(channels, outputs, 4, 2, 1, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return upsample_convolution(x, self.weight, self.bias)


class VideoUpsampling(nn.ConvTranspose3d):
    """Doubles frames, rows and columns of videos: kernel 4, stride 2, padding 1."""

    def __init__(self, channels: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(channels, outputs, 4, 2, 1, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return upsample_convolution(x, self.weight, self.bias)


def normalized(
    convolution: ImageUpsampling | VideoUpsampling, norm: ImageNorm | VideoNorm, x: Tensor
) -> Tensor:
    """Return `norm(convolution(x))`; kernels hand the statistics over, so that the norm reads its input once less."""
    if not (norm.training and statistics_pay(x, convolution.weight)):
        return norm(convolution(x))
    y, statistics = upsample_convolution_statistics(x, convolution.weight, convolution.bias)
    return norm(y, statistics=statistics)
