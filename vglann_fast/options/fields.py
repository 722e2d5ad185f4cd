"""What the option dataclasses of `training.py` and `mapping.py` are made of."""

from dataclasses import asdict, field, fields
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


def options_from_json(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass of options from a JSON object. An option that is missing, since the file is of an earlier
    version, has its default; unknown names are refused with `VglannError`."""
    if not isinstance(values, dict):
        raise VglannError("options: not a JSON object; the file was changed")
    odd = sorted(values.keys() - {f.name for f in fields(cls)})
    if odd:
        raise VglannError(f"options: unknown {', '.join(odd)}; made by another version?")
    for field_ in fields(cls):
        value, kind = values.get(field_.name, field_.default), type(field_.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise VglannError(
                f"options: {field_.name} is {value!r}, not a {kind.__name__}; the file was changed"
            )
    return cls(**values)


def options_to_json(options: Any) -> dict[str, Any]:
    """The JSON object `options_from_json` reads."""
    return asdict(options)
