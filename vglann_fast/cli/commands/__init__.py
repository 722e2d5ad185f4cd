"""The commands. Importing a module of this package registers its commands, in the order of `vglann --help`."""

# ruff: noqa: I001
from vglann_fast.cli.commands import clips, training, mapping, measuring, study, machine

__all__ = ["clips", "machine", "mapping", "measuring", "study", "training"]
