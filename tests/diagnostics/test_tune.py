"""`vglann tune` from end to end on a tiny training, by a clock that the steps themselves move."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import new_run, tiny_options
from tuned import AN_ENTRY, CPU
from vglann_kernels.impl import implementations
from vglann_kernels.nearest.op import IMPLEMENTATIONS
from vglann_kernels.nearest.reference import nearest_rows as reference_rows

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.diagnostics import contenders, doctor
from vglann_fast.diagnostics import tune as module
from vglann_fast.diagnostics.contest import contest
from vglann_fast.diagnostics.tune import rows_near, tune
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo import assemble
from vglann_fast.glo.assemble import new_training
from vglann_fast.glo.training import Training
from vglann_fast.runtime.measurements import place, read, write

# A step of these is a matter of milliseconds.
PRESET = "modern-2026a"
TINY = {"width": 2, "latent_dim": 8, "batch_size": 3, "levels": 2}


@pytest.fixture(autouse=True)
def alone(own_cache, monkeypatch):
    """A cache of its own, threads that the user has set, and few rounds: the clock is exact."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(module, "contest", partial(contest, rounds=3))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clip_folder(tmp_path_factory.mktemp("tune") / "clips", moving_squares(6, 16, 16))


class Clock:
    """Moved by each step of a training by `cost(training)` seconds, and by searches."""

    def __init__(self, cost: Callable[[Training], float]) -> None:
        self.now, self._cost, self.dies_at = 0.0, cost, float("inf")

    def __call__(self) -> float:
        if self.now > self.dies_at:
            raise KeyboardInterrupt
        return self.now

    def step(self, training: Training) -> None:
        self.now += self._cost(training)


@pytest.fixture
def clock(monkeypatch):
    """A clock by which resident clips are twice as fast, and bfloat16 as float32."""
    found = Clock(lambda training: 0.5 if training.source.name == "resident" else 1.0)
    step = Training.train_step

    def counted(training, **options):
        found.step(training)
        return step(training, **options)

    monkeypatch.setattr(Training, "train_step", counted)
    return found


def tuned(target, clock, **given):
    of_clips = target is None or (target / "index.json").is_file()
    name, options = (PRESET, TINY) if of_clips else (None, {})
    return tune(target, name=name, given={**options, **given}, device=CPU, minutes=10, clock=clock)


def contests(number=-1):
    return read(place())[number].contests


def test_the_faster_way_is_chosen_kept_and_shown(clips, clock, capsys):
    table = tuned(clips, clock)
    found = contests()
    assert list(found) == ["precision", "memory_format", "data", "together"]
    assert found["together"].factors["choices"] == pytest.approx(2.0)
    assert (found["data"].default, found["data"].choice) == ("mmap", "resident")
    assert found["data"].factors["resident"] == pytest.approx(2.0)
    assert found["precision"].choice == "fp32"
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out.strip() in table
    assert "resident" in table


def test_what_the_user_has_decided_is_not_measured(clips, clock):
    tuned(clips, clock, precision="fp32", data="mmap")
    assert list(contests()) == ["memory_format"]


