"""vglann-fast: train generators of short videos without a discriminator.

    import vglann_fast as vf

    clips = vf.pack("videos", "clips")
    run = vf.train(clips, "run")
    run.fit_mapping("imle")
    videos = run.sample(16, seed=0)

Names are imported when they are first used: `import vglann_fast` alone loads neither PyTorch nor NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vglann_fast.clips.dataset import ClipSet as ClipSet
    from vglann_fast.errors import VglannError as VglannError
    from vglann_fast.glo.generator import TwoStreamGenerator as TwoStreamGenerator
    from vglann_fast.interface.packing import merge as merge
    from vglann_fast.interface.packing import pack as pack
    from vglann_fast.interface.run import Run as Run
    from vglann_fast.interface.run import evaluate as evaluate
    from vglann_fast.interface.run import load as load
    from vglann_fast.interface.training import resume as resume
    from vglann_fast.interface.training import train as train
    from vglann_fast.interface.videos import Videos as Videos

__version__ = "0.2.0"

_MODULES = {
    "ClipSet": "clips.dataset",
    "Run": "interface.run",
    "TwoStreamGenerator": "glo.generator",
    "VglannError": "errors",
    "Videos": "interface.videos",
    "evaluate": "interface.run",
    "load": "interface.run",
    "merge": "interface.packing",
    "pack": "interface.packing",
    "resume": "interface.training",
    "train": "interface.training",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
