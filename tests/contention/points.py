"""The points of a call's life at which the world may end: each statement, commit and command.

They are found by running the call, not by knowing its code: whatever it says to a store passes
here, before it is sent and, where only the answer may be lost, after it was done.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn
from unittest.mock import patch

from django.db import connection, connections
from redis.connection import AbstractConnection

from ai_budget import periods

Reached = Callable[[str], None]
GREETINGS = {"HELLO", "CLIENT", "INFO"}
"""What a new connection to Redis says first: no point of a call."""

REFUSED, FAILED = 3, 4
"""Exit codes of a call that was refused, and of one that broke down."""


@contextmanager
def watched(reached: Reached) -> Iterator[None]:
    """Call ``reached`` with the name of every point that this thread comes to inside."""
    driver: Any = connections[connection.alias].__class__
    commit = driver._commit
    send: Any = AbstractConnection.send_packed_command
    read: Any = AbstractConnection.read_response

    def statement(execute: Any, sql: str, *rest: Any) -> Any:
        reached(f"before {_short(sql)}")
        return execute(sql, *rest)

    def committing(wrapper: Any) -> None:
        if wrapper.connection is not None:
            reached("before COMMIT")
        commit(wrapper)
        reached("after COMMIT")

    sent = ""

    def sending(self: Any, command: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal sent
        sent = _command(command)
        if sent not in GREETINGS:
            reached(f"before redis {sent}")
        send(self, command, *args, **kwargs)

    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = read(self, *args, **kwargs)
        if sent not in GREETINGS:
            reached(f"after redis {sent}")
        return answer

    with (
        connection.execute_wrapper(statement),
        patch.object(driver, "_commit", committing),
        patch.object(AbstractConnection, "send_packed_command", sending),
        patch.object(AbstractConnection, "read_response", reading),
    ):
        yield


def _short(sql: str) -> str:
    words = sql.split()
    return " ".join(words[:3])[:60]


def _command(command: Any) -> str:
    sent = b"".join(command) if isinstance(command, list) else bytes(command)
    words = [word for word in sent.split(b"\r\n") if word[:1].isalpha()]
    return words[0].decode() if words else "a command"


class At:
    """Does something when the n-th point is reached, and remembers the points' names."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self.number, self.action = number, action
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.number + 1:
            self.action()

    @property
    def reached(self) -> bool:
        return len(self.names) > self.number


SLEPT = timedelta(hours=3)
_AWAKE = ExitStack()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that got a signal at a point; ``point`` is empty where it was over before.

    ``code`` is its exit code, None where it is only stopped.
    """

    child: int
    point: str
    code: int | None


def end_by(
    point: int,
    number: signal.Signals,
    call: Callable[[], object],
    on_waking: Callable[[], None] = lambda: None,
    counting: type[At] | None = None,
) -> Ended:
    """Do it in a process of its own that gets a signal at that point.

    Where the signal is SIGSTOP the process stays, to be finished by ``go_on``.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        _be_a_child(point, number, call, on_waking, counting or Before, tell)
    os.close(tell)
    _, status = os.waitpid(child, os.WUNTRACED)
    name = os.read(told, 1_000).decode() if _was_signalled(status) else ""
    os.close(told)
    code = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    if code is not None and code > REFUSED:
        raise RuntimeError(f"the call failed by itself before point {point}")
    return Ended(child=child, point=name, code=code)


def _be_a_child(
    point: int,
    number: signal.Signals,
    call: Callable[[], object],
    on_waking: Callable[[], None],
    counting: type[At],
    tell: int,
) -> NoReturn:
    code = FAILED
    try:

        def end() -> None:
            os.write(tell, f"{point}, {at.names[-1]}".encode())
            os.kill(os.getpid(), number)
            on_waking()

        at = counting(point, end)
        with watched(at):
            code = REFUSED if call() is False else 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def wake_up_later() -> None:
    """Let this process find that it was stopped: all its clocks are hours later."""
    monotonic = periods.monotonic
    periods.monotonic = lambda: monotonic() + SLEPT.total_seconds()
    wake_up_with_the_machine()


def wake_up_with_the_machine() -> None:
    """Let this process find that its machine slept: only the clock on the wall went on."""
    now = periods.now() + SLEPT
    _AWAKE.enter_context(periods.override_clock(lambda: now))


def _was_signalled(status: int) -> bool:
    return os.WIFSTOPPED(status) or os.WIFSIGNALED(status)


def start(call: Callable[[], object]) -> int:
    """Do it in a process of its own, and do not wait for it."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            code = REFUSED if call() is False else 0
        finally:
            os._exit(code)
    return child


def kill(child: int) -> int:
    """Kill a process that was started; return its exit code, the signal's unless it was over."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def go_on(child: int) -> int:
    """Let a stopped process go on, and return its exit code."""
    os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


class Before(At):
    """Does it before something: what is after one thing is before the next to everybody else."""

    def __call__(self, name: str) -> None:
        if name.startswith("before"):
            super().__call__(name)


class BeforeRedis(At):
    """Does it before a command to Redis, where no transaction is open."""

    def __call__(self, name: str) -> None:
        if name.startswith("before redis"):
            super().__call__(name)


class From(At):
    """Does something at the n-th point and at every one after it."""

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) > self.number:
            self.action()
