"""Properties of the machine code that no interpreter shows, on the target that the tables measure."""

import json
import os
import subprocess
import sys

import pytest

NAMES = (
    "latent_adam step lazy",
    "composite_laplacian binomial bf16 channels-last 32x32",
    "composite forward bf16 channels-last",
    "composite backward bf16 channels-last",
    "composite forward bf16 contiguous",
    "latent_adam step dense",
)
# The last program to arrive: its own writes are done and visible, it counts itself, forgets what its cache held, and
# tells the count to all of its threads.
HANDOVER = ("BAR", "MEMBAR.ALL.GPU", "ATOMG", "CCTL.IVALL", "STS", "BAR", "LDS")


@pytest.fixture(scope="module")
def opcodes():
    """The opcodes of each configuration for sm_90, compiled in a process without the interpreter."""
    code = (
        "import json\n"
        "from vglann_kernels import resources\n"
        "from vglann_kernels.configurations import configurations\n"
        "if __name__ == '__main__':\n"
        f"    named = {{f'{{c.op}} {{c.name}}': c for c in configurations(90)}}\n"
        f"    print(json.dumps({{name: resources.disassembly(resources.compile_kernel(named[name], 90).asm['cubin'])"
        f" for name in {NAMES!r}}}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[5]])
def test_the_last_program_to_arrive_sees_what_the_others_wrote(opcodes, name):
    code = opcodes[name]
    (atomic,) = (place for place, opcode in enumerate(code) if opcode.startswith("ATOMG"))
    assert "STRONG.GPU" in code[atomic]
    kinds = [step for step in HANDOVER if step != "ATOMG"]
    before = [opcode for opcode in code[:atomic] if opcode.startswith(tuple(kinds))]
    after = [opcode for opcode in code[atomic + 1 :] if opcode.startswith(tuple(kinds))]
    for step, opcode in zip(HANDOVER, [*before[-2:], code[atomic], *after[:4]], strict=True):
        assert opcode.startswith(step), (name, before[-3:], after[:5])


def test_programs_of_the_joint_loss_do_not_wait_for_each_other(opcodes):
    code = opcodes[NAMES[1]]
    assert not [opcode for opcode in code if opcode.startswith(("ATOM", "RED", "MEMBAR"))]
    # What one thread writes, others read after a barrier.
    assert any(opcode.startswith("BAR") for opcode in code)


def test_the_joint_loss_makes_an_activation_with_two_special_functions_and_no_division(opcodes):
    """A power of 2 and a reciprocal square root for each: no reciprocal, whose special cases take 7 instructions."""
    functions = [opcode for opcode in opcodes[NAMES[1]] if opcode.startswith("MUFU")]
    assert functions.count("MUFU.EX2") == functions.count("MUFU.RSQ")
    assert functions.count("MUFU.RCP") <= 1


@pytest.mark.parametrize("name", NAMES[2:4])
def test_a_channels_last_head_is_read_16_bytes_at_a_time(opcodes, name):
    code = opcodes[name]
    assert "LDG.E.128" in code
    if "forward" in name:
        # Stores of the video take whole sectors: 2-byte stores are what this layout once cost.
        assert "STG.E.U16" not in code
    else:
        assert "STG.E.128" in code


def test_planar_frames_are_read_and_written_16_bytes_at_a_time(opcodes):
    code = opcodes[NAMES[4]]
    assert code.count("LDG.E.128") >= 4
    assert code.count("STG.E.128") == 3
