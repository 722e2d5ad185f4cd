"""The latent table: one latent per clip, the first values of the latents, and how they are trained."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import latent_adam_state, latent_adam_step, latent_flush, latent_gather

from vglann_fast.options.training import TrainOptions

BETAS = (0.5, 0.999)
INIT_STD = 0.01  # of latent_init="normal", the author's; its rows have norm 0.1

ReadClips = Callable[[np.ndarray], np.ndarray]  # row numbers -> uint8 [n, 3, T, H, W]


class LatentTable:
    """Latents [N, d] of the clips `ids`, with their Adam.

    Mode "sparse" puts a row back on the unit sphere after each of its updates. The other two modes let rows leave
    it during an epoch and renormalize the whole table at the epoch's end, as the author does.
    """

    def __init__(self, rows: Tensor, ids: Sequence[str], options: TrainOptions) -> None:
        if rows.shape != (len(ids), options.latent_dim):
            raise ValueError(f"rows: expected [{len(ids)}, {options.latent_dim}], got {list(rows.shape)}")
        self.rows = rows
        self.ids = tuple(ids)
        self.lr = torch.tensor(options.lr_latents, dtype=rows.dtype, device=rows.device)
        self.retraction = "sphere" if options.latent_mode == "sparse" else None
        self.adam = latent_adam_state(rows, options.latent_mode)

    def gather(self, index: Tensor) -> Tensor:
        """The latents [B, d] of rows `index` [B], as a leaf that wants a gradient."""
        return latent_gather(self.rows, self.adam, index, lr=self.lr, betas=BETAS).requires_grad_()

    def step(self, index: Tensor, grad: Tensor, skip: Tensor) -> None:
        """One Adam step with gradient `grad` [B, d] of rows `index` [B]; nothing at all where `skip` [] is true."""
        latent_adam_step(
            self.rows, self.adam, index, grad, lr=self.lr, betas=BETAS, retraction=self.retraction, skip=skip
        )

    def begin_epoch(self, lr: float, *, forget: bool) -> None:
        """Set the learning rate; with `forget`, reset Adam's moments and counters."""
        self.lr.fill_(lr)
        if forget:
            for tensor in self.adam.tensors().values():
                tensor.zero_()

    def change_rate(self, lr: float) -> None:
        """Set the learning rate within an epoch. Rows that lag behind first take their steps at the old one."""
        new = torch.full_like(self.lr, lr)
        if self.retraction is None and not torch.equal(new, self.lr):
            latent_flush(self.rows, self.adam, lr=self.lr, betas=BETAS)
        self.lr.copy_(new)

    def end_epoch(self) -> None:
        """Bring rows that lag behind up to date, and put rows that left the unit sphere back on it."""
        if self.retraction is None:
            latent_flush(self.rows, self.adam, lr=self.lr, betas=BETAS)
            self.rows.div_(torch.linalg.vector_norm(self.rows, dim=1, keepdim=True))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the latents under "rows", and Adam's state."""
        return {"rows": self.rows, **{f"adam.{name}": value for name, value in self.adam.tensors().items()}}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        self.rows.copy_(tensors["rows"])
        self.adam.load({name.removeprefix("adam."): t for name, t in tensors.items() if name != "rows"})


def initial_latents(count: int, options: TrainOptions, generator: torch.Generator, read: ReadClips) -> Tensor:
    """The first latents [count, latent_dim], float32 on the CPU, by `options.latent_init`."""
    if options.latent_init == "pca":
        return _principal_latents(count, options.latent_dim, generator, read)
    rows = torch.randn(count, options.latent_dim, generator=generator)
    return INIT_STD * rows if options.latent_init == "normal" else F.normalize(rows, dim=1)


def _principal_latents(count: int, latent_dim: int, generator: torch.Generator, read: ReadClips) -> Tensor:
    """Unit rows along the principal components of the clips, averaged down to 4 frames of 8 x 8.

    Similar clips start close together, so that the space between latents means something from the start.
    Directions beyond the clips' own rank are filled with a little noise, which also parts equal clips.
    """
    chunks = []
    for first in range(0, count, 256):
        clips = torch.from_numpy(read(np.arange(first, min(first + 256, count))))
        chunks.append(F.adaptive_avg_pool3d(clips.float(), (4, 8, 8)).flatten(1))
    features = torch.cat(chunks).double()  # [N, 768]
    features -= features.mean(0)
    _, _, components = torch.linalg.svd(features, full_matrices=False)
    scores = features @ components[:latent_dim].T  # [N, min(N, 768, d)]
    scores = F.pad(scores, (0, latent_dim - scores.shape[1]))
    noise = torch.randn(count, latent_dim, generator=generator).double()
    spread = scores.square().sum(1).mean().sqrt().clamp_min(1e-12)
    return F.normalize(scores + 0.1 * spread / latent_dim**0.5 * noise, dim=1).float()
