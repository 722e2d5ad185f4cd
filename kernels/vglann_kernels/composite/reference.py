"""`mask_composite` in plain PyTorch: the definition."""

from torch import Tensor

from ..checks import compute_dtype


def mask_composite(head: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Turn head [B,4,T,H,W] logits and background [B,3,H,W] logits into (video [B,3,T,H,W] in [-1,1],
    mask mean [B]).

    video = m * f + (1 - m) * b with f = tanh(head[:, :3]), m = sigmoid(head[:, 3]), b = tanh(background) for
    every frame (Vondrick et al. 2016, "Generating Videos with Scene Dynamics", eq. 3). Computed in float32,
    or float64 for float64 inputs; the video is returned in the dtype of `head`, the mask mean in the
    dtype of the computation.
    """
    dtype = compute_dtype(head)
    f = head[:, :3].to(dtype).tanh()  # [B,3,T,H,W]
    m = head[:, 3:].to(dtype).sigmoid()  # [B,1,T,H,W]
    b = background.to(dtype).tanh().unsqueeze(2)  # [B,3,1,H,W]
    video = m * f + (1 - m) * b  # [B,3,T,H,W]
    return video.to(head.dtype), m.mean(dim=(1, 2, 3, 4))
