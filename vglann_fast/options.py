"""What the option dataclasses of `config.py` and `mapping_options.py` are made of."""

from dataclasses import field
from typing import Any, get_args, get_type_hints

from vglann_fast.errors import VglannError


def option(default: Any, text: str, *, machine: bool = False, rate: bool = False) -> Any:
    """A field with its help text. A resumed run may choose anew what is of the `machine`, and a learning `rate`."""
    return field(default=default, metadata={"help": text, "machine": machine, "anew": machine or rate})


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise `VglannError`, naming the option and what it may hold, unless `condition`."""
    if not condition:
        raise VglannError(f"--{name.replace('_', '-')}: expected {expected}, got {got}")


def check_choices(options: Any) -> None:
    """Every field annotated with a Literal holds one of its values."""
    for name, hint in get_type_hints(type(options)).items():
        choices = get_args(hint)
        if choices and all(isinstance(choice, str) for choice in choices):
            value = getattr(options, name)
            require(value in choices, name, f"one of {', '.join(choices)}", value)
