"""Fields of the option dataclasses in `training.py` and `mapping.py`, their checks, and their JSON."""

from dataclasses import asdict, field, fields
from typing import Any, get_args, get_type_hints

from vglann_fast.errors import VglannError


def option(
    default: Any, text: str, *, group: str = "", metavar: str = "", machine: bool = False, rate: bool = False
) -> Any:
    """Return a dataclass field of an option.

    Args:
        text: for --help, without the default.
        group: heading of --help that it stands under.
        metavar: of the value in --help, with its unit. Default: by type.
        machine: the value changes where and how fast the training runs, not what it computes.
        rate: a learning rate. A resumed training may change rates and options of the machine, nothing else.
    """
    metadata = {"help": text, "group": group, "metavar": metavar, "machine": machine}
    return field(default=default, metadata={**metadata, "resumable": machine or rate})


def flag_of(name: str) -> str:
    """Return the option of the command line for a field or argument: "lr_latents" -> "--lr-latents"."""
    return "--" + name.replace("_", "-")


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise `VglannError`, naming the option and what it may hold, unless `condition`."""
    if not condition:
        raise VglannError(f"{flag_of(name)}: expected {expected}, got {got}")


def check_choices(options: Any) -> None:
    """Raise `VglannError` unless every field annotated with a Literal holds one of its values."""
    for name, hint in get_type_hints(type(options)).items():
        choices = get_args(hint)
        if choices and all(isinstance(choice, str) for choice in choices):
            value = getattr(options, name)
            require(value in choices, name, f"one of {', '.join(choices)}", value)


def options_from_json(cls: type, values: dict[str, Any]) -> Any:
    """Return a dataclass of options from a JSON object with present names (see `aliases.py`).

    An option that is missing, because the file is older than it, has its default. Raises `VglannError` for unknown
    names and values of another type.
    """
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
    """Return the JSON object that `options_from_json` reads."""
    return asdict(options)
