"""What tests of batches have workers do: go through with them, as Celery workers and without."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

from ai_budget import batches
from ai_budget.batches import steps
from tests.batches.brokers import Broker, used
from tests.batches.done import make_due

CHUNK = 2
"""How many results are booked at once."""

MOST_TICKS = 3
"""After which a batch is over: sent or found again where it was lost, and collected."""


def get_ready() -> None:
    """Load what takes long, so that processes that are forked have it."""
    for module in _SLOW:
        import_module(module)


_SLOW = (
    "anthropic.resources.messages.batches",
    "anthropic.types.messages",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.solo",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.strategy",
    "kombu.transport.pyamqp",
    "kombu.transport.redis",
)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Just before a function is called for the n-th time, or just after."""

    function: str
    after: bool = False
    time: int = 1


def be_a_celery_worker(broker: Broker, deadly: Moment | None = None) -> None:
    """Serve a queue, until killed: by oneself, with kill -9, where a moment is given."""
    with ExitStack() as stack:
        app = stack.enter_context(used(broker.app()))
        stack.enter_context(patch.object(steps, "ROWS_AT_ONCE", CHUNK))
        if deadly is not None:
            stack.enter_context(_dying_at(deadly))
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        app.worker_main(["--quiet", "worker", "--pool", "solo", "--loglevel", "ERROR", *quiet])


@contextmanager
def _dying_at(moment: Moment) -> Iterator[None]:
    module, _, name = moment.function.rpartition(".")
    where = import_module(module)
    whole: Callable[..., Any] = getattr(where, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.time and not moment.after:
            _die()
        answer = whole(*args, **kwargs)
        if calls == moment.time:
            _die()
        return answer

    with patch.object(where, name, deadly):
        yield


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_death(child: int) -> int:
    """Return the exit code of a process that was started, the negative signal that ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def go_through(ticks: int = MOST_TICKS) -> None:
    """Do what is to be done of batches, as so many ticks do it, and finish them."""
    with patch.object(steps, "ROWS_AT_ONCE", CHUNK):
        for _ in range(ticks):
            for submission_id in batches.due():
                batches.advance(submission_id)
            make_due()
    batches.tidy()
