"""The namespace of this copy's operators under `torch.ops`.

Several copies of the package may be loaded in one process, each under a name of its own, and an operator can be
defined once. The builder of Hugging Face `kernels` puts a module with the same two names in this place.
"""

from __future__ import annotations

import re

import torch

ops = getattr(torch.ops, re.sub(r"\W", "_", __package__))


def add_op_namespace_prefix(name: str) -> str:
    """Return the qualified name of an operator: "vglann_kernels::<name>" in the installed package."""
    return f"{ops.name}::{name}"
