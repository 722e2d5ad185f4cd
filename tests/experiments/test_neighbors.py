"""The program beside busy neighbors: what a setting's environment is, and the table."""

from vglann_fast.experiments import neighbors


def test_a_setting_starts_from_no_choice_of_the_user(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    own, one = (neighbors.environment(name) for name in ("the program's own choice", "one thread"))
    assert not own.keys() & set(neighbors.CLEARED)
    assert (one["OMP_NUM_THREADS"], "OMP_WAIT_POLICY" in one) == ("1", False)


def test_the_table_has_medians_of_both_commands():
    times = {
        name: {setting: [(30.0, 3.0), (10.0, 1.0), (20.0, 2.0)] for setting in neighbors.SETTINGS}
        for name in ("map", "train")
    }
    lines = neighbors.table(times).splitlines()
    assert len(lines) == 2 + len(neighbors.SETTINGS)
    assert lines[2].split("|")[2:6] == [" 20 ", " 2 ", " 20 ", " 2 "]


def test_a_neighbor_is_gone_afterwards(monkeypatch):
    started = []
    monkeypatch.setattr(neighbors.time, "sleep", lambda seconds: None)
    popen = neighbors.subprocess.Popen
    monkeypatch.setattr(
        neighbors.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with neighbors.neighbors(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
