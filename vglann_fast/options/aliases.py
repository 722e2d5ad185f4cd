"""Names of earlier versions, and what they are called now: one table, asked by whatever reads an older file.

    options.json       `read_run_options`    the training's options, and what resumes changed of them
    mapping.json       `read_mapping`        the mapping's options, and the rows of its epochs
    history.jsonl      `read_options`        the options of a command
    metrics.jsonl, reconstruction.json, evaluation/*.json, table.json    `read_record`
    any of the JSON files   `read_file_of_run`
    command lines, --config FILE             `alias`, which the command line reports as a warning

Nothing here writes an old name. An entry may be removed when runs of its version need not be read any more.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Alias(NamedTuple):
    """`old` was called so in `scope` up to version `until`, and is called `new` now.

    scope: "command" for commands, "record" for keys of JSON records, a command for names of its options, and
        "<command> <option>" for values of an option.
    """

    scope: str
    old: str
    new: str
    until: str


ALIASES = (
    Alias("command", "import-seed", "import-glann", "0.1.0"),
    Alias("clips pack", "test_share", "test_fraction", "0.1.0"),
    Alias("train perceptual", "seed", "paper", "0.1.0"),
    Alias("train blur", "seed", "paper", "0.1.0"),
    Alias("train schedule", "halving", "halve-every-tenth", "0.1.0"),
    Alias("train latent_mode", "row", "sparse", "0.1.0"),
    Alias("train latent_mode", "catchup", "lazy", "0.1.0"),
    Alias("map", "held_out", "holdout_fraction", "0.1.0"),
    Alias("map", "normalise", "normalize", "0.1.0"),
    Alias("map schedule", "halving", "halve-every-50", "0.1.0"),
    Alias("evaluate", "held_out", "invert", "0.1.0"),
    Alias("record", "psnr_mean_colour", "psnr_mean_color", "0.1.0"),
    Alias("record", "hubness", "match_diversity", "0.1.0"),
    Alias("record", "made", "generated", "0.1.0"),
)
_BY_SCOPE = {(alias.scope, alias.old): alias for alias in ALIASES}
# A table is trained with the options of `train`.
_SAME_OPTIONS = {"table": "train"}


def alias(scope: str, old: object) -> Alias | None:
    """Return the entry of the old name or value, or None for one that is not old."""
    return _BY_SCOPE.get((scope, old)) if isinstance(old, str) else None


def option_alias(command: str, name: str) -> Alias | None:
    """Return the entry of an option that was renamed."""
    return alias(_SAME_OPTIONS.get(command, command), name)


def value_alias(command: str, name: str, value: object) -> Alias | None:
    """Return the entry of a value that was renamed; `name` is the option's present name."""
    return alias(f"{_SAME_OPTIONS.get(command, command)} {name}", value)


def read_options(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a command under their present names, with present values."""
    present = {}
    for name, value in options.items():
        renamed = option_alias(command, name)
        if renamed and renamed.new in options:
            continue
        current = renamed.new if renamed else name
        present[current] = _present_value(command, current, value)
    return present


def _present_value(command: str, name: str, value: Any) -> Any:
    former = value_alias(command, name, value)
    return former.new if former else value


def read_run_options(options: Any) -> Any:
    """Return what options.json holds with present names. What is damaged stays, for its reader to refuse."""
    if not isinstance(options, dict):
        return options
    present = dict(options)
    if isinstance(options.get("train"), dict):
        present["train"] = read_options("train", options["train"])
    if isinstance(options.get("resumed"), list):
        present["resumed"] = [_read_resume(entry) for entry in options["resumed"]]
    return present


def _read_resume(entry: Any) -> Any:
    """Return an entry of "resumed", where "changed" holds {name: [value before, value after]}."""
    if not isinstance(entry, dict) or not isinstance(entry.get("changed"), dict):
        return entry
    changed = {
        name: [_present_value("train", name, value) for value in pair] if isinstance(pair, list) else pair
        for name, pair in read_options("train", entry["changed"]).items()
    }
    return {**entry, "changed": changed}


def read_file_of_run(name: str, value: Any) -> Any:
    """Return what a JSON file of a run holds, by the file's name, with present names."""
    readers = {"options.json": read_run_options, "mapping.json": read_mapping}
    return readers.get(name, read_record)(value)


def read_mapping(record: Any) -> Any:
    """Return what mapping.json holds with present names."""
    record = read_record(record)
    if isinstance(record, dict) and isinstance(record.get("options"), dict):
        record["options"] = read_options("map", record["options"])
    return record


def read_record(value: Any) -> Any:
    """Return a JSON value after giving its keys, at any depth, their present names, in place."""
    # Not recursive: a damaged file may be nested more deeply than functions may be.
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            items = [
                (old.new if (old := alias("record", name)) else name, item) for name, item in inner.items()
            ]
            inner.clear()
            inner.update(items)
            left.extend(inner.values())
        elif isinstance(inner, list):
            left.extend(inner)
    return value
