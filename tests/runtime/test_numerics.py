"""`numerics`: the global state of PyTorch inside a block, and that it comes back."""

import os
import signal
import threading

import pytest
import torch

from vglann_fast.cli.main import main
from vglann_fast.errors import VglannError
from vglann_fast.runtime.numerics import numerics, seeded

PRODUCTS = [
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
]


def modes():
    return {
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "products": [module.fp32_precision for module in PRODUCTS],
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def foreign_modes():
    """A host program that computes in its own way."""
    before = modes()
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("medium")
    yield modes()
    torch.set_default_dtype(before["dtype"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before["cudnn"]
    torch.set_float32_matmul_precision("highest")
    for module, precision in zip(PRODUCTS, before["products"], strict=True):
        module.fp32_precision = precision
    torch.use_deterministic_algorithms(False)


def test_a_block_decides_and_the_state_of_the_host_comes_back(foreign_modes):
    with numerics(deterministic=True, tf32=False, threads=1):
        inside = modes()
        torch.manual_seed(3)
    assert inside["dtype"] == torch.float32
    assert inside["deterministic"]
    assert inside["cudnn"] == (True, False)
    assert inside["products"] == ["ieee"] * 4
    assert inside["threads"] == 1
    assert modes() == foreign_modes
    assert torch.get_float32_matmul_precision() == "medium"


def test_the_state_comes_back_after_an_error(foreign_modes):
    with pytest.raises(KeyError), numerics(deterministic=True, tf32=False):
        raise KeyError
    assert modes() == foreign_modes


def test_an_inner_block_ends_and_the_outer_one_holds_again():
    with numerics(deterministic=True, tf32=False):
        with numerics(deterministic=False):
            assert not torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.are_deterministic_algorithms_enabled()


def test_blocks_of_two_threads_that_overlap_leave_nothing_behind(foreign_modes):
    opened, first_ended = threading.Event(), threading.Event()

    def second():
        with numerics(deterministic=False):
            opened.set()
            assert first_ended.wait(60)

    thread = threading.Thread(target=second)
    with numerics(deterministic=True):
        thread.start()
        assert opened.wait(60)
    first_ended.set()
    thread.join()
    assert modes() == foreign_modes


def test_a_refused_operation_is_named_only_where_determinism_was_asked_for():
    message = "cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."
    with pytest.raises(VglannError, match="--deterministic: cumsum"), numerics(deterministic=True):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError), numerics():
        raise RuntimeError(message)


def test_a_command_leaves_the_state_of_the_host(foreign_modes, tmp_path, capsys):
    assert main(["sample", str(tmp_path), "--deterministic", "--device", "cpu"]) == 2  # not a run
    assert modes() == foreign_modes


def test_a_block_that_is_the_first_to_use_a_gpu_leaves_there_the_seed_of_the_host(monkeypatch):
    seeds = []
    torch.manual_seed(5)
    with numerics():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
        torch.random.default_generator.manual_seed(9)
    assert seeds == [5]


@pytest.mark.parametrize("value", [None, ":16:8"])
def test_the_variable_of_cublas_comes_back(value, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if value is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    with numerics(deterministic=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (value or ":4096:8")
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == value


def test_seeded_draws_are_the_same_and_leave_the_random_state_as_it_was():
    before = modes()
    drawn = []
    for _ in range(2):
        with seeded(5) as random:
            drawn.append((torch.randn(3), torch.randn(3, generator=random)))
    assert modes() == before
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)


def test_threads_take_turns_at_seeded_draws():
    drawn, inside = [], threading.Event()

    def other():
        inside.set()
        with seeded(1):
            drawn.append(torch.randn(2))

    thread = threading.Thread(target=other)
    with seeded(0):
        thread.start()
        assert inside.wait(60)
        mine = torch.randn(1000)
        assert not drawn
    thread.join()
    with seeded(0):
        assert torch.equal(mine, torch.randn(1000))


def test_a_process_forked_from_one_that_computed_does_not_wait_for_its_threads():
    """As the workers of a web server: without care the child waits for ever, and the alarm ends it."""
    numbers = torch.zeros(4_000_000)
    with numerics(threads=2):
        numbers += 1
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with numerics():
            numbers += 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
