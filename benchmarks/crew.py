"""Workers: threads in several processes that begin at the same moment."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from benchmarks.stage import configure

PROCESSES = 8
"""How many processes the workers are spread over, unless there are fewer workers."""

START_SECONDS = 60
"""How long the first waits for the last to be ready."""

_starting: Any
"""What the workers wait at until all are ready; one for each process."""

Task = Callable[..., Any]
"""A function of this package, given ``start``, its worker's number, and what the run gives it.

It makes ready, calls ``start()`` and works. It runs in a thread with connections of its own.
"""


class Crew:
    """So many workers, for one run after the other."""

    def __init__(self, pool: ProcessPoolExecutor, *, workers: int) -> None:
        self._pool = pool
        self.workers = workers
        self.processes = min(workers, PROCESSES)
        self.threads = workers // self.processes

    def __str__(self) -> str:
        if self.workers == 1:
            return "1 worker"
        return f"{self.workers} workers ({self.processes} processes x {self.threads} threads)"

    def run(self, task: Task, *given: Any, settings: Mapping[str, Any]) -> list[Any]:
        """Let every worker do the task; return their results in the order of their numbers."""
        runs = [
            self._pool.submit(_run, task, given, dict(settings), process, self.threads)
            for process in range(self.processes)
        ]
        return [result for run in runs for result in run.result()]


@contextmanager
def crew(workers: int, *, database: str) -> Iterator[Crew]:
    """Start the processes of so many workers."""
    spawning = multiprocessing.get_context("spawn")
    processes = min(workers, PROCESSES)
    if workers % processes:
        raise SystemExit(f"{workers} workers cannot be shared by {processes} processes.")
    given = (spawning.Barrier(workers), database)
    with ProcessPoolExecutor(processes, spawning, initializer=_join, initargs=given) as pool:
        yield Crew(pool, workers=workers)


def _join(barrier: Any, database: str) -> None:
    global _starting
    _starting = barrier
    configure(database)


def _run(
    task: Task, given: tuple[Any, ...], settings: dict[str, Any], process: int, threads: int
) -> list[Any]:
    """Do the task in every thread of this process."""
    from django.db import connections
    from django.test import override_settings

    def work(number: int) -> Any:
        try:
            return task(functools.partial(_starting.wait, START_SECONDS), number, *given)
        except BaseException:
            _starting.abort()  # or the others would wait for this one
            raise
        finally:
            connections.close_all()

    first = process * threads
    with override_settings(AI_BUDGET=settings), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(first, first + threads)))


def timed(
    start: Callable[[], object],
    number: int,
    make: Callable[..., Any],
    given: tuple[Any, ...],
    seconds: float,
) -> tuple[float, list[float]]:
    """Make a step and repeat it so long; return the seconds and what each time took."""
    step = make(number, *given)
    step()
    start()
    times = []
    begun = now = time.perf_counter()
    while now - begun < seconds:
        before = now
        step()
        now = time.perf_counter()
        times.append((now - before) * 1000)
    return now - begun, times
