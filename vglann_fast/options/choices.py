"""Choices of the machine that a user leaves open: how a training computes, not what.

`vglann tune` measures them, a new training reads them, and a run keeps those that it began with. They are a mapping
from names to values: the keys of `VALUES`, "threads" (a number of CPU threads), and the names of ops and of layers,
whose values are implementations. "upsample_conv 3d 128-64" is a layer of the op "upsample_conv": a choice for it
counts before a choice for the op. A name that is missing was not measured; then the rules of the program decide.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from vglann_fast.options.training import TrainOptions

Choices = Mapping[str, str]

VALUES = {
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "memory_format": ("channels-last", "contiguous"),
    "data": ("resident", "pinned", "mmap"),
    "execution": ("eager", "compile", "graph"),
}
THREADS, MAX_THREADS = "threads", 1024
MAX_TEXT, MAX_CHOICES = 200, 100


def is_text(value: Any) -> bool:
    """Return True if this is a short line that a terminal can show."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def read_choices(value: Any) -> dict[str, str]:
    """Return choices as a JSON file has them. Raises ValueError for anything else.

    Implementations of ops are not looked up: one that does not exist here is never taken.
    """
    if not isinstance(value, dict) or len(value) > MAX_CHOICES:
        raise ValueError("the choices are not an object of names and values")
    for name, choice in value.items():
        if not (is_text(name) and is_text(choice)):
            raise ValueError("a choice is not a name and a value")
        if choice not in VALUES.get(name, (choice,)):
            raise ValueError(f"{name} is {choice!r}; expected one of {', '.join(VALUES[name])}")
        threads = name == THREADS
        if threads and not (choice.isdecimal() and len(choice) <= 4 and 0 < int(choice) <= MAX_THREADS):
            raise ValueError(f"threads is {choice!r}; expected 1 to {MAX_THREADS}")
    return dict(value)


def kernels(choices: Choices) -> dict[str, str]:
    """Return the choices of implementations, by op or layer."""
    return {name: choice for name, choice in choices.items() if name not in VALUES and name != THREADS}


def op_of(name: str) -> str:
    """Return the op of a choice, which may be for one of its layers alone."""
    return name.partition(" ")[0]


def left_open(options: TrainOptions, given: Collection[str] = ()) -> set[str]:
    """Return the names in `VALUES` that these options leave open.

    given: names of options that the user has stated. `compile` alone needs it, whose default is a value like any.
    """
    if options.deterministic:
        return set()
    opened = {"memory_format"}
    opened |= {name for name in ("precision", "data") if getattr(options, name) == "auto"}
    if options.cuda_graph == "auto" and not options.compile and "compile" not in given:
        opened.add("execution")
    return opened


def settled(options: TrainOptions, choices: Choices) -> TrainOptions:
    """Return the options with choices in place of what they leave open; the other choices are not options."""
    changes: dict[str, Any] = {}
    if "precision" in choices:
        changes["precision"] = choices["precision"]
    if choices.get("execution") == "compile":
        changes["compile"] = True
    return replace(options, **changes)
