"""vglann-fast: train non-adversarial video generators at hardware speed."""

__version__ = "0.1.0"
