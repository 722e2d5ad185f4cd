"""`clips pack --scheduler`: real workers of a Dask cluster over loopback write what one machine writes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("distributed")

import dask
import distributed
from dask_plugins import Changed, Kill, KillInCheck
from decoding import pictures
from video_files import write_video

from vglann_fast.clips import cluster as cluster_module
from vglann_fast.clips import writer as writer_module
from vglann_fast.clips.cluster_worker import TOKEN_FILE, Job, check_worker, versions
from vglann_fast.clips.cut import PackOptions
from vglann_fast.clips.decode import DecodeLimits
from vglann_fast.clips.merge import merge
from vglann_fast.clips.pack import pack
from vglann_fast.clips.parts import part_of
from vglann_fast.errors import VglannError

OPTIONS = {"frames": 4, "size": 32}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten videos, the longest first; one of them twice, and a text."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        write_video(folder / f"{number}.mkv", pictures(40 - 4 * number))
    shutil.copy(folder / "2.mkv", folder / "8.mkv")
    (folder / "9.mkv").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """The content of a clip folder that one machine packed."""
    folder = tmp_path_factory.mktemp("whole") / "clips"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "MAX_REJECTED_SHARE", 0.2)
        pack(videos, folder, **OPTIONS)
    return content(folder)


@pytest.fixture(scope="module")
def scheduler():
    """The address of a scheduler with two workers, which are processes."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(autouse=True)
def lenient(monkeypatch):
    monkeypatch.setattr(writer_module, "MAX_REJECTED_SHARE", 0.2)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@contextmanager
def plugin(scheduler, plugin):
    """Workers have a plugin in the block."""
    with distributed.Client(scheduler, set_as_default=False) as client:
        client.register_plugin(plugin)
        try:
            yield
        finally:
            client.unregister_worker_plugin(plugin.name)


def refused(videos, out, scheduler, match):
    """Packing is refused in one line for that reason, and leaves nothing."""
    with pytest.raises(VglannError, match=match) as caught:
        pack(videos, out, **OPTIONS, scheduler=scheduler)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.iterdir())


def test_a_cluster_writes_the_bytes_that_one_machine_writes(videos, whole, scheduler, tmp_path):
    report = pack(videos, tmp_path / "clips", **OPTIONS, scheduler=scheduler)
    assert content(tmp_path / "clips") == whole
    assert [file.name for file in tmp_path.iterdir()] == ["clips"]
    assert (report.sources, report.rejected, report.repeated) == (10, 1, 8)
    assert json.loads(whole["rejected.jsonl"])["source"] == "9.mkv"


def test_tasks_that_wait_for_others_and_shards_change_nothing(
    videos, whole, scheduler, tmp_path, monkeypatch
):
    """The scheduler knows two tasks at a time."""
    monkeypatch.setattr(cluster_module, "MAX_TASKS", 2)
    shards = [tmp_path / "1", tmp_path / "2"]
    for number, shard in enumerate(shards, 1):
        pack(videos, shard, **OPTIONS, scheduler=scheduler, shard=(number, 2))
    merge(shards, tmp_path / "clips")
    assert content(tmp_path / "clips") == whole


def test_a_worker_that_is_killed_changes_nothing(videos, whole, scheduler, tmp_path):
    marker = tmp_path / "killed"
    with plugin(scheduler, Kill(str(marker))):
        pack(videos, tmp_path / "clips", **OPTIONS, scheduler=scheduler)
    assert marker.exists()
    assert content(tmp_path / "clips") == whole


def test_a_video_that_lost_workers_had_is_named(videos, scheduler, tmp_path):
    def may_fail(times, dask_scheduler=None):
        before, dask_scheduler.allowed_failures = dask_scheduler.allowed_failures, times
        return before

    with distributed.Client(scheduler, set_as_default=False) as client, plugin(scheduler, Kill()):
        before = client.run_on_scheduler(may_fail, 1)
        try:
            refused(
                videos,
                tmp_path / "clips",
                scheduler,
                r"\d\.mkv: 2 workers ended.*--nthreads 1.*--memory-limit.*same vglann-fast",
            )
        finally:
            client.run_on_scheduler(may_fail, before)


def test_too_many_rejected_files_leave_nothing(videos, scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "MAX_REJECTED_SHARE", 0.05)
    refused(videos, tmp_path / "clips", scheduler, r"1 of 10 videos cannot be used.*'9\.mkv'")


@pytest.mark.parametrize(
    ("attribute", "value", "match"),
    [
        ("TOKEN_FILE", "elsewhere", r"worker tcp://\S+: does not see .*choose an --out"),
        ("__version__", "0.0", r"worker tcp://\S+: has vglann-fast 0\.0, not \S+; install"),
    ],
)
def test_workers_that_are_not_as_this_machine_are_refused_by_name(
    videos, scheduler, tmp_path, attribute, value, match
):
    with plugin(scheduler, Changed("vglann_fast.clips.cluster_worker", attribute, value)):
        refused(videos, tmp_path / "clips", scheduler, match)


