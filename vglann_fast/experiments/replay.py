"""`vglann replay RUN`: the run made once more from what it recorded of itself, and compared with it bit by bit.

Repeated are the training, from options.json and what resumes changed there, up to the newest checkpoint; then, of
the commands in history.jsonl, the last that made each of the mappings and videos which are there. On the machine and
with the versions it was made with everything should match, on a GPU if the run was --deterministic.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vglann_fast.errors import VglannError
from vglann_fast.options.aliases import read_file_of_run
from vglann_fast.run.environment import environment
from vglann_fast.run.files import read_json
from vglann_fast.run.folder import RunDir, whole_run
from vglann_fast.runtime.processors import allowed

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("vglann_fast")

# What each command makes that can be repeated, under the run; a mapping has its kind as a further folder. The command
# line records these commands in history.jsonl.
MADE = {
    "map": ("mapping",),
    "reconstruct": ("media/reconstruction",),
    "sample": ("media/samples", "media/nearest"),
    "interpolate": ("media/interpolation",),
}
CLOCKS = ("seconds", "seconds_per_epoch")  # what two equal runs do not share
RunCommand = Callable[
    [str, Mapping[str, Any], Path], None
]  # (verb, its options, run) -> nothing, having run it


@dataclass(frozen=True)
class Verdict:
    """An artifact, and if it came out the same: None where it could not be made again. `detail` says why not."""

    artifact: str
    same: bool | None
    detail: str = ""

    def __str__(self) -> str:
        word = {True: "SAME", False: "DIFF", None: "SKIP"}[self.same]
        return f"{word} {self.artifact}" + (f": {self.detail}" if self.detail else "")


def replay(
    path: str | Path,
    again: RunCommand,
    *,
    out: str | Path | None = None,
    clips: str | Path | None = None,
    device: Any = "cpu",
) -> list[Verdict]:
    """Make the run at `path` once more and compare.

    Args:
        again: runs a verb on a run.
        out: folder for the second run, which stays once it is whole; without it there is a temporary one.
        clips: where the run's clips are now, if they were moved.

    Raises `VglannError` when the clips are gone or others, when several processes trained the run, when a resume
    had --latents-on-mismatch, and as training.
    """
    run = RunDir.open(path)
    if clips is not None:
        run.options["clips"] = str(Path(clips).absolute())
    with _folder(out) as folder, _as_it_was(run):
        second = _train_again(run, folder, device)
        verdicts = list(_compare_training(run, second))
        for artifacts, line, reason in _later_commands(run):
            if line is None:
                verdicts += [Verdict(name, None, reason) for name in artifacts]
                continue
            again(line["verb"], line["options"], second.path)
            verdicts += [_compare_folders(name, run.path / name, second.path / name) for name in artifacts]
    return verdicts


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        with whole_run(out) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vglann-replay-", ignore_cleanup_errors=True) as scratch:
        yield Path(scratch) / "run"


@contextmanager
def _as_it_was(run: RunDir) -> Iterator[None]:
    """Threads and kernels as when the run was made; what else has changed is said."""
    import torch
    from vglann_kernels.impl import ImplUnavailable, using_impl

    from vglann_fast.runtime.numerics import numerics

    then, now = run.recorded_environment(), environment()
    for name in ("vglann-fast", "torch", "gpu", "cuda"):
        if name in then and then[name] != now[name]:
            log.warning("%s was %s and is %s now: digits may differ", name, then[name], now[name])
    threads, kernels = then.get("cpu_threads"), then.get("kernels")
    with ExitStack() as restored:
        # More threads than processors may end the process.
        if type(threads) is int and 0 < threads <= allowed():
            restored.enter_context(numerics(threads=threads))
        elif threads is not None:
            log.warning(
                "cpu_threads was %s and is %s now: digits may differ", threads, torch.get_num_threads()
            )
        try:
            restored.enter_context(using_impl(kernels))
        except (ValueError, TypeError, AttributeError, ImplUnavailable) as error:
            raise VglannError(f"{run.path}/environment.json: kernels {kernels!r}: {error}") from error
        yield


def _train_again(run: RunDir, folder: Path, device: Any) -> RunDir:
    import torch

    from vglann_fast.clips.of_run import check_same_clips, has_clips, open_clips
    from vglann_fast.glo.assemble import new_training
    from vglann_fast.glo.checkpoint import check_saved_size
    from vglann_fast.glo.measured import as_chosen, choices_of_run
    from vglann_fast.glo.precision import training_numerics
    from vglann_fast.options.choices import settled
    from vglann_fast.options.fields import options_from_json
    from vglann_fast.options.training import TrainOptions

    state, _ = run.checkpoints.load()
    _check_repeatable(run, state["processes"])
    stretches = list(_stretches(run.options, state["step"]))
    original = {name: value for name, value in run.options.items() if name not in ("resumed", "train")}
    second = RunDir.new(folder, {**original, "train": stretches[0][1]}).begin()
    if not has_clips(run):  # imported: there was no training
        shutil.copytree(run.path / "checkpoints", folder / "checkpoints")
        return second
    clips = open_clips(run, verify=True)
    check_same_clips(state["ids"], clips.ids)
    every = min([row["step"] for row in run.logs.metrics("glo")], default=10)
    device, seed = torch.device(device), run.options["seed"]
    for until, train, kept in stretches:
        options: TrainOptions = options_from_json(TrainOptions, train)
        check_saved_size(run, options)
        choices = choices_of_run(run, options, device, choices=kept)
        options = settled(options, choices)
        with as_chosen(choices), training_numerics(options, device):
            training = new_training(clips, options, second, seed=seed, device=device, choices=choices)
            training.resume()
            training.loop(max_steps=until, log_every=max(1, every), checkpoint_every=options.passes)
        training.source.close()
    return second


def _check_repeatable(run: RunDir, processes: int) -> None:
    """Raise `VglannError` for a training, ended by `processes`, that one process on its clips cannot repeat."""
    resumes = run.options.get("resumed", [])
    began = run.recorded_environment().get("processes")
    counts = [processes, began, *(entry["environment"].get("processes", [1, 1])[1] for entry in resumes)]
    if several := [count for count in counts if count not in (None, 1)]:
        raise VglannError(f"{run.path} was trained by {several[0]} processes; a replay is one")
    for entry in resumes:
        choice = entry.get("latents_on_mismatch", "error")
        if choice != "error":
            raise VglannError(
                f"{run.path} was resumed at step {entry['step']} with --latents-on-mismatch {choice}; the clips "
                "before that are not on record, so it cannot be replayed"
            )


def _stretches(options: Mapping[str, Any], last: int) -> Iterator[tuple[int, dict[str, Any], dict[str, str]]]:
    """(step up to which, options, measured choices) of each part of the training, between resumes that changed
    something.

    What was trained after a resume is not part of it if a later resume went on from an earlier step.
    """
    resumes = options.get("resumed", [])
    train, choices, before = dict(options["train"]), options.get("measured", {}).get("choices", {}), []
    for entry in reversed(resumes):
        before.append((dict(train), choices))
        choices = entry.get("choices", [choices])[0]
        for name, (old, _) in entry["changed"].items():
            train.pop(name, None)
            if name != "clips" and old is not None:
                train[name] = old
    parts, end = [], last
    begun = [*before, (train, choices)]
    for start, part in zip([e["step"] for e in reversed(resumes)] + [0], begun, strict=True):
        if start <= end:
            parts.append((end, *part))
            end = start
    yield from reversed(parts)


def _later_commands(run: RunDir) -> Iterator[tuple[list[str], dict[str, Any] | None, str]]:
    """(artifacts, the line of history.jsonl that made them, why there is none) in the order to make them."""
    lines: dict[str, dict[str, Any]] = {}
    for line in run.logs.history():
        for place in MADE.get(line["verb"], ()):
            kind = f"/{line['options'].get('kind')}" if line["verb"] == "map" else ""
            lines[place + kind] = line
    step = run.checkpoints.load()[0]["step"]
    for place in [p for places in MADE.values() for p in places[:1]]:
        folder = run.path / place
        for name in (
            [f"{place}/{kind.name}" for kind in sorted(folder.glob("*/"))] if place == "mapping" else [place]
        ):
            if not (run.path / name).is_dir():
                continue
            names = [name, *(p for places in MADE.values() if name == places[0] for p in places[1:])]
            names = [n for n in names if (run.path / n).is_dir()]
            made_at = _step_of(run.path / name)
            if made_at not in (None, step):
                yield names, None, f"made at step {made_at}, the run is at step {step} now"
            elif name not in lines:
                yield names, None, "no record of the command that made it"
            else:
                yield names, lines[name], ""


def _step_of(folder: Path) -> Any:
    """The step of the run that an artifact was made at, where it says."""
    for file in sorted(folder.glob("*.json")):
        record = read_json(file)
        if isinstance(record, dict) and "step" in record:
            return record["step"]
    return None


def _compare_training(run: RunDir, second: RunDir) -> Iterator[Verdict]:
    (state, parts), (other_state, other_parts) = run.checkpoints.load(), second.checkpoints.load()
    where = f"checkpoint {state['step']}"
    yield Verdict(where, (state["step"], state["ids"]) == (other_state["step"], other_state["ids"]))
    for part, tensors in parts.items():
        detail = _differences(tensors, other_parts.get(part, {}))
        yield Verdict(f"{where}, {part}", not detail, detail)
    if run.options["clips"] is not None:
        ours, theirs = ({row["step"]: _timeless(row) for row in r.logs.metrics("glo")} for r in (run, second))
        steps = sorted(ours.keys() & theirs.keys())
        if not steps:
            yield Verdict("metrics", None, "no common lines")
            return
        wrong = [step for step in steps if ours[step] != theirs[step]]
        detail = f"{len(wrong)} of {len(steps)} lines, the first at step {wrong[0]}" if wrong else ""
        yield Verdict("metrics", not wrong, detail)


def _differences(ours: Mapping[str, "Tensor"], theirs: Mapping[str, "Tensor"]) -> str:
    """Describe how the tensors differ; empty when every bit is the same."""
    if ours.keys() != theirs.keys():
        return f"other tensors: {', '.join(sorted(ours.keys() ^ theirs.keys())[:3])}"
    wrong = [n for n, t in ours.items() if t.numpy().tobytes() != theirs[n].numpy().tobytes()]
    if not wrong:
        return ""
    gaps = [
        (ours[n].double() - theirs[n].double()).abs().max().item()
        for n in wrong
        if ours[n].shape == theirs[n].shape
    ]
    return f"{len(wrong)} of {len(ours)} tensors, by up to {max(gaps, default=float('nan')):.3g}: {wrong[0]}, ..."


def _compare_folders(name: str, ours: Path, theirs: Path) -> Verdict:
    """File by file; JSON without its clocks."""
    files = sorted(file.relative_to(ours) for file in ours.rglob("*") if file.is_file())
    wrong = [str(file) for file in files if not _same_file(ours / file, theirs / file)]
    return Verdict(
        name, not wrong, f"{len(wrong)} of {len(files)} files: {', '.join(wrong[:4])}" if wrong else ""
    )


def _same_file(ours: Path, theirs: Path) -> bool:
    if not theirs.is_file():
        return False
    one, other = ours.read_bytes(), theirs.read_bytes()
    if one == other or ours.suffix != ".json":
        return one == other
    values = (read_file_of_run(ours.name, json.loads(content)) for content in (one, other))
    return len({_timeless(value) for value in values}) == 1


def _timeless(value: Any) -> Any:
    """The value without its clocks, at any depth; as text, in which NaN equals NaN."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(inner) for name, inner in value.items() if name not in CLOCKS}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(without(value), sort_keys=True)
