"""`vglann tune`: the fastest way to compute on this machine, measured, and kept for the trainings to come.

Choices are contested one after the other, each with the choices before it in force: threads, precision, memory
format, where the clips wait, the implementation of each op, and eager, compiled or captured execution; at last all
choices together against the defaults. For a run with latents the search for nearest rows follows, on its latents:
rows in tight clusters want another implementation than rows that are spread out.

The result goes to the cache after each contest, see `runtime/measurements.py`, so a tune that is killed leaves what
it has measured. The contests of layers go there together, after a check of whole steps. Only an earlier measurement
of the same training stays until all is measured.
"""

import gc
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vglann_kernels import nearest_rows
from vglann_kernels.impl import OPS, requested, resolve
from vglann_kernels.verify import Shapes, verify

from vglann_fast.clips.dataset import ClipSet
from vglann_fast.clips.of_run import has_clips, open_clips
from vglann_fast.diagnostics.contenders import Contenders, SomeClips, runnable
from vglann_fast.diagnostics.contest import (
    LEAST_FACTOR,
    LEAST_FACTOR_OF_PRECISION,
    MAX_REASON,
    Clock,
    Lap,
    NoTime,
    Prepare,
    Refused,
    Stopped,
    contest,
    failure,
)
from vglann_fast.diagnostics.tune_file import readable, table
from vglann_fast.errors import VglannError
from vglann_fast.glo.checkpoint import load_trained
from vglann_fast.glo.compatibility import batch_size_for
from vglann_fast.glo.measured import mapping_shapes, training_shapes
from vglann_fast.options.choices import Choices, op_of
from vglann_fast.options.fields import flag_of, options_from_json
from vglann_fast.options.presets import preset
from vglann_fast.options.training import TrainOptions
from vglann_fast.progress import quiet
from vglann_fast.run.folder import RunDir
from vglann_fast.runtime import measurements
from vglann_fast.runtime.distributed import Ranks
from vglann_fast.runtime.measurements import TOGETHER, Contest, Entry, machine, only_tune, place
from vglann_fast.runtime.processors import others_are_busy

log = logging.getLogger("vglann_fast")

# Batches to measure with: several, so that the clips come from where they wait.
BATCHES = 8
# Rows of a search: more take longer and do not change the order of the contenders.
MOST_LATENTS, MOST_ROWS = 5_000, 50_000


@dataclass(frozen=True)
class Subject:
    """Measure a training on `clips`, and the search for the nearest of `rows` rows if there are latents [N, d]."""

    clips: SomeClips
    options: TrainOptions
    batch_size: int
    latents: Tensor | None = None
    rows: int = 0


