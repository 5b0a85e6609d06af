"""Worker processes that stay: each imports Django once and does what the test tells it.

They inherit the name of the test's database from the environment, so that they open the very
same one. What they are told crosses a pipe, so work is a function of a module and its arguments
are values. A worker can be killed by the work itself; the next piece of work finds another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tests.processes import PATIENCE, start

Result = TypeVar("Result")


def serve(orders: Connection) -> None:
    """Do one piece of work after the other, until the pipe is closed."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    import django

    django.setup()
    orders.send(None)
    while True:
        try:
            work, arguments, settings, at = orders.recv()
        except EOFError:
            return
        try:
            with surroundings(settings, at):
                answer: Any = work(*arguments)
        except Exception as error:
            error.add_note(f"in worker process {os.getpid()}")
            answer = error
        orders.send(answer)


@contextmanager
def surroundings(settings: Mapping[str, Any], at: datetime | None) -> Iterator[None]:
    """Set AI_BUDGET, and stop the clock where a moment is given; close what was opened."""
    from django.db import connections
    from django.test import override_settings

    from ai_budget.testing import freeze

    with ExitStack() as stack:
        stack.callback(connections.close_all)
        stack.enter_context(override_settings(AI_BUDGET=dict(settings)))
        if at is not None:
            stack.enter_context(freeze(at))
        yield


class Worker:
    """One process, seen from the test."""

    def __init__(self) -> None:
        # Where the worker itself starts processes, it must not be a daemon; it ends by its pipe.
        self.process, self._pipe = start(serve)

    def wait_until_ready(self) -> None:
        self._receive()

    def begin(
        self,
        work: Callable[..., Any],
        *arguments: Any,
        settings: Mapping[str, Any],
        at: datetime | None,
    ) -> None:
        self._pipe.send((work, arguments, settings, at))

    def result(self) -> Any:
        """Return what the work returned, or raise what it raised."""
        answer = self._receive()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, seconds: float) -> None:
        """Give it so much time, or less if it is done before."""
        self._pipe.poll(seconds)

    def _receive(self) -> Any:
        if not self._pipe.poll(PATIENCE):
            self.process.kill()
            raise TimeoutError(f"worker {self.process.pid} did not answer in {PATIENCE} seconds")
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.close()
        # It has nothing to save, and eight interpreters take seconds to tidy up.
        self.process.kill()
        self.process.join()


class Workers:
    """Eight processes with the settings, and at the time, of one test."""

    COUNT = 8

    def __init__(self, workers: Sequence[Worker], settings: Mapping[str, Any]) -> None:
        self._workers = workers
        self.settings = settings
        self.at: datetime | None = None

    def begin(self, work: Callable[..., Result], shares: Sequence[tuple[Any, ...]]) -> None:
        """Give each worker its share; ``results`` waits for them."""
        self._busy = self._workers[: len(shares)]
        for worker, share in zip(self._busy, shares, strict=True):
            worker.begin(work, *share, settings=self.settings, at=self.at)

    def some(self, first: int, count: int = 1) -> Workers:
        """Return a few of them, to do something else than the others."""
        few = Workers(self._workers[first : first + count], self.settings)
        few.at = self.at
        return few

    def wait(self, seconds: float) -> None:
        """Give those who are busy so much time, or less if they are done before."""
        for worker in self._busy:
            worker.wait(seconds)

    def results(self) -> list[Any]:
        """Wait for all of them; raise the first error once nobody works any more."""
        answers, errors = [], []
        for worker in self._busy:
            try:
                answers.append(worker.result())
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    def do(self, work: Callable[..., Result], shares: Sequence[tuple[Any, ...]]) -> list[Result]:
        """Let the workers do their shares side by side."""
        self.begin(work, shares)
        return self.results()

    def one(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Let one worker do something."""
        return self.do(work, [arguments])[0]
