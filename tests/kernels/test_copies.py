"""The kernels taken away: a copy of the package at another path, under another name, beside the installed one."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "vglann_kernels"

# Loads the copy as `kernels` of Hugging Face loads one, and calls every op of both.
BOTH = """
import importlib.util
import sys

import torch
import vglann_kernels as installed

spec = importlib.util.spec_from_file_location("_vglann_kernels_cpu_1a2b3c", sys.argv[1] + "/__init__.py")
copy = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copy)


def results(kernels, impl):
    torch.manual_seed(0)
    head, background = torch.randn(2, 4, 2, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    video, mask_mean = kernels.mask_composite(head, background, impl=impl)
    video.sum().backward()
    rows, index, lr = torch.randn(6, 4), torch.tensor([1, 3]), torch.tensor(0.1)
    kernels.latent_adam_step(rows, kernels.latent_adam_state(rows), index, torch.randn(2, 4), lr=lr, impl=impl)
    return [video.detach(), mask_mean.detach(), head.grad, rows]


def references(kernels):
    torch.manual_seed(0)
    head, background, index = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([2, 0])
    clips = torch.randint(0, 256, (3, 3, 2, 8, 8), dtype=torch.uint8)
    return [
        kernels.laplacian_pyramid_loss(torch.rand(3, 3, 2, 8, 8), clips, levels=2),
        kernels.composite_laplacian_loss(head, background, clips, index, levels=2),
        kernels.batch_norm_relu(head, torch.ones(4), torch.zeros(4)),
        *kernels.nearest_rows(torch.randn(5, 4), torch.randn(9, 4)),
    ]


for impl in ("reference", "triton"):
    for one, other in zip(results(installed, impl), results(copy, impl), strict=True):
        assert torch.equal(one, other)
for kernels in (installed, copy):
    kernels.use_impl("reference")
for one, other in zip(references(installed), references(copy), strict=True):
    assert torch.equal(one, other)
for kernels in (installed, copy):
    operators = getattr(torch.ops, kernels.__name__)
    assert operators.mask_composite.default.namespace == kernels.__name__
    assert sys.modules[kernels.__name__ + ".composite.op"].__file__.startswith(kernels.__path__[0])
installed.use_impl("triton")
assert installed.resolve("composite").impl == "triton" and copy.resolve("composite").impl == "reference"
"""


def test_a_copy_under_another_name_gives_the_same_numbers(tmp_path):
    """In the interpreter of Triton, so that operators of both are called."""
    copy = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VGLANN_KERNELS", None)
    command = [sys.executable, "-c", BOTH, str(copy)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_files_for_the_hub_lie_as_its_builder_wants_them(tmp_path):
    """The builder writes _ops.py itself, and takes the package from torch-ext/<name with underscores>."""
    command = ["make", "-s", "-C", str(ROOT), "hub", f"HUB={tmp_path / 'hub'}"]
    subprocess.run(command, check=True, capture_output=True)
    files = {path.relative_to(tmp_path / "hub").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    general = tomllib.loads((tmp_path / "hub" / "build.toml").read_text())["general"]
    package = "torch-ext/" + general["name"].replace("-", "_")
    assert {f"{package}/__init__.py", f"{package}/nearest/kernel.py", "flake.nix", "LICENSE"} <= files
    assert f"{package}/_ops.py" not in files
    assert all(name.endswith(".py") for name in files if name.startswith("torch-ext/"))


def test_the_kernels_name_no_package_of_their_own():
    """A copy has another name, so imports and operators are relative to it."""
    for path in PACKAGE.rglob("*.py"):
        code = path.read_text()
        assert not re.search(r"^\s*(?:import|from) vglann_kernels", code, flags=re.MULTILINE), path
        assert not re.search(r"torch\.ops\.|[\"']vglann_kernels::", code) or path.name == "_ops.py", path
