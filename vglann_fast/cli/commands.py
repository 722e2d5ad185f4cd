"""What each verb of the command line does: it checks what the parser cannot, then calls one function of a stage.

Whatever is heavy is imported inside the functions, so that `vglann --help` is quick.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace

from vglann_fast.cli.device import device_and_kernels, device_of
from vglann_fast.cli.parser import new_parser
from vglann_fast.errors import VglannError
from vglann_fast.options.fields import options_to_json
from vglann_fast.options.mapping import map_options
from vglann_fast.options.presets import preset
from vglann_fast.options.training import TrainOptions


def _clips_fetch(a: Namespace) -> None:
    from vglann_fast.clips.fetch import fetch

    paths = fetch(a.set, a.cache)
    print(f"{paths[0].parent}: {len(paths)} videos")


def _clips_pack(a: Namespace) -> None:
    from vglann_fast.clips.pack import decode_limits, pack

    options = a.as_dict()
    limits = {name: options.pop(f"max_{name}") for name in ("frames", "pixels", "seconds")}
    given = {name: value for name, value in options.items() if name not in ("sources", "out")}
    print(pack(a.sources, a.out, **given, limits=decode_limits(a.stabilize, **limits)))


def _clips_show(a: Namespace) -> None:
    from vglann_fast.clips.sheet import show

    out = a.out or Path(a.clips) / "sheet.png"
    show(a.clips, out)
    print(out)


def _train(a: Namespace) -> None:
    given = _given(a, TrainOptions)
    if a.resume is not None:
        fixed = given.keys() - {f.name for f in fields(TrainOptions) if f.metadata["anew"]}
        if fixed or a.out or a.preset or a.seed is not None:
            raise VglannError(
                "--resume: takes its options from the run; give it alone, or with CLIPS where its clips are now, "
                "the learning rates and what is of the machine"
            )
        _resume(a, given)
        return
    if a.clips is None or a.out is None:
        missing = " and ".join(n for n, v in (("CLIPS", a.clips), ("--out RUN", a.out)) if v is None)
        raise VglannError(f"train: {missing} missing; a training needs CLIPS and --out RUN, or --resume RUN")
    if a.latents_on_mismatch != "error":
        raise VglannError("--latents-on-mismatch: a new run has no latents yet; give it with --resume")
    options = replace(preset(a.preset or "modern").train, **given)
    record = {
        "preset": a.preset or "modern",
        "seed": a.seed or 0,
        "clips": str(Path(a.clips).absolute()),
        "train": options_to_json(options),
    }
    if _dry_run(
        a, record | {"passes": {"background": options.background_passes, "full": options.full_passes}}
    ):
        return
    from vglann_fast.clips.dataset import ClipSet
    from vglann_fast.run.folder import RunDir
    from vglann_fast.runtime.distributed import joined

    device = device_and_kernels(a)
    with joined(device) as ranks:
        clips = ClipSet.open(a.clips, "train")
        run = RunDir.new(a.out, {**record, "frames": clips.frames, "size": clips.size})
        _train_run(a, clips, run, device, ranks, resume=False)


def _resume(a: Namespace, given: dict[str, Any]) -> None:
    """`given`: options that may differ from those the run began with."""
    from vglann_fast.run.folder import RunDir

    run = RunDir.open(a.resume)
    if run.options["clips"] is None:
        raise VglannError(f"{a.resume} was imported: there is no training of it to continue")
    run.options["train"].update(given)
    if a.clips is not None:
        run.options["clips"] = str(Path(a.clips).absolute())
    if _dry_run(a, run.options):
        return
    from vglann_fast.clips.of_run import open_clips
    from vglann_fast.runtime.distributed import joined

    device = device_and_kernels(a)
    with joined(device) as ranks:
        _train_run(a, open_clips(run, verify=True), run, device, ranks, resume=True)


def _train_run(a: Namespace, clips: Any, run: Any, device: Any, ranks: Any, *, resume: bool) -> None:
    from vglann_fast.glo.train import train

    train(
        clips,
        run,
        seed=run.options["seed"],
        device=device,
        log_every=a.log_every,
        checkpoint_every=a.checkpoint_every,
        keep_checkpoints=a.keep_checkpoints,
        resume=resume,
        on_mismatch=a.latents_on_mismatch,
        tensorboard=a.tensorboard,
        ranks=ranks,
    )
    if ranks.rank == 0:
        for warning in run.warnings:
            print(f"vglann: warning: {warning}", file=sys.stderr)
        print(f"trained: {run.path}")


def _profile(a: Namespace) -> None:
    from vglann_fast.diagnostics.profile import profile

    print(profile(a.run, steps=a.steps, device=device_and_kernels(a)))


def _map(a: Namespace) -> None:
    from vglann_fast.run.files import read_json
    from vglann_fast.run.folder import RunDir

    name = a.preset or RunDir.open(a.run).options.get("preset", "modern")
    presets = preset(name).map
    options = map_options(presets, a.kind, _given(a, *map(type, presets.values())))
    if _dry_run(a, {"preset": name, "kind": a.kind, "map": options_to_json(options)}):
        return
    from vglann_fast.mapping.fit import fit_mapping
    from vglann_fast.mapping.generalization import describe_gap
    from vglann_fast.runtime.distributed import joined

    device = device_and_kernels(a)
    with joined(device) as ranks, _only_writer(a.run, ranks):
        folder = fit_mapping(a.run, a.kind, options, seed=a.seed or 0, device=device, ranks=ranks)
    if ranks.rank == 0:
        print(describe_gap(read_json(folder / "mapping.json")["gap"]))
        print(f"fitted: {folder}")


def _sample(a: Namespace) -> None:
    from vglann_fast.samples.sample import sample

    print(sample(a.run, n=a.n, seed=a.seed or 0, kind=a.kind, device=device_and_kernels(a)))


def _reconstruct(a: Namespace) -> None:
    from vglann_fast.metrics.reconstruction import describe, reconstruct

    folder, record = reconstruct(a.run, device=device_and_kernels(a))
    print(f"{folder}: {describe(record)}")


def _evaluate(a: Namespace) -> None:
    from vglann_fast.metrics.evaluate import evaluate
    from vglann_fast.metrics.record import doubts, tables
    from vglann_fast.run.folder import RunDir

    device = device_and_kernels(a)
    with RunDir.open(a.run).locked():
        result = evaluate(
            a.run,
            kinds=a.kind.split(",") if a.kind else (),
            features=() if a.features == "none" else a.features.split(","),
            n=a.n,
            held_out=a.held_out,
            seed=a.seed or 0,
            device=device,
        )
    for line in (*result.warnings, *doubts(result.records)):
        print(f"vglann: warning: {line}", file=sys.stderr)
    print(tables(result.records), f"{result.folder}", sep="\n\n")


def _table(a: Namespace) -> None:
    from vglann_fast.experiments.table import Grid, make_table, plan_table

    name = a.preset or "modern"
    grid = Grid(
        Path(a.clips),
        Path(a.out),
        preset=name,
        seed=a.seed or 0,
        train=replace(preset(name).train, **_given(a, TrainOptions)),
        losses=a.losses.split(","),
        kinds=a.mappings.split(","),
        features=() if a.features == "none" else a.features.split(","),
        n=a.n,
    )
    device = device_and_kernels(a)
    if a.dry_run:
        plan = plan_table(grid, device=device)
        print(json.dumps({loss: part.summary for loss, part in plan.items()}, indent=1))
        return
    results = make_table(grid, device=device)
    print(results.read_text(encoding="utf-8"), results, sep="\n")


def _interpolate(a: Namespace) -> None:
    from vglann_fast.samples.sample import interpolate

    print(interpolate(a.run, steps=a.steps, seed=a.seed or 0, device=device_and_kernels(a)))


def _import_seed(a: Namespace) -> None:
    from vglann_fast.interop.import_glann import import_seed

    print(f"imported: {import_seed(a.generator, a.latents, a.out, a.variant).path}")


def _weights_import(a: Namespace) -> None:
    from vglann_fast.interop.weights import describe, import_weights

    print(describe(import_weights(a.name, a.file)))


def _invert(a: Namespace) -> None:
    from vglann_fast.samples.invert import invert_videos

    folder, record = invert_videos(
        a.run, a.videos, starts=a.starts, steps=a.steps, device=device_and_kernels(a)
    )
    nearest = record.get("nearest", {}).get("psnr", [None] * len(record["id"]))
    for clip, psnr, other in zip(record["id"], record["psnr"], nearest, strict=True):
        beside = "" if other is None else f" (nearest training clip {other:.2f} dB)"
        print(f"{clip}: PSNR {psnr:.2f} dB{beside}")
    print(folder)


def _replay(a: Namespace) -> int:
    from vglann_fast.experiments.replay import replay

    def again(verb: str, options: Mapping[str, Any], run: Path) -> None:
        parser = new_parser()
        known = parser.parse_args([verb, str(run)])[verb]  # options of later versions have their defaults
        given = {name: options[name] for name in known.as_dict() if options.get(name) is not None}
        given |= {"run": str(run), "device": a.device}
        try:
            values = parser.parse_object({"verb": verb, verb: given})[verb]
        except ArgumentError as error:
            raise VglannError(f"{a.run}/history.jsonl: the options of {verb} are damaged: {error}") from error
        with redirect_stdout(sys.stderr):
            perform(verb, values)

    verdicts = replay(a.run, again, out=a.out, clips=a.clips, device=device_of(a))
    print("\n".join(map(str, verdicts)))
    return 1 if any(verdict.same is False for verdict in verdicts) else 0


def _report(a: Namespace) -> None:
    from vglann_fast.report.artifacts import number, read_artifacts
    from vglann_fast.report.page import write_report
    from vglann_fast.run.folder import RunDir

    page = write_report(RunDir.open(a.run).path)
    psnr = number(read_artifacts(Path(a.run)).reconstruction.record.get("psnr"))
    print(page if psnr is None else f"{page}: reconstruction PSNR {psnr:.2f} dB")


def _study_make(a: Namespace) -> None:
    from vglann_fast.study.make import make_study

    print(make_study(a.runs, a.real, a.out, pairs=a.pairs, seed=a.seed))


def _study_serve(a: Namespace) -> None:
    from vglann_fast.study.server import serve

    serve(a.study, a.port)


def _study_report(a: Namespace) -> None:
    from vglann_fast.study.results import as_text, report_study

    print(as_text(report_study(a.study, a.answers)))
    print(Path(a.study) / "results.html")


def _doctor(a: Namespace) -> int:
    from vglann_fast.diagnostics.doctor import doctor

    return doctor(as_json=a.json)


def _verify(a: Namespace) -> int:
    from vglann_fast.diagnostics.verify import verify_run

    return verify_run(a.run, device_of(a), a.seed)


def _only_writer(path: str, ranks: Any) -> AbstractContextManager[None]:
    """Process 0 keeps other commands from writing to the run."""
    from vglann_fast.run.folder import RunDir

    return RunDir.open(path).locked() if ranks.rank == 0 else nullcontext()


def _given(a: Namespace, *classes: type) -> dict[str, Any]:
    return {f.name: a[f.name] for cls in classes for f in fields(cls) if a.get(f.name) is not None}


def _dry_run(a: Namespace, options: dict[str, Any]) -> bool:
    if a.dry_run:
        print(json.dumps(options, indent=1))
    return bool(a.dry_run)


# Recorded in the run, so that `replay` can repeat them.
REPLAYED = ("map", "sample", "reconstruct", "interpolate")

VERBS: dict[str, Callable[[Namespace], int | None]] = {
    "clips fetch": _clips_fetch,
    "clips pack": _clips_pack,
    "clips show": _clips_show,
    "train": _train,
    "profile": _profile,
    "map": _map,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "evaluate": _evaluate,
    "table": _table,
    "interpolate": _interpolate,
    "invert": _invert,
    "import-seed": _import_seed,
    "weights import": _weights_import,
    "replay": _replay,
    "report": _report,
    "study make": _study_make,
    "study serve": _study_serve,
    "study report": _study_report,
    "doctor": _doctor,
    "verify": _verify,
}


def perform(verb: str, a: Namespace) -> int:
    """Do what `verb` says; returns the exit status. What has no deterministic version is a `VglannError`."""
    if "device" not in a:
        return VERBS[verb](a) or 0
    from vglann_fast.runtime.numerics import numerics

    # A training has its --precision; everywhere else PyTorch would allow TensorFloat-32 to convolutions.
    with numerics(deterministic=bool(a.get("deterministic")), tf32=False):
        return VERBS[verb](a) or 0