def test_threads_are_contested_unless_the_user_has_said_how_many(clips, clock, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(contenders, "available", lambda: 2)
    clock.__init__(lambda training: {1: 1.0, 2: 0.6}[torch.get_num_threads()])
    before = torch.get_num_threads()
    tuned(clips, clock, precision="fp32", data="mmap")
    assert contests()["threads"].choice == "2"
    assert contests()["threads"].seconds == pytest.approx({"1": 1.0, "2": 0.6})
    assert torch.get_num_threads() == before


def test_a_contender_made_wrong_is_refused_by_name_however_fast(clips, clock, monkeypatch, caplog):
    clock_of = {"bf16": 0.01}
    clock.__init__(lambda training: clock_of.get(training.precision, 1.0))

    def wrong(logits, precision, device):
        return logits if precision == "fp32" else lambda z: tuple(-x for x in logits(z))

    monkeypatch.setattr(assemble, "in_precision", wrong)
    tuned(clips, clock, data="mmap")
    found = contests()["precision"]
    assert found.choice == "fp32"
    assert "differs from float32" in found.left_out["bf16"]
    assert "precision bf16 is left out" in caplog.text


@pytest.fixture
def wrong_by_default(monkeypatch):
    """Trainings that are wrong in all precisions except those added to the set, and except the first training."""
    made, right = [], set()

    def in_precision(logits, precision, device):
        made.append(precision)
        # The first one is the training that the others are compared with.
        return logits if len(made) == 1 or precision in right else lambda z: tuple(-x for x in logits(z))

    monkeypatch.setattr(assemble, "in_precision", in_precision)
    return right


def test_a_default_that_is_wrong_and_stays_ends_the_tune_and_the_option_that_helps_is_named(
    clips, clock, wrong_by_default, caplog
):
    wrong_by_default.add("bf16")
    tuned(clips, clock)
    assert list(contests()) == ["precision"]
    found = contests()["precision"]
    assert (found.choice, found.factors["bf16"]) == ("fp32", pytest.approx(1.0))
    (line,) = [line for line in caplog.messages if "differs from float32" in line]
    assert line.startswith("precision fp32")
    assert "--precision bf16" in line
    assert "memory_format, data" in line


def test_a_default_that_is_wrong_and_is_replaced_ends_nothing(clips, clock, wrong_by_default):
    wrong_by_default.add("bf16")
    clock.__init__(
        lambda training: (
            {"fp32": 4.0, "bf16": 2.0}[training.precision] / (1 + (training.source.name == "resident"))
        )
    )
    tuned(clips, clock)
    assert list(contests()) == ["precision", "memory_format", "data", "together"]
    assert (contests()["precision"].choice, contests()["data"].choice) == ("bf16", "resident")


@pytest.mark.usefixtures("wrong_by_default")
def test_where_nothing_is_right_no_choice_is_blamed(clips, clock, caplog):
    tuned(clips, clock)
    assert list(contests()) == ["precision"]
    assert contests()["precision"].choice == "fp32"
    (line,) = [line for line in caplog.messages if "default" in line]
    assert line.startswith("the defaults are wrong")
    assert "--kernels reference" in line


def test_a_precision_that_the_processor_emulates_is_given_up_after_a_step(clips, clock):
    clock.__init__(lambda training: 30.0 if training.precision == "bf16" else 1.0)
    tuned(clips, clock, data="mmap")
    found = contests()["precision"]
    assert found.choice == "fp32"
    assert "30 times as long" in found.left_out["bf16"]


def test_a_contender_out_of_memory_is_named_and_the_rest_is_measured(clips, clock, monkeypatch):
    def full(generator):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(assemble, "compute_contiguously", full)
    tuned(clips, clock, precision="fp32")
    found = contests()
    assert "80 GiB" in found["memory_format"].left_out["contiguous"]
    assert found["data"].choice == "resident"


def test_no_time_left_keeps_what_was_measured_and_names_the_rest(clips, clock, caplog):
    def one_contest_long(training):
        return 0.5 if training.source.name == "resident" else 1.0

    clock.__init__(one_contest_long)
    tune(clips, name=PRESET, given=TINY, device=CPU, minutes=0.33, clock=clock)
    assert list(contests()) == ["precision"]
    assert "no time left for memory_format, data" in caplog.text
    assert "--minutes" in caplog.text


def killed_after_a_contest(clips, clock):
    clock.dies_at = clock.now + 20
    with pytest.raises(KeyboardInterrupt):
        tuned(clips, clock, precision="fp32")
    clock.dies_at = float("inf")
    assert {file.name for file in place().parent.iterdir()} == {"tune.json", "tune.lock"}


def test_a_tune_killed_half_way_leaves_what_it_has_measured_beside_the_rest(clips, clock):
    write(place(), [AN_ENTRY])
    killed_after_a_contest(clips, clock)
    there, measured = read(place())
    assert there == AN_ENTRY
    assert list(measured.contests) == ["memory_format"]
    # An earlier measurement of the same training stays as it is.
    earlier = replace(measured, when="2020-01-01", contests=AN_ENTRY.contests)
    write(place(), [earlier])
    killed_after_a_contest(clips, clock)
    assert read(place()) == [earlier]


def test_a_device_that_fails_ends_in_one_line_and_keeps_what_was_measured(clips, clock, monkeypatch):
    """As after an illegal memory access: from then on every wait for the device raises."""

    def wait():
        if clock.now > 20:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return clock.now

    with pytest.raises(VglannError, match=r"illegal memory access.*tune\.json"):
        tuned(clips, wait, precision="fp32")
    assert list(contests()) == ["memory_format"]


def test_what_another_machine_has_written_meanwhile_is_kept(clips, clock):
    def write_meanwhile(training):
        if not place().exists():
            write(place(), [AN_ENTRY])
        return 1.0

    clock.__init__(write_meanwhile)
    tuned(clips, clock, precision="fp32", data="mmap")
    assert read(place())[0] == AN_ENTRY
    assert len(read(place())) == 2


def test_a_reference_that_does_not_fit_is_one_line_with_the_option_that_helps(clips, monkeypatch):
    def full(training, **options):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(Training, "train_step", full)
    with pytest.raises(VglannError, match="--batch-size"):
        tuned(clips, None)


def test_a_damaged_file_is_replaced_with_one_warning(clips, clock, caplog):
    place().parent.mkdir(parents=True)
    place().write_text("{")
    tuned(clips, clock, precision="fp32", data="mmap")
    assert caplog.text.count("is damaged") == 1
    assert len(read(place())) == 1


@pytest.fixture
def run(clips, tmp_path):
    """A run with a checkpoint."""
    options = tiny_options(PRESET, **TINY, precision="fp32", data="mmap")
    made = new_run(tmp_path / "run", clips, options)
    new_training(ClipSet.open(clips, "train"), options, made).save()
    return made.path


@pytest.mark.parametrize("words", [["--preset", "demo"], ["--width", "8"]])
def test_a_run_has_its_own_options(run, words, capsys):
    """It was measured with them, whatever preset was given."""
    assert main(["tune", str(run), *words]) == 2
    assert f"{words[0]}: {run} is a run" in capsys.readouterr().err


@pytest.fixture
def searches(clock, monkeypatch):
    """Implementations of the search for nearest rows: two that are right, one of them quicker, and a wrong one."""

    def taking(seconds, shift=0):
        def search(queries, database):
            clock.now += seconds
            index, distance, stats = reference_rows(queries, database)
            return (index + shift) % len(database), distance, stats

        return search

    registry = implementations("nearest")
    monkeypatch.delitem(registry, "faiss")
    monkeypatch.delitem(IMPLEMENTATIONS, "faiss")
    ways = {
        "reference": taking(1.0),
        "quick": taking(0.7),
        "lazy": taking(2.5),
        "hasty": taking(0.1, shift=1),
    }
    for name, way in ways.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, way)
        monkeypatch.setitem(registry, name, lambda device: None)


