"""The names that the kernel library has for values of our options. It accepts ours, too, in its next version."""

_KERNEL_NAMES = {"paper": "seed", "sparse": "row", "lazy": "catchup"}


def kernel_name(value: str) -> str:
    """Return what the ops call a blur or a latent mode."""
    return _KERNEL_NAMES.get(value, value)
