"""The command line: verbs only. Each verb checks its arguments, then calls one function of a stage.

Nothing heavy is imported before a verb runs, so `vglann --help` is quick.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace

from vglann_fast.arguments import new_parser
from vglann_fast.config import MapOptions, TrainOptions, options_to_json, preset
from vglann_fast.errors import VglannError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vglann`; returns the exit status.

    0; 1 when `doctor` or `verify` found something; 2 for a mistake of the user's; 128 + n after signal n.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = new_parser()
    try:
        _check_processes(sys.argv[1:] if arguments is None else arguments)
        chosen = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        name, values = chosen.verb, chosen[chosen.verb]
        if name == "clips":
            name, values = f"clips {values.verb}", values[values.verb]
        return VERBS[name](values) or 0
    except ArgumentError as error:
        return _fail(str(error))
    except VglannError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Raised by code that was loaded only now, so looked up by name.
        if type(error).__name__ == "Interrupted":
            print(f"vglann: {error}", file=sys.stderr)
            return error.exit_code  # type: ignore[attr-defined]
        raise


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")  # torchrun's number of this process, if there are several
    name = "vglann" if rank == "0" else f"vglann (process {rank})"
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def _check_processes(arguments: Sequence[str]) -> None:
    """Under torchrun only the verbs that share their work; the others would do it all in every process."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if not processes.isdigit():
        raise VglannError(f"WORLD_SIZE: expected a number of processes, got {processes!r}")
    if int(processes) > 1 and not {"train", "map"} & set(arguments[:1]):
        raise VglannError("under torchrun only train and map run in several processes; start this one alone")


# ---- verbs


def _clips_fetch(a: Namespace) -> None:
    from vglann_fast.clips.fetch import fetch

    paths = fetch(a.set, a.cache)
    print(f"{paths[0].parent}: {len(paths)} videos")


def _clips_pack(a: Namespace) -> None:
    from vglann_fast.clips.pack import pack

    options = {name: value for name, value in a.as_dict().items() if name not in ("sources", "out")}
    print(pack(a.sources, a.out, **options))


def _clips_show(a: Namespace) -> None:
    from vglann_fast.clips.sheet import show

    out = a.out or Path(a.clips) / "sheet.png"
    show(a.clips, out)
    print(out)


def _train(a: Namespace) -> None:
    given = _given(a, TrainOptions)
    if a.resume is not None:
        fixed = given.keys() - {f.name for f in fields(TrainOptions) if f.metadata["machine"]}
        if fixed or a.clips or a.out or a.preset or a.seed is not None:
            raise VglannError("--resume: takes its clips and options from the run; give it alone")
        _resume(a, given)
        return
    if a.clips is None or a.out is None:
        raise VglannError("train: needs CLIPS and --out RUN, or --resume RUN")
    if a.latents_on_mismatch != "error":
        raise VglannError("--latents-on-mismatch: a new run has no latents yet; give it with --resume")
    options = replace(preset(a.preset or "modern").train, **given)
    record = {
        "preset": a.preset or "modern",
        "seed": a.seed or 0,
        "clips": str(Path(a.clips).absolute()),
        "train": options_to_json(options),
    }
    if _dry_run(a, record):
        return
    from vglann_fast.clips.dataset import ClipSet
    from vglann_fast.run_dir import RunDir

    device = _device_and_kernels(a)
    clips = ClipSet.open(a.clips, "train")
    run = RunDir.new(a.out, {**record, "frames": clips.frames, "size": clips.size})
    _train_run(a, clips, run, device, resume=False)


def _resume(a: Namespace, given: dict[str, Any]) -> None:
    """`given`: options of the machine's, which may differ from those the run began with."""
    from vglann_fast.clips.dataset import ClipSet
    from vglann_fast.run_dir import RunDir

    run = RunDir.open(a.resume)
    if run.options["clips"] is None:
        raise VglannError(f"{a.resume} was imported: there is no training of it to continue")
    run.options["train"].update(given)
    if _dry_run(a, run.options):
        return
    device = _device_and_kernels(a)
    _train_run(a, ClipSet.open(run.options["clips"], "train"), run, device, resume=True)


