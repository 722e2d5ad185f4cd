"""Muon: momentum whose matrices are made orthogonal, for the weights of transposed convolutions.

    m  <- 0.9 m + 0.1 gradient              momentum
    u  =  0.9 m + 0.1 gradient              Nesterov's look ahead
    w  <- w - rate * 0.2 sqrt(columns) * orthogonal(u)

A weight [Cin, Cout, taps...] is one matrix of Cin rows and Cout * taps columns. An orthogonal matrix of that shape
has a root mean square of 1 / sqrt(columns), so an update has one of 0.2 * rate. (Jordan et al., "Muon", 2024; the
factor of 0.2: Liu et al., "Muon is scalable for LLM training", 2025.)

torch.optim.Muon takes matrices alone, computes in bfloat16, which is slow on CPUs without such units, and reads its
rate on the host.
"""

import torch
from torch import Tensor, nn

from vglann_fast.glo.generator import TwoStreamGenerator

MOMENTUM = 0.9
UPDATE_RMS = 0.2
STEPS = 6
# Of the Newton-Schulz polynomial a x + b x^3 + c x^5: it takes singular values from 0.01 to 1 to between 0.6 and 1.3.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrix_parameters(generator: TwoStreamGenerator) -> dict[str, Tensor]:
    """The weights that Muon trains: the transposed convolutions of both streams, without the heads."""
    convolutions = {
        name: module
        for name, module in generator.named_modules()
        if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d) and not name.endswith("head")
    }
    return {f"{name}.weight": module.weight for name, module in convolutions.items()}


class Muon:
    """Muon over `parameters` by name. Rate and momentum are tensors that keep their place; nothing waits for them."""

    def __init__(self, parameters: dict[str, Tensor], lr: float) -> None:
        self.parameters = parameters
        first = next(iter(parameters.values()))
        self.lr = torch.tensor(lr, dtype=first.dtype, device=first.device)
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Update the parameters that have gradients; nothing at all where `skip` [] is true."""
        ahead = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            momentum = self.momentum[name]
            moved = momentum.lerp(parameter.grad, 1 - MOMENTUM)
            ahead[name] = parameter.grad.lerp(moved, MOMENTUM)
            torch.where(skip, momentum, moved, out=momentum)
        for name, update in zip(ahead, orthogonalized(list(ahead.values())), strict=True):
            scale = UPDATE_RMS * update[0].numel() ** 0.5
            # Masked and not multiplied: what is skipped may be NaN.
            self.parameters[name].sub_(update.mul_(scale * self.lr).masked_fill_(skip, 0.0))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {**{f"momentum.{name}": tensor for name, tensor in self.momentum.items()}, "lr_muon": self.lr}

    def forget(self) -> None:
        """Start the momentum from zero."""
        for tensor in self.momentum.values():
            tensor.zero_()


def orthogonalized(weights: list[Tensor]) -> list[Tensor]:
    """For each weight [Cin, ...], as a matrix with at least as many columns as rows, nearly its orthogonal factor.

    Newton-Schulz iterations x <- a x + b x x^T x + c (x x^T)^2 x, which only ever multiply x from the left. So they
    run on the small Gram matrices x x^T [Cin, Cin], all matrices of one size together, and x is multiplied once.
    """
    # [Cin, taps * Cout]: a view of a channels-last weight.
    matrices = [weight.movedim(1, -1).flatten(1) for weight in weights]
    by_rows: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_rows.setdefault(len(matrix), []).append(i)
    found = list(weights)
    for members in by_rows.values():
        factors = _left_factors(torch.stack([matrices[i] @ matrices[i].T for i in members]))
        for i, factor in zip(members, factors, strict=True):
            shape = weights[i].movedim(1, -1).shape
            found[i] = (factor @ matrices[i]).view(shape).movedim(-1, 1)
    return found


def _left_factors(gram: Tensor) -> Tensor:
    """P [..., n, n] with P x nearly orthogonal, of Gram matrices x x^T [..., n, n]; 0 for a matrix of zeros."""
    a, b, c = COEFFICIENTS
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp_min(1e-12)[..., None, None]  # Frobenius, of x
    gram = gram / norm / norm
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = identity / norm
    for _ in range(STEPS):
        polynomial = a * identity + b * gram + c * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
        gram = (gram + gram.mT) / 2  # rounding would make it less symmetric with each step
    return product
