"""`vglann verify RUN`: the kernels against float64 at the shapes of a run."""

from pathlib import Path
from typing import Any

from vglann_fast.errors import VglannError
from vglann_fast.options.fields import options_from_json
from vglann_fast.options.training import TrainOptions
from vglann_fast.run.folder import RunDir


def verify_run(path: str | Path, device: Any, seed: int = 0) -> int:
    """Compare the kernels with float64 at the shapes of the run at `path`, on random inputs drawn from `seed`; prints
    one line a quantity.

    Where no Triton kernel can run it says so and compares the references alone. Returns 1 when a line is over its
    limit, else 0. Raises `VglannError` when `path` is not a run or the kernels do not take its shapes.
    """
    from vglann_kernels.launch import why_no_triton
    from vglann_kernels.verify import Shapes, report

    run = RunDir.open(path)
    train: TrainOptions = options_from_json(TrainOptions, run.options["train"])
    why = why_no_triton(device)
    if why:
        print(f"no Triton kernel runs here: {why}; comparing the references alone")
    shapes = Shapes(
        batch=train.batch_size,
        frames=run.options["frames"],
        size=run.options["size"],
        levels=train.levels,
        blur=train.blur,
        latent_dim=train.latent_dim,
        device=str(device),
        impl="reference" if why else "triton",
        seed=seed,
    )
    try:
        return 1 if report(shapes) else 0
    except ValueError as error:
        raise VglannError(f"{path}: {error}") from error
