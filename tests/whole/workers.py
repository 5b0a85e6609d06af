"""A second worker: a process that stays, with its settings, its connections and its memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tests.processes import PATIENCE, start

Result = TypeVar("Result")


def serve(orders: Connection) -> None:
    """Do what is told, until the pipe is closed; nothing is forgotten between two pieces of work.

    What is told crosses the pipe, so work is a function of a module and its arguments are values.
    """
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    import django

    django.setup()
    with ExitStack() as stack:
        worker = _Surroundings(stack.enter_context(ExitStack()))
        while True:
            try:
                work, arguments, options = orders.recv()
            except EOFError:
                return
            try:
                answer = (worker.use if work is None else work)(*arguments, **options)
            except Exception as error:
                error.add_note(f"in worker process {os.getpid()}")
                answer = error
            orders.send(answer)


class _Surroundings:
    """The settings and the time that the work of one test is done with."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def use(self, settings: Mapping[str, Any], at: datetime | None) -> None:
        from django.test import override_settings

        from ai_budget.testing import freeze

        self._stack.close()
        self._stack.enter_context(override_settings(AI_BUDGET=dict(settings)))
        if at is not None:
            self._stack.enter_context(freeze(at))


class Elsewhere:
    """The process, seen from the test. It inherits the name of the run's database."""

    def __init__(self) -> None:
        self.process, self._pipe = start(serve)

    def use(self, settings: Mapping[str, Any], *, at: datetime | None = None) -> None:
        """Set AI_BUDGET, and stop the clock where a moment is given."""
        self._told(None, (dict(settings), at), {})

    def do(self, work: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Return what the work returned there, or raise what it raised."""
        answer: Result = self._told(work, arguments, options)
        return answer

    def _told(self, work: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        self._pipe.send((work, arguments, options))
        if not self._pipe.poll(PATIENCE):
            self.process.kill()
            raise TimeoutError(f"worker {self.process.pid} did not answer in {PATIENCE} seconds")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self._pipe.close()
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
