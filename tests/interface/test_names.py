"""`import vglann_fast as vf`: the names it has, and what importing it costs."""

import subprocess
import sys

import pytest

import vglann_fast as vf
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.glo.generator import TwoStreamGenerator


def test_every_public_name_is_listed_and_can_be_used():
    assert set(vf.__all__) == set(dir(vf))
    assert all(getattr(vf, name) is not None for name in vf.__all__)
    assert vf.ClipSet is ClipSet
    assert vf.TwoStreamGenerator is TwoStreamGenerator
    assert vf.VglannError is VglannError


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = vf.nothing


def test_importing_and_listing_loads_neither_torch_nor_numpy():
    code = "import sys, vglann_fast as vf; dir(vf), vf.__version__, vf.VglannError\n"
    code += "print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_function_and_method_says_what_it_takes():
    methods = [getattr(vf.Run, name) for name in dir(vf.Run) if not name.startswith("_")]
    for documented in [*(getattr(vf, name) for name in vf.__all__ if name != "__version__"), *methods]:
        assert documented.__doc__, documented
