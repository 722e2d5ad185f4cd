"""Pack by the workers of a Dask cluster: one task for each video packs it as a part of the pack, see `parts.py`.

A worker does what `vglann clips pack VIDEOS --shard I/N` does, with N the number of videos. It decodes into its own
scratch folder (`dask worker --local-directory`) and writes the part into the temporary folder of the destination,
which all workers must see under the same path. Only the name of a part travels through the scheduler. This process
merges the parts in the order of the videos as they come, and removes them. Parts that come early wait on the disk.

The scheduler gives the tasks of a lost worker to others (`distributed.scheduler.allowed-failures` says how often).
They write into new folders, so that a part of a worker that was lost, or only seemed to be, is never read. Versions
and the shared folder are checked on all workers before the first task, and on its worker before each task.

TLS is Dask's own configuration, which its client reads.
"""

import asyncio
import logging
import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Any

from vglann_fast.clips.cluster_worker import TOKEN_FILE, Job, check_worker, pack_video, versions
from vglann_fast.clips.decode import DecodeLimits
from vglann_fast.clips.parts import part_of
from vglann_fast.clips.sources import Source
from vglann_fast.clips.writer import ClipWriter
from vglann_fast.errors import VglannError

ANSWER_SECONDS = 10  # for the scheduler
MAX_TASKS = 10_000  # that the scheduler knows of at a time
RETRIES = 2  # of a task that ends with an error, perhaps on another worker

log = logging.getLogger("vglann_fast")


def add_by_workers(
    writer: ClipWriter, sources: Sequence[Source], shared: Path, limits: DecodeLimits, scheduler: str
) -> Generator[None, None, None]:
    """Decode videos by the workers of a Dask scheduler and add them to `writer`; yield after each that is decoded.

    shared: folder for parts and temporary files, which every worker must see.
    Raises `VglannError` for a scheduler that does not answer or is lost, workers that cannot do the work, and what
    `add_videos` raises on a worker.
    """
    if not sources:
        return
    with _client(scheduler) as client:
        job = Job(
            shared.absolute(),
            token_hex(16),
            versions(writer.options),
            writer.options,
            limits,
            part_of(sources, 1, len(sources))[0],
        )
        (shared / TOKEN_FILE).write_text(job.token)
        _check_workers(client, job, scheduler)
        waiting: dict[int, str] = {}
        following = 0
        with closing(_done(client, job, sources, scheduler)) as done:
            for number, folder in done:
                waiting[number] = folder
                while following in waiting:
                    part = shared / waiting.pop(following)
                    writer.add_folder(part)
                    shutil.rmtree(part, ignore_errors=True)
                    following += 1
                yield


def _done(
    client: Any, job: Job, sources: Sequence[Source], scheduler: str
) -> Generator[tuple[int, str], None, None]:
    """Yield number and folder of each part, in the order in which they are done."""
    from distributed import as_completed

    numbers = {}

    def submitted(number: int, source: Source) -> Any:
        source = replace(source, path=source.path.absolute())
        future = client.submit(
            pack_video,
            job,
            number,
            source,
            os.path.exists(source.path),
            key=f"pack-{job.token}-{number}",
            retries=RETRIES,
        )
        numbers[future.key] = number
        return future

    tasks = (submitted(number, source) for number, source in enumerate(sources))
    with _answering(scheduler):
        running = as_completed(list(islice(tasks, MAX_TASKS)), loop=client.loop)
    for future in running:
        number = numbers.pop(future.key)
        yield number, _result(future, sources[number], scheduler)
        with _answering(scheduler):
            running.update(list(islice(tasks, 1)))


def _result(future: Any, source: Source, scheduler: str) -> str:
    """Return what a task has returned. Raises `VglannError` for every error of a task."""
    from distributed import KilledWorker

    try:
        with _answering(scheduler):
            return future.result()
    except VglannError:
        raise
    except KilledWorker as error:
        # The scheduler counts a lost worker against all tasks that the worker had, also those that waited there. A
        # worker that cannot import this package, and comes after the check, ends when it is sent a task.
        raise VglannError(
            f"{source.path}: {error.allowed_failures + 1} workers ended while they had it, perhaps because of "
            "another video; see their logs, then give workers one thread each (`dask worker --nthreads 1`), more "
            "memory (--memory-limit) or the same vglann-fast"
        ) from error
    except Exception as error:  # such as no worker in time, or a scheduler that cannot import this package
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise VglannError(
            f"{source.path}: the workers could not pack it ({cause}); see that workers are running, and that the "
            "scheduler and all workers have the same vglann-fast, then run the command again"
        ) from error


def _check_workers(client: Any, job: Job, scheduler: str) -> None:
    with _answering(scheduler):
        answers = client.run(check_worker, job, on_error="return")
    for address, error in sorted(answers.items()):
        if isinstance(error, VglannError):
            raise VglannError(f"worker {address}: {error}")
        # A worker that was lost meanwhile will be replaced, and each task checks its worker again.
        if error is not None and not isinstance(error, OSError):
            raise VglannError(f"worker {address}: {error}; install the same vglann-fast there")
    if not answers:
        log.info("%s has no workers yet; waiting for the first", scheduler)


@contextmanager
def _answering(scheduler: str) -> Iterator[None]:
    """Turn what the client raises in the block, when the scheduler does not answer any more, into a `VglannError`."""
    from distributed import CancelledError
    from distributed.client import ClosedClientError

    try:
        yield
    except (CancelledError, ClosedClientError, OSError) as error:
        raise VglannError(
            f"--scheduler {scheduler}: it is gone, or has dropped the work; start it, then run the command again"
        ) from error


@contextmanager
def _client(scheduler: str) -> Iterator[Any]:
    """Connect to a scheduler for the block."""
    try:
        from distributed import Client
    except ImportError as error:
        raise VglannError(
            "--scheduler needs the module distributed: pip install 'vglann-fast[cluster]'"
        ) from error
    try:
        # In a thread, because this one may have an event loop that runs, as in a notebook.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _answer(scheduler)).result()
        client = Client(scheduler, timeout=ANSWER_SECONDS, set_as_default=False)
    except Exception as error:  # whatever else listens there, or is wrong with the address or with TLS
        said = f"nothing in {ANSWER_SECONDS} s" if isinstance(error, TimeoutError) else error
        raise VglannError(
            f"--scheduler {scheduler}: no answer ({said}); give the address that `dask scheduler` prints"
        ) from error
    with _quiet("distributed.client"), client:
        yield client


async def _answer(scheduler: str) -> None:
    """Raise an exception unless a scheduler answers in time; the client would wait for a silent one for ever."""
    from distributed import rpc
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    async with asyncio.timeout(ANSWER_SECONDS), rpc(scheduler, connection_args=arguments) as found:
        await found.identity()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Show no errors of a logger in the block: they are said in one line."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
