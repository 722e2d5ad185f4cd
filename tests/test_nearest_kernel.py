"""What the kernels of the Triton search compile to, on a machine without a GPU."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

TARGETS = (80, 86, 89, 90, 100, 120)
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a program may have
MATRIX_UNIT = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_and_the_scan_uses_the_matrix_units(target):
    pytest.importorskip("triton")
    from vglann_kernels.nearest import kernel

    for configuration in kernel.configurations((target // 10, target % 10)):
        name = configuration[0]
        if target not in (80, 90, 120) and "scan" not in name:
            continue
        registers, stack, shared, opcodes = compiled(configuration, target)
        assert stack == 0, (name, registers)
        assert shared <= SHARED_MEMORY[target] * 1024, name
        if "scan" in name:
            assert opcodes.count(MATRIX_UNIT[target]) >= 4, name
            if name == "scan d=100":
                expected = {"HMMA": 112, "HGMMA": 14, "UTCHMMA": 28}[MATRIX_UNIT[target]]
                assert opcodes.count(MATRIX_UNIT[target]) == expected


def compiled(configuration, target):
    """(registers, stack bytes, shared bytes, opcodes) of a configuration for a compute capability."""
    import triton
    import triton.backends.nvidia as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, arguments, constants, warps, stages = configuration
    arguments = iter(arguments)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = "constexpr" if name in constants else next(arguments)
        signature[name] = value if isinstance(value, str) else "i32"
        if signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run(
                [str(tools / "cuobjdump"), what, file.name], capture_output=True, text=True, check=True
            )
            for what in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)", listing.stdout, re.MULTILINE)
    return registers, stack, made.metadata.shared, opcodes