@pytest.mark.usefixtures("searches")
def test_implementations_come_from_the_registry_and_the_wrong_one_is_refused(
    run, clock, tmp_path, caplog, capsys
):
    tuned(run, clock)
    found = contests()["nearest"]
    assert found.choice == "quick"
    assert found.factors == pytest.approx({"reference": 1.0, "quick": 1 / 0.7, "lazy": 0.4})
    assert found.left_out.keys() == {"hasty"}
    assert list(contests(0)) == ["memory_format"]  # the run has made the other choices
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(["map", str(run), "--epochs", "1"]) == 0
    assert "nearest: quick (measured" in caplog.text
    with caplog.at_level("INFO"):
        caplog.clear()
        assert main(["map", str(run), "--epochs", "1", "--kernels", "reference"]) == 0
    assert "quick" not in caplog.text
    assert main(["tune", "--export", str(tmp_path / "file.json")]) == 0
    place().unlink()
    assert main(["tune", "--import", str(tmp_path / "file.json")]) == 0
    assert "2 of them of this machine" in capsys.readouterr().out
    assert contests()["nearest"] == found


def test_rows_near_are_as_spread_as_the_latents():
    random = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(5, 20, generator=random), dim=1)
    for spread in (1e-1, 1e-3):
        latents = centers.repeat(20, 1) + spread * torch.randn(100, 20, generator=random)
        latents = torch.nn.functional.normalize(latents, dim=1)
        of_each_other = torch.cdist(latents, latents).fill_diagonal_(torch.inf).amin(dim=1).median()
        apart = torch.cdist(rows_near(latents, 50), latents).amin(dim=1).median()
        assert 0.6 < apart / of_each_other < 1.2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["RUN", "--width", "8"], "--width"),
        (["CLIPS", "--deterministic"], "--deterministic"),
        (["RUN", "--show"], "--show"),
        (["--show", "--export", "x.json"], "--export"),
        (["--show"], "nothing was measured"),
        (["--export", "x.json"], "nothing was measured"),
        (["--import", "missing.json"], "missing.json"),
        (["--import", "CLIPS/index.json"], "damaged"),
        (["missing"], "missing"),
    ],
)
def test_a_mistake_is_one_line(words, reason, run, clips, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("RUN", str(run)).replace("CLIPS", str(clips)) for word in words]
    assert main(["tune", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
    assert not (tmp_path / "x.json").exists()


def test_the_doctor_says_what_was_chosen_how_much_faster_and_when(clips, clock, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "self_test", lambda: doctor.Finding("self-test", "PASS"))
    tuned(clips, clock, precision="fp32")
    main(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("measured data")]
    assert "resident (2.00 times" in line
    assert read(place())[0].when[:10] in line
    main(["doctor", "--json"])
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert {row["name"]: row["choice"] for row in measured}["data"] == "resident"
    place().write_text("[]")
    main(["doctor"])
    assert "WARN vglann tune" in capsys.readouterr().out
