"""The switch: which implementation runs, who decides, and what is refused."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import vglann_kernels
from vglann_kernels import (
    ImplUnavailable,
    choices,
    mask_composite,
    nearest_rows,
    resolve,
    use_impl,
    using_impl,
)
from vglann_kernels import impl as switch


@pytest.fixture(autouse=True)
def no_default(monkeypatch):
    monkeypatch.delenv("VGLANN_KERNELS", raising=False)
    monkeypatch.setattr(switch, "_process_default", None)
    monkeypatch.setattr(switch, "_reported", set())


def test_importing_the_package_loads_no_torch():
    code = "import sys, vglann_kernels; assert not {'torch', 'triton', 'faiss'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_op_with_a_kernel_is_interpreted():
    files = (Path(__file__).parent / "interpreted").glob("*.py")
    assert {path.stem for path in files} >= set(switch.OPS)


def test_every_public_name_can_be_imported():
    for name in vglann_kernels.__all__:
        assert getattr(vglann_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vglann_kernels.nothing


def test_cpu_tensors_take_the_reference():
    for choice in choices("cpu"):
        assert (choice.impl, choice.reason) == ("reference", "CPU tensors")


def test_the_keyword_beats_the_process_default_beats_the_environment(monkeypatch):
    monkeypatch.setenv("VGLANN_KERNELS", "nearest=faiss")
    assert resolve("nearest", device="cpu").impl == "faiss"
    assert resolve("composite", device="cpu").impl == "reference"
    use_impl("reference")
    assert resolve("nearest", device="cpu").impl == "reference"
    assert resolve("nearest", "faiss", "cpu").impl == "faiss"
    use_impl(None)
    assert resolve("nearest", device="cpu").impl == "faiss"


def test_one_op_can_differ_from_the_default():
    chosen = {choice.op: choice.impl for choice in use_impl("reference,nearest=faiss")}
    assert chosen.pop("nearest") == "faiss"
    assert set(chosen.values()) == {"reference"}


def test_the_chosen_path_is_the_one_that_runs(monkeypatch):
    ran = []
    module = sys.modules["vglann_kernels.composite.reference"]
    monkeypatch.setattr(module, "mask_composite", lambda *inputs: ran.append("reference"))
    mask_composite(torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 3, 2, 2))
    assert ran == ["reference"]
    x = torch.zeros(3, 2)
    assert nearest_rows(x, x, impl="faiss", return_stats=True)[2]["impl"] == "faiss"


def test_an_explicit_name_that_cannot_run_raises_and_says_what_would(monkeypatch):
    head, background = torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 3, 2, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplUnavailable, match=r"TRITON_INTERPRET=1.*'reference' runs everywhere"):
        mask_composite(head, background, impl="triton")
    monkeypatch.setenv("VGLANN_KERNELS", "triton")
    with pytest.raises(ImplUnavailable, match="VGLANN_KERNELS"):
        mask_composite(head, background)


def test_a_default_that_cannot_run_leaves_the_former_one(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    use_impl("reference")
    with pytest.raises(ImplUnavailable):
        use_impl("triton")
    assert resolve("composite", device="cpu").reason == "asked for by use_impl"


def test_using_impl_restores_the_default_after_an_error():
    use_impl("auto")
    with pytest.raises(KeyError), using_impl("reference"):
        assert resolve("composite", device="cpu").reason == "asked for by use_impl"
        raise KeyError
    assert resolve("composite", device="cpu").reason == "CPU tensors"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fast", "kernels 'fast': expected auto, triton or reference, then OP=NAME"),
        ("faiss", "kernels 'faiss': expected auto, triton or reference, then OP=NAME"),
        ("composite=faiss", "composite has no implementation 'faiss'; it has auto, reference, triton"),
        ("fusion=triton", "expected one of composite, .* got 'fusion'"),
        ("auto,reference", "the default is given twice"),
        ("nearest=faiss,nearest=reference", "nearest is given twice"),
        ("", "kernels '': expected auto"),
    ],
)
def test_a_bad_choice_is_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        use_impl(spec)


def test_auto_falls_back_with_a_reason_and_triton_does_not(monkeypatch):
    monkeypatch.setitem(switch._registered["composite"], "triton", lambda device: "the card is too old")
    assert str(resolve("composite", device="cuda")) == "composite: reference (the card is too old)"
    with pytest.raises(ImplUnavailable, match="the card is too old"):
        resolve("composite", "triton", "cuda")
    monkeypatch.setitem(switch._registered["composite"], "triton", lambda device: None)
    assert resolve("composite", device="cuda").impl == "triton"
    assert resolve("composite", device="cuda", unsupported="planes of 3").reason == "planes of 3"
    with pytest.raises(ValueError, match="planes of 3"):
        resolve("composite", "triton", "cuda", unsupported="planes of 3")


def test_each_choice_is_reported_once(caplog):
    x = torch.zeros(3, 2)
    with caplog.at_level(logging.INFO, logger="vglann_kernels"):
        nearest_rows(x, x)
        nearest_rows(x, x)
    assert [record.message for record in caplog.records] == ["nearest: reference (CPU tensors)"]


def test_a_missing_triton_is_a_reason(monkeypatch):
    from vglann_kernels import launch

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    launch._import_error.cache_clear()
    try:
        assert "triton does not import" in launch.why_no_triton(torch.device("cpu"))
    finally:
        launch._import_error.cache_clear()


def test_old_cards_are_a_reason(monkeypatch):
    from vglann_kernels import launch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5, under 8.0" in launch.why_no_triton(torch.device("cuda"))


def test_blocks_of_two_threads_that_overlap_leave_the_default_as_it_was():
    opened, first_ended = threading.Event(), threading.Event()

    def second():
        with using_impl("reference"):
            opened.set()
            assert first_ended.wait(60)
            assert resolve("nearest", device="cpu").impl == "reference"

    thread = threading.Thread(target=second)
    use_impl("auto,nearest=faiss")
    with using_impl("reference"):
        thread.start()
        assert opened.wait(60)
    first_ended.set()
    thread.join()
    assert resolve("nearest", device="cpu").impl == "faiss"


def test_a_block_that_was_refused_leaves_no_trace():
    with pytest.raises(ValueError, match="expected auto"), using_impl("none"):
        pass
    with using_impl("auto,nearest=faiss"):
        with using_impl("reference"):
            pass
        assert resolve("nearest", device="cpu").impl == "faiss"
    assert resolve("nearest", device="cpu").impl == "reference"


def test_auto_takes_what_is_preferred_where_it_can_run_and_a_name_asked_for_wins(monkeypatch):
    monkeypatch.setitem(switch.implementations("nearest"), "other", lambda device: None)
    monkeypatch.setitem(switch.implementations("nearest"), "broken", lambda device: "no such library")
    with switch.preferring({"nearest": "other", "laplacian": "triton"}):
        assert resolve("nearest").impl == "other"
        assert resolve("nearest", impl="reference").impl == "reference"
        with using_impl("auto,nearest=reference"):
            assert resolve("nearest").impl == "reference"
        # The kernel takes no CPU tensors.
        assert resolve("laplacian", device="cpu").impl == "reference"
        with switch.preferring({"nearest": "broken"}):
            assert resolve("nearest").impl == "reference"
        with switch.preferring({"nearest": "from another version"}):
            assert resolve("nearest").impl == "reference"
    assert resolve("nearest").impl == "reference"


def test_a_preferred_kernel_is_passed_over_for_arguments_that_it_does_not_take(monkeypatch):
    monkeypatch.setitem(switch.implementations("nearest"), "triton", lambda device: None)
    with switch.preferring({"nearest": "triton"}):
        assert resolve("nearest").impl == "triton"
        assert resolve("nearest", unsupported="too wide").impl == "reference"


def test_a_layer_takes_its_own_choice_where_it_can_run_and_other_layers_the_choice_of_the_op(monkeypatch):
    for name in ("one", "other"):
        monkeypatch.setitem(switch.implementations("upsample_conv"), name, lambda device: None)
    monkeypatch.setitem(switch.implementations("upsample_conv"), "broken", lambda device: "no such library")

    def taken(layer, **given):
        return resolve("upsample_conv", device="cpu", layer=layer, **given).impl

    with switch.preferring({"upsample_conv 3d 8-4": "one", "upsample_conv 2d 8-4": "broken"}):
        assert [taken(layer) for layer in ("3d 8-4", "2d 8-4", "3d 4-4")] == ["one", "reference", "reference"]
        found = resolve("upsample_conv", device="cpu", layer="3d 8-4")
        assert (found.op, found.layer) == ("upsample_conv", "3d 8-4")
        assert str(found).startswith("upsample_conv 3d 8-4: one (")
        assert taken("3d 8-4", impl="reference") == "reference"
        with using_impl("reference"):
            assert taken("3d 8-4") == "reference"
        with using_impl("auto,upsample_conv=reference"):
            assert taken("3d 8-4") == "reference"
    with switch.preferring(
        {"upsample_conv 3d 8-4": "one", "upsample_conv": "other", "upsample_conv 9d": "x"}
    ):
        assert [taken(layer) for layer in ("3d 8-4", "3d 4-4", "")] == ["one", "other", "other"]


def test_measured_choices_that_change_nothing_are_reported_as_the_default_once(caplog, monkeypatch):
    monkeypatch.setitem(switch.implementations("upsample_conv"), "other", lambda device: None)
    layers = ("3d 8-4", "2d 8-4")
    caplog.set_level(logging.INFO, logger="vglann_kernels")
    with switch.preferring({f"upsample_conv {layer}": "reference" for layer in layers}):
        for layer in layers:
            switch.chosen("upsample_conv", None, torch.device("cpu"), layer=layer)
    assert caplog.messages == ["upsample_conv: reference (CPU tensors)"]
    # For one layer the default may be measured, and another implementation for the rest.
    with switch.preferring({"upsample_conv": "other", "upsample_conv 3d 8-4": "reference"}):
        found = [resolve("upsample_conv", device="cpu", layer=layer).impl for layer in layers]
    assert found == ["reference", "other"]


def test_a_layer_whose_kernel_does_not_take_the_arguments_falls_back(monkeypatch):
    monkeypatch.setitem(switch.implementations("upsample_conv"), "triton", lambda device: None)
    with switch.preferring({"upsample_conv 3d 8-4": "triton"}):
        assert resolve("upsample_conv", device="cpu", layer="3d 8-4").impl == "triton"
        found = resolve("upsample_conv", device="cpu", layer="3d 8-4", unsupported="not channels-last")
        assert found.impl == "reference"