def test_pytorch_is_compared_where_it_decides_the_cuts(tmp_path):
    assert "torch" not in versions(PackOptions())
    options = PackOptions(shots="transnetv2 0")
    (tmp_path / TOKEN_FILE).write_text("token")
    job = Job(tmp_path, "token", versions(options), options, DecodeLimits(), part_of([], 1, 1)[0])
    check_worker(job)
    with pytest.raises(VglannError, match=r"torch \S+, not 1\.0; install"):
        check_worker(replace(job, versions=job.versions | {"torch": "1.0"}))


def test_a_video_that_workers_do_not_see_is_an_error_and_not_a_rejected_file(videos, scheduler, tmp_path):
    """A file that only this process has open."""
    (tmp_path / "place").mkdir()
    with (videos / "0.mkv").open("rb") as file:
        number = os.dup2(file.fileno(), 900)
        try:
            refused(
                [f"/proc/self/fd/{number}"], tmp_path / "place" / "clips", scheduler, r"does not see .*900"
            )
        finally:
            os.close(number)


def test_a_full_disk_of_a_worker_names_the_worker(videos, scheduler, tmp_path):
    with plugin(scheduler, Changed("vglann_fast.clips.cluster_worker", "decode_job", full)):
        refused(videos, tmp_path / "clips", scheduler, r"worker tcp://\S+: .*/scratch: the disk is full")


def full(*_, **__):
    raise OSError(28, "No space left on device", "/scratch")


def test_any_other_error_of_a_worker_is_one_line_that_names_the_video(videos, scheduler, tmp_path):
    """As of a worker that lacks a module."""
    with plugin(scheduler, Changed("vglann_fast.clips.cluster_worker", "decode_job", missing)):
        refused(
            videos,
            tmp_path / "clips",
            scheduler,
            r"\d\.mkv: .*ModuleNotFoundError: No module.*have the same vglann-fast",
        )


def missing(*_, **__):
    raise ModuleNotFoundError("No module\nnamed 'vglann_fast'")


def test_a_scheduler_that_no_longer_waits_for_workers_is_one_line(videos, tmp_path):
    with (
        dask.config.set({"distributed.scheduler.no-workers-timeout": "100ms"}),
        distributed.LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster,
    ):
        address = cluster.scheduler_address
        refused(
            videos, tmp_path / "clips", address, r"\d\.mkv: .*NoWorkerError.*see that workers are running"
        )


def test_a_worker_that_is_lost_while_it_is_checked_changes_nothing(videos, whole, scheduler, tmp_path):
    marker = tmp_path / "killed"
    with plugin(scheduler, KillInCheck(str(marker))):
        pack(videos, tmp_path / "clips", **OPTIONS, scheduler=scheduler)
    assert marker.exists()
    assert content(tmp_path / "clips") == whole


@contextmanager
def process(name, *words):
    """A process of Dask's in the block, which listens on this machine only."""
    words = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--no-dashboard", *map(str, words)]
    command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.kill()


def test_a_scheduler_that_is_killed_leaves_one_line_and_nothing_else(videos, tmp_path):
    file, out = tmp_path / "scheduler.json", tmp_path / "place" / "clips"
    out.parent.mkdir()
    with (
        process("scheduler", "--port", 0, "--scheduler-file", file) as killed,
        process("worker", "--scheduler-file", file, "--no-nanny", "--local-directory", tmp_path / "local"),
    ):
        while not file.exists():
            assert killed.poll() is None, "the scheduler does not start"
            time.sleep(0.05)
        with distributed.Client(scheduler_file=str(file), set_as_default=False) as client:
            address = client.scheduler.address
            client.wait_for_workers(1)
            client.register_plugin(Kill(str(tmp_path / "killed"), killed.pid))
        words = [str(videos), "--out", str(out), "--frames", "4", "--size", "32"]
        command = [sys.executable, "-m", "vglann_fast", "clips", "pack", *words, "--scheduler", address]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("pack: ")]
    assert len(said) == 1
    assert f"--scheduler {address}" in said[0]
    assert (tmp_path / "killed").exists()
    assert not list(out.parent.iterdir())


def test_a_scheduler_that_does_not_answer_is_one_line(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "ANSWER_SECONDS", 1)
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "clips"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        refused(videos, out, f"tcp://127.0.0.1:{port}", rf"--scheduler tcp://127\.0\.0\.1:{port}: no answer")
    refused(videos, out, f"tcp://127.0.0.1:{port}", r"no answer.*`dask scheduler`")
    for address in ("", "host", "ssh://host:1", "inproc://x", f"tls://127.0.0.1:{port}"):
        refused(videos, out, address, "--scheduler .*no answer")


def test_without_the_extra_it_says_what_to_install(videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused(videos, tmp_path / "clips", "tcp://127.0.0.1:8786", r"pip install 'vglann-fast\[cluster\]'")


def test_workers_of_this_machine_and_of_a_scheduler_exclude_each_other(videos, tmp_path):
    with pytest.raises(VglannError, match=r"--workers.*--scheduler"):
        pack(videos, tmp_path / "clips", workers=2, scheduler="tcp://127.0.0.1:8786")
