"""The lines a run adds to while it lives: metrics.jsonl, history.jsonl and, where asked for, tensorboard/.

    history.jsonl      one line for each command that made something of the run later, for `replay`:
                       {"verb", "options": {name: value}, "environment": {...}}
    metrics.jsonl      one JSON object a line: {"stage": "glo" | kind of mapping, "step", ...}; a step of a mapping is
                       an epoch

A line that a crash has truncated is left out when reading, and ended before the next one is written. Names of earlier
versions are read as the present ones, see `options/aliases.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vglann_fast.errors import VglannError
from vglann_fast.options.aliases import read_options, read_record
from vglann_fast.run.destinations import atomic_file
from vglann_fast.run.environment import environment
from vglann_fast.run.files import append_line, json_lines


class RunLogs:
    """The log files of the run folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensorboard: Any = None

    def remember(self, verb: str, options: Mapping[str, Any]) -> None:
        """Append a command that made something of this run to history.jsonl."""
        line = {"verb": verb, "options": options, "environment": environment()}
        append_line(self.path / "history.jsonl", line)

    def history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl, oldest first; one that was torn by a crash is left out."""
        lines = json_lines(self.path / "history.jsonl")
        whole = [x for x in lines if isinstance(x.get("verb"), str) and isinstance(x.get("options"), dict)]
        return [{**line, "options": read_options(line["verb"], line["options"])} for line in whole]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one object, with "stage" and "step", to metrics.jsonl (and to TensorBoard if it was started)."""
        append_line(self.path / "metrics.jsonl", row)
        if self._tensorboard is not None:
            for name, value in row.items():
                if name not in ("stage", "step"):
                    self._tensorboard.add_scalar(f"{row['stage']}/{name}", value, row["step"])

    def start_tensorboard(self) -> None:
        """Write what is logged from now on to tensorboard/ too. Raises `VglannError` if it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise VglannError("--tensorboard: pip install 'vglann-fast[tensorboard]'") from error
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The logged rows of one stage, oldest first. A line torn by a crash is left out."""
        return [row for row in self._all_metrics() if row.get("stage") == stage]

    def drop_metrics(self, stage: str, after_step: int) -> None:
        """Remove the rows of `stage` beyond `after_step`: a resumed run logs those steps again."""
        rows = [r for r in self._all_metrics() if r.get("stage") != stage or r.get("step", 0) <= after_step]
        with atomic_file(self.path / "metrics.jsonl") as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _all_metrics(self) -> list[dict[str, Any]]:
        lines = map(read_record, json_lines(self.path / "metrics.jsonl"))
        return [row for row in lines if isinstance(row.get("step"), int)]