def device_clock(device: torch.device) -> Clock:
    """Return a clock that waits for the device before it is read."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def tune(
    target: str | Path | None,
    *,
    name: str | None,
    given: Mapping[str, Any],
    device: torch.device,
    minutes: float,
    clock: Clock | None = None,
) -> str:
    """Measure for a run, for a clip folder, or for noise, and keep the result in the user's cache.

    Args:
        target: run folder, clip folder, or None for clips of noise of 32 frames of 64 x 64.
        name: preset of a training on clips. Default: modern.
        given: its options that differ from the preset.
        minutes: no round begins after these minutes, and a contest with fewer than three rounds is dropped.

    Returns the table of what was measured. Raises `VglannError` for a target or options that do not fit, where the
    cache cannot be written, where another process measures, and where the device fails.
    """
    clock = clock or device_clock(device)
    with only_tune(), quiet("vglann_kernels", "faiss"):
        if others_are_busy():
            log.warning(
                "other programs are running, so times are uncertain; measure again on an idle machine"
            )
        subject, before = _subject(target, name, given, device), readable()
        deadline = clock() + 60 * minutes
        try:
            measured = [_keep(_training_entries(subject, device, clock, deadline), before)]
            if subject.latents is not None:
                entries = _mapping_entries(subject.latents, subject.rows, device, clock, deadline)
                measured.append(_keep(entries, before))
        except Stopped as stopped:
            raise VglannError(
                f"{device}: nothing more can be measured ({stopped}); {place()} keeps what was measured. "
                "Run `vglann tune` again, with `--kernels reference` if a kernel was measured last"
            ) from stopped
        tables = [table(entry) for entry in measured if entry is not None]
        if not tables:
            raise VglannError(
                "nothing was measured: every choice is made, or no time was left; see the lines above"
            )
    return "\n\n".join([*tables, f"written: {place()}"])


def _keep(growing: Iterable[Entry], before: Sequence[Entry]) -> Entry | None:
    """Write a measurement whenever it has grown, and return the whole; None where it has nothing.

    before: what the cache held. Of these, one of the same training or mapping stays until the whole replaces it.
    """
    entry, written = None, None
    for entry in growing:
        if not any(entry.measures_the_same(other) for other in before):
            _write(entry)
            written = entry
    if entry is not written and entry is not None:
        _write(entry)
    return entry


def _write(entry: Entry) -> None:
    """Add a measurement to what the cache holds by now: on a file system without locks others may have written."""
    try:
        measurements.write(place(), [*readable(warn=False), entry])
    except VglannError:
        # What took minutes is shown, even if it cannot be kept.
        log.warning("%s", table(entry))
        raise


def _subject(
    target: str | Path | None, name: str | None, given: Mapping[str, Any], device: torch.device
) -> Subject:
    if target is None or not (Path(target) / "options.json").is_file():
        clips = None if target is None else ClipSet.open(target, "train")
        return _of_training(clips, replace(preset(name or "modern").train, **given))
    run = RunDir.open(target)
    if name or given:
        flags = ", ".join([*(["--preset"] if name else []), *map(flag_of, given)])
        raise VglannError(f"{flags}: {target} is a run and has its options; leave them out, or give CLIPS")
    options: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    clips = open_clips(run) if has_clips(run) else None
    subject = _of_training(clips, options, run.options["frames"], run.options["size"])
    if not run.checkpoints.exist():
        return subject
    latents = load_trained(run, device).latents
    imle: Any = preset(run.options["preset"]).map["imle"]
    return replace(subject, latents=latents, rows=imle.pool_factor * len(latents))


def _of_training(clips: ClipSet | None, options: TrainOptions, frames: int = 32, size: int = 64) -> Subject:
    if options.deterministic:
        raise VglannError(
            "--deterministic: such a training takes no measured choices, so there is nothing to tune"
        )
    wanted = BATCHES * options.batch_size * options.accumulate
    some = SomeClips(clips, wanted, frames, size)
    return Subject(some, options, batch_size_for(wanted if clips is None else len(clips), options, Ranks()))


def _training_entries(
    subject: Subject, device: torch.device, clock: Clock, deadline: float
) -> Iterator[Entry]:
    """Contest the choices of a training one after the other; yield what is measured, whenever it has grown.

    Layers are checked one by one, so their choices count after a check of whole steps with all of them. A default
    that is wrong and stays is the end: every later contender would compute by it, and would be wrong, too.
    """
    options, clips = subject.options, subject.clips
    contenders = Contenders(clips, options, device, clock)
    # The reference training is compared with, and not timed.
    _release(device)
    chosen: dict[str, str] = {}
    contests: dict[str, Contest] = {}
    unchecked: dict[str, Contest] = {}
    shapes = training_shapes(options, clips.frames, clips.size, subject.batch_size)

    def contested() -> Iterator[tuple[str, Mapping[str, Choices]]]:
        for name, values in contenders.contests(chosen):
            yield name, {value: {**chosen, name: value} for value in values}
        if any(found.choice != found.default for found in contests.values()):
            yield TOGETHER, {"defaults": {}, "choices": chosen}

    waiting, name = contested(), ""
    try:
        for name, ways in waiting:
            prepared = {way: partial(contenders.prepare, choices, name) for way, choices in ways.items()}
            measured = _contest(name, prepared, device, clock, deadline)
            chosen |= {name: found.choice for name, found in measured.items()}
            wrong = _wrong(measured)
            if name in contenders.layers and not wrong:
                unchecked |= measured
                if name != list(contenders.layers)[-1]:
                    continue
                measured = _checked(unchecked, contenders, chosen, device)
                unchecked, wrong = {}, _wrong(measured)
            contests.update(measured)
            if measured:
                yield Entry(machine(device), shapes, _now(), dict(contests))
            if wrong:
                _warn_of_wrong_default(wrong, contests[wrong], [*unchecked, *(name for name, _ in waiting)])
                return
    except NoTime:
        rest = ", ".join(dict.fromkeys([*unchecked, name, *(name for name, _ in waiting), TOGETHER]))
        log.warning("no time left for %s; raise --minutes. Without %s only one choice counts", rest, TOGETHER)


def _checked(
    layers: Mapping[str, Contest], contenders: Contenders, chosen: dict[str, str], device: torch.device
) -> dict[str, Contest]:
    """Train a twin with the layers' choices and return their contests; where it is off, all layers have the defaults.

    In the contest of all choices together a wrong layer would cost every other choice. A contest is dropped where its
    default could not compute, since its choice must have a time. chosen: all choices so far, changed likewise.
    """
    changed = {name: found for name, found in layers.items() if found.choice != found.default}
    if not changed:
        return dict(layers)
    reason = failure(partial(contenders.prepare, chosen, ""), partial(_release, device))
    if not reason:
        return dict(layers)
    log.warning("the choices for %s are left out, in whole steps: %s", ", ".join(changed), reason)
    count = dict(layers)
    for name, found in changed.items():
        if found.default not in found.seconds:
            del count[name], chosen[name]
            continue
        left_out = {**found.left_out, found.choice: f"in whole steps: {reason}"[:MAX_REASON]}
        count[name] = replace(found, choice=found.default, left_out=left_out)
        chosen[name] = found.default
    return count


def _mapping_entries(
    latents: Tensor, rows: int, device: torch.device, clock: Clock, deadline: float
) -> Iterator[Entry]:
    """Contest the searches for nearest rows on a run's latents, among rows that are spread as they are."""
    if requested("nearest")[0] != "auto":
        return
    queries = latents[:: -(-len(latents) // MOST_LATENTS)].contiguous()
    database = rows_near(latents, min(rows, MOST_ROWS))
    default = resolve("nearest", device=device).impl
    names = dict.fromkeys([default, *runnable("nearest", device)])
    ways = {name: partial(_search, name, queries, database) for name in names}
    try:
        measured = _contest("nearest", ways, device, clock, deadline)
    except NoTime:
        log.warning("no time left for nearest; raise --minutes")
        return
    if measured:
        yield Entry(machine(device), mapping_shapes(*latents.shape), _now(), measured)
    if wrong := _wrong(measured):
        _warn_of_wrong_default(wrong, measured[wrong], [])


def rows_near(latents: Tensor, count: int) -> Tensor:
    """Return unit rows [count, d] as a fitted mapping makes them: as far from a latent as latents from each other."""
    random = torch.Generator(latents.device).manual_seed(0)
    few = latents[:: -(-len(latents) // 500)].double()
    apart = torch.cdist(few, few).fill_diagonal_(torch.inf).amin(dim=1).median().float()
    at = torch.randint(len(latents), (count,), generator=random, device=latents.device)
    noise = torch.randn(count, latents.shape[1], generator=random, device=latents.device)
    near = latents[at] + apart * torch.nn.functional.normalize(noise, dim=1)
    return torch.nn.functional.normalize(near, dim=1)


def _search(name: str, queries: Tensor, database: Tensor, _: ExitStack) -> Lap:
    """Check an implementation of `nearest_rows` and return searches by it. Raises `Refused` where a row is wrong."""

    def lap(searches: int) -> None:
        for _ in range(searches):
            nearest_rows(queries, database, impl=name)

    shapes = Shapes(latent_dim=queries.shape[1], device=str(queries.device))
    for line in verify(shapes, ["nearest"]):
        if line.case.startswith(f"{name},") and not line.ok:
            case = line.case.removeprefix(f"{name}, ")
            raise Refused(f"{case}, {line.quantity}: {line.error:.2g} (at most {line.limit:g})", lap)
    right, found = (nearest_rows(queries, database, impl=impl)[0] for impl in ("reference", name))
    if wrong := int((found != right).sum()):
        raise Refused(f"{wrong} of {len(queries)} rows are not the nearest", lap)
    return lap


def _contest(
    name: str, ways: Mapping[str, Prepare], device: torch.device, clock: Clock, deadline: float
) -> dict[str, Contest]:
    """Hold a contest and say what was left out; returns it by its name, or {} where nothing could be chosen."""
    if len(ways) < 2:
        return {}
    log.info("%s: %s", name, ", ".join(ways))
    least = LEAST_FACTOR_OF_PRECISION if name == "precision" else LEAST_FACTOR
    found = contest(ways, clock, deadline=deadline, least=least, release=partial(_release, device))
    for contender, reason in found.left_out.items():
        if contender != found.choice:
            log.warning("%s %s is left out: %s", name, contender, reason)
    return {name: found} if found.choice else {}


def _wrong(measured: Mapping[str, Contest]) -> str:
    """Return the first contest that keeps a wrong default, or ""."""
    return next((name for name, found in measured.items() if found.choice in found.left_out), "")


def _warn_of_wrong_default(name: str, found: Contest, rest: Sequence[str]) -> None:
    """Say that a default is wrong and stays, what a user can do, and what was not measured for this reason."""
    right = [contender for contender in found.seconds if contender not in found.left_out]
    op, reason = op_of(name), found.left_out[found.choice]
    flags = {"precision": "--precision ", "data": "--data ", "threads": "--threads "}
    flags |= {op: f"--kernels auto,{op}=" for op in OPS}
    said = f"{name} {found.default}, the default, is wrong: {reason}; nothing that is right is faster"
    if not right:
        said = f"the defaults are wrong: {reason}; nothing in the contest of {name} is right. Try `vglann verify` "
        said += "and `--kernels reference`"
    elif op in flags:
        said += f"; `{flags[op]}{right[0]}` takes what is right"
    log.warning("%s", said + (f". Not measured: {', '.join(rest)}" if rest else ""))


def _release(device: torch.device) -> None:
    """Give memory of a GPU back that nothing holds any more, so that another contender may have all of it."""
    if device.type == "cuda":
        # A training refers to itself.
        gc.collect()
        torch.cuda.empty_cache()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
