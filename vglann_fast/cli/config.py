"""Reading --config FILE: YAML, and so JSON, with a command's arguments by name.

    preset: demo
    epochs: 30
    lr-latents: 1e-2      # dashes or underscores
    losses: [laplacian, l1]

A value means what the same text means on the command line, whatever type YAML would give it: `cuda-graph: on` is the
word "on". So the file is parsed to nodes, and their text goes through the converters of the arguments.
"""

from pathlib import Path
from typing import Any

from vglann_fast.cli.old_names import OldNames
from vglann_fast.cli.parser import Parser
from vglann_fast.cli.paths import expand_user
from vglann_fast.errors import UnreadableError, VglannError
from vglann_fast.run.files import open_regular

MAX_BYTES = 1_000_000


def config_values(parser: Parser, path: str, old_names: OldNames) -> dict[str, Any]:
    """Return the arguments in a config file, as `parser` converts them; those that are null are left out.

    Raises `VglannError` for a file that cannot be read, is not UTF-8 or not a YAML mapping, for an unknown or
    repeated name, and for a bad value.
    """
    where = f"--config {path}: "
    values: dict[str, Any] = {}
    for key, value in _pairs(_text(path, where), where):
        name, value = old_names.option(parser.get_default("command"), key.replace("-", "_"), value)
        if name in values:
            raise VglannError(f"{where}{name} is there twice; remove one of them")
        values[name] = value
    return parser.read_values(values, where)


def _text(path: str, where: str) -> str:
    try:
        with open_regular(Path(path)) as file:
            content = file.read(MAX_BYTES + 1)
    except UnreadableError as error:
        raise UnreadableError(f"{where}{error}") from error
    except (FileNotFoundError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise VglannError(f"{where}cannot be read ({reason}); give a file of options") from error
    if len(content) > MAX_BYTES:
        raise VglannError(f"{where}larger than {MAX_BYTES:,} bytes; give a file of options")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VglannError(f"{where}not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _pairs(text: str, where: str) -> list[tuple[str, Any]]:
    """Return the names and values of a YAML mapping: text, None, or a list of text."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        advice = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else "; correct this line"
        raise VglannError(f"{where}not YAML: {line}{error.problem}{advice}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise VglannError(f"{where}not YAML: {error}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise VglannError(f"{where}expected a mapping, one `name: value` a line")
    pairs = []
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise VglannError(f"{where}line {key.start_mark.line + 1}: expected the name of an option")
        pairs.append((_joined(key.value), _value(node)))
    return pairs


def _value(node: Any) -> Any:
    """Return the text of a scalar, None for null, a list with the text of its scalars, or {} for a mapping."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else expand_user(_joined(node.value))
    if isinstance(node, yaml.SequenceNode):
        return [item.value if isinstance(item, yaml.ScalarNode) else None for item in node.value]
    return {}


def _joined(text: str) -> str:
    r"""Return text in which pairs of surrogates, as JSON escapes an emoji, are one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