def _train_run(a: Namespace, clips: Any, run: Any, device: Any, *, resume: bool) -> None:
    from vglann_fast.glo.distributed import joined
    from vglann_fast.glo.train import train

    with joined(device) as ranks:
        train(
            clips,
            run,
            seed=run.options["seed"],
            device=device,
            log_every=a.log_every,
            checkpoint_every=a.checkpoint_every,
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
    from vglann_fast.glo.profile import profile

    print(profile(a.run, steps=a.steps, device=_device_and_kernels(a)))


def _map(a: Namespace) -> None:
    from vglann_fast.run_dir import RunDir

    name = a.preset or RunDir.open(a.run).options.get("preset", "modern")
    options = replace(preset(name).map, **_given(a, MapOptions))
    if _dry_run(a, {"preset": name, "kind": a.kind, "map": options_to_json(options)}):
        return
    from vglann_fast.glo.distributed import joined
    from vglann_fast.mapping.fit import fit_mapping

    device = _device_and_kernels(a)
    with joined(device) as ranks:
        folder = fit_mapping(a.run, a.kind, options, seed=a.seed or 0, device=device, ranks=ranks)
    if ranks.rank == 0:
        print(f"fitted: {folder}")


def _sample(a: Namespace) -> None:
    from vglann_fast.samples.sample import sample

    print(sample(a.run, n=a.n, seed=a.seed or 0, kind=a.kind, device=_device_and_kernels(a)))


def _reconstruct(a: Namespace) -> None:
    from vglann_fast.metrics.reconstruction import reconstruct

    folder, record = reconstruct(a.run, device=_device_and_kernels(a))
    print(
        f"{folder}: reconstruction PSNR {record['psnr']:.2f} dB over {record['clips']} clips "
        f"(mean colour {record['psnr_mean_colour']:.2f} dB)"
    )


def _interpolate(a: Namespace) -> None:
    from vglann_fast.samples.sample import interpolate

    print(interpolate(a.run, steps=a.steps, seed=a.seed or 0, device=_device_and_kernels(a)))


def _import_seed(a: Namespace) -> None:
    from vglann_fast.interop.import_seed import import_seed

    print(f"imported: {import_seed(a.generator, a.latents, a.out, a.variant).path}")


def _invert(a: Namespace) -> None:
    from vglann_fast.samples.invert import invert_videos

    folder, record = invert_videos(
        a.run, a.videos, starts=a.starts, steps=a.steps, device=_device_and_kernels(a)
    )
    nearest = record.get("nearest", {}).get("psnr", [None] * len(record["id"]))
    for clip, psnr, other in zip(record["id"], record["psnr"], nearest, strict=True):
        beside = "" if other is None else f" (nearest training clip {other:.2f} dB)"
        print(f"{clip}: PSNR {psnr:.2f} dB{beside}")
    print(folder)


def _report(a: Namespace) -> None:
    from vglann_fast.report.artefacts import number, read_artefacts
    from vglann_fast.report.page import write_report
    from vglann_fast.run_dir import RunDir

    page = write_report(RunDir.open(a.run).path)
    psnr = number(read_artefacts(Path(a.run)).reconstruction.record.get("psnr"))
    print(page if psnr is None else f"{page}: reconstruction PSNR {psnr:.2f} dB")


def _doctor(a: Namespace) -> int:
    from vglann_fast.doctor import doctor

    return doctor()


def _verify(a: Namespace) -> int:
    from vglann_fast.doctor import verify_run

    return verify_run(a.run, _device(a))


def _given(a: Namespace, cls: type) -> dict[str, Any]:
    return {f.name: a[f.name] for f in fields(cls) if a[f.name] is not None}


def _dry_run(a: Namespace, options: dict[str, Any]) -> bool:
    if a.dry_run:
        print(json.dumps(options, indent=1))
    return bool(a.dry_run)


def _device_and_kernels(a: Namespace) -> Any:
    """The torch device of --device; sets the process default of the kernels from --kernels."""
    from vglann_kernels import ImplUnavailable, choices, use_impl

    device = _device(a)
    try:
        if a.kernels is not None:
            use_impl(a.kernels)
        choices(device)  # also what VGLANN_KERNELS says, before anything is written
    except (ValueError, ImplUnavailable) as error:
        raise VglannError(f"--kernels {a.kernels}: {error}" if a.kernels else str(error)) from error
    return device


def _device(a: Namespace) -> Any:
    """The torch device of --device, tried."""
    import torch

    name = a.device if a.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one GPU for each process that torchrun starts here
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("expected cpu, cuda or cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VglannError(f"--device {name}: cannot be used here: {str(error).splitlines()[0]}") from error
    return device


VERBS: dict[str, Callable[[Namespace], int | None]] = {
    "clips fetch": _clips_fetch,
    "clips pack": _clips_pack,
    "clips show": _clips_show,
    "train": _train,
    "profile": _profile,
    "map": _map,
    "sample": _sample,
    "reconstruct": _reconstruct,
    "interpolate": _interpolate,
    "invert": _invert,
    "import-seed": _import_seed,
    "report": _report,
    "doctor": _doctor,
    "verify": _verify,
}
