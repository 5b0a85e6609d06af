"""Many prompts at once: ``ask_many`` and ``aask_many``, for what cannot wait for a batch.

What is sent next, and what an error means for the other prompts, is decided in one place that
knows neither threads nor tasks. The two verbs only carry it out.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum, auto
from functools import partial
from queue import SimpleQueue
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections
from django.views.decorators.debug import sensitive_variables

from ai_budget import money
from ai_budget.exceptions import (
    AIBudgetError,
    CallInsideTransaction,
    LimitReached,
    UnboundedCall,
)
from ai_budget.guard.charge import charge, current_payer
from ai_budget.guard.clients import async_client, client
from ai_budget.guard.routing import Router
from ai_budget.ledger import base as ledgers
from ai_budget.service import Prompt, aask, ask
from ai_budget.values import Answer, Measure

_FOR_ALL = frozenset({401, 402, 403})
"""HTTP statuses that are about the key and its account, and so about every prompt alike.
https://platform.claude.com/docs/en/api/errors"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one prompt: its answer, or the error that it ended with.

    ``prompt`` is the one that was given; messages that came from a generator are a list.
    """

    prompt: Prompt = field(repr=False)
    answer: Answer | None = None
    error: Exception | None = None

    @property
    def answered(self) -> bool:
        return self.answer is not None

    @property
    def refused(self) -> bool:
        """Whether the budget said no, to this prompt or to one before it that ended them all."""
        return isinstance(self.error, AIBudgetError)

    @property
    def failed(self) -> bool:
        """Whether the API or the way to it failed. It may have cost money all the same."""
        return self.error is not None and not self.refused

    @property
    def text(self) -> str:
        """The answer's text. Raises the error where there is no answer."""
        if self.answer is not None:
            return self.answer.text
        assert self.error is not None  # noqa: S101 - it is one or the other
        raise self.error

    @property
    def cost_nanousd(self) -> int:
        """What the answer cost; 0 where there is none."""
        return 0 if self.answer is None else self.answer.cost_nanousd

    @property
    def cost(self) -> Decimal:
        """Exact dollars. See ``cost_nanousd``."""
        return money.to_usd(self.cost_nanousd)


class Outcomes(list[Outcome]):
    """One outcome for each prompt, in their order. ``ended_by`` is why not all were sent."""

    ended_by: Exception | None = None

    @property
    def answers(self) -> list[Answer]:
        """The answers that there are, in order."""
        return [outcome.answer for outcome in self if outcome.answer is not None]

    @property
    def cost(self) -> Decimal:
        """What all answers cost together, in exact dollars.

        A call that failed after it was sent may be booked too, at its bound: the journal has it.
        """
        return money.to_usd(sum(outcome.cost_nanousd for outcome in self))


@sensitive_variables()
def ask_many(
    prompts: Iterable[Prompt],
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Iterable[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    ttl: float | None = None,
    route: Router | None = None,
    wait: float | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,
    concurrency: int = 8,
    **params: Any,
) -> Outcomes:
    """Ask all prompts, at most ``concurrency`` at once, and return what came of each in order.

    Every prompt is a call of its own, with the other keywords as ``ask`` takes them. ``prompts``
    is read in the caller's thread, no further ahead than is sent.

    - Once the budget refuses nothing more is sent: those in flight are finished, the others
      are marked with the same error. A prompt that no limit could ever hold, or that has no
      bound, is marked alone. Where calls in flight of this very run are in the way, they are
      waited for, and fewer are sent at once from then on.
    - A prompt that fails at the API is marked alone, unless the key or its account is refused.
    - Any other error is raised once all in flight are booked, and says how many answers were
      paid for. So are errors of ``prompts`` itself. ``ImproperlyConfigured`` without a key, and
      ``CallInsideTransaction``, come before anything is sent.

    Calls are made in threads of their own, which see the charges around this one and have
    connections to the database that are closed at the end. Inside the transaction of a
    ``TestCase``, and with SQLite in memory, where other threads would see another database, they
    are made one after the other in the caller's thread. An interrupt sends nothing more, and is
    raised once all in flight are booked.
    """
    run = _Run(prompts, concurrency)
    paid = _context(charge(feature=feature, user=user, subject=subject, tags=tags))
    paid.run(_prepare)
    client()
    one = partial(
        ask,
        system=_kept(system),
        model=model,
        max_tokens=max_tokens,
        cache=cache,
        ttl=ttl,
        route=route,
        wait=wait,
        timeout=timeout,
        **params,
    )
    if _alone_in_its_database():
        run.room = 1
        while (turn := run.next()) is not None:
            run.take(turn, paid.copy().run(_attempt, one, turn))
    else:
        _ask_in_threads(run, one, paid)
    return run.outcomes()


@sensitive_variables()
async def aask_many(
    prompts: Iterable[Prompt],
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Iterable[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    ttl: float | None = None,
    route: Router | None = None,
    wait: float | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - the SDK's own, for one attempt
    concurrency: int = 8,
    **params: Any,
) -> Outcomes:
    """Ask all prompts without blocking the event loop. See ``ask_many``.

    ``prompts`` is read in the event loop. Cancelling it cancels those in flight, and waits until
    they have ended: no task is left behind.
    """
    run = _Run(prompts, concurrency)
    paid = _context(charge(feature=feature, user=user, subject=subject, tags=tags))
    await sync_to_async(paid.run)(_prepare)
    async_client()
    one = partial(
        aask,
        system=_kept(system),
        model=model,
        max_tokens=max_tokens,
        cache=cache,
        ttl=ttl,
        route=route,
        wait=wait,
        timeout=timeout,
        **params,
    )
    await _ask_in_tasks(run, one, paid)
    return run.outcomes()


# What both verbs decide alike


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """A prompt that is to be sent now, and its place; ``alone`` says that nothing else is."""

    place: int
    prompt: Prompt
    alone: bool


class _Meaning(Enum):
    """What an error means for the other prompts."""

    MARK = auto()  # nothing: it is about this prompt
    AGAIN = auto()  # others of this run may be in the way: send this one again, and fewer at once
    END = auto()  # it would be the same for them: send no more
    RAISE = auto()  # the code is wrong, not the world


def _meaning(error: BaseException, *, alone: bool) -> _Meaning:
    if isinstance(error, LimitReached):
        if error.delay is None:
            # Larger than the whole limit, as smaller ones need not be, unless nothing is allowed.
            return _Meaning.MARK if error.limit else _Meaning.END
        # Tokens a minute are taken by the bound, and what was not used is given back.
        gives_back = error.saturated or error.measure == Measure.TOKENS
        return _Meaning.AGAIN if gives_back and not alone else _Meaning.END
    if isinstance(error, UnboundedCall):
        return _Meaning.MARK
    if isinstance(error, AIBudgetError) and not isinstance(error, CallInsideTransaction):
        return _Meaning.END
    if _is_of_the_sdk(error):
        return _Meaning.END if getattr(error, "status_code", 0) in _FOR_ALL else _Meaning.MARK
    return _Meaning.RAISE


def _is_of_the_sdk(error: BaseException) -> bool:
    """Say whether the SDK raised it: the API answered with an error, or could not be reached."""
    packages = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return "anthropic" in packages


class _Run:
    """Which prompt is sent next, and what becomes of all of them.

    ``room`` is how many may be in flight, ``running`` how many are. Each time calls of this run
    are in the way of another the room becomes smaller by one, so that it is about what the limit
    holds; a prompt that is refused in a room for one is refused by what others hold.
    """

    def __init__(self, prompts: Iterable[Prompt], concurrency: int) -> None:
        if isinstance(prompts, (str, bytes, Mapping)):
            raise TypeError("prompts are several: for a single one use ask().")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int):
            raise TypeError(f"concurrency is a whole number, not {type(concurrency).__name__}.")
        if concurrency < 1:
            raise ValueError("concurrency is a whole number from 1 on.")
        self.room = concurrency
        self.running = 0
        self._unread: Iterator[Prompt] = iter(prompts)
        self._again: deque[_Turn] = deque()
        self._read = 0
        self._outcomes: dict[int, Outcome] = {}
        self._ended_by: Exception | None = None
        self._broken: BaseException | None = None

    def next(self) -> _Turn | None:
        """Return what is to be sent now; None where nothing is, or not before one has ended."""
        over = self._ended_by is not None or self._broken is not None
        if over or self.running >= self.room:
            return None
        if self._again:
            place, prompt = self._again[0].place, self._again.popleft().prompt
        else:
            try:
                prompt = _ensure_prompt(next(self._unread))
            except StopIteration:
                return None
            except Exception as error:
                self._broken = error
                return None
            place, self._read = self._read, self._read + 1
        self.running += 1
        return _Turn(place=place, prompt=prompt, alone=self.room == 1)

    def take(self, turn: _Turn, result: Answer | BaseException) -> None:
        """Take what came of a turn."""
        self.running -= 1
        if isinstance(result, Answer):
            self._outcomes[turn.place] = Outcome(prompt=turn.prompt, answer=result)
            return
        meaning = _meaning(result, alone=turn.alone)
        if meaning is _Meaning.RAISE or not isinstance(result, Exception):
            self._broken = self._broken or result
            return
        if meaning is _Meaning.AGAIN and self._ended_by is None:
            self._again.append(turn)
            self.room = max(1, self.room - 1)
            return
        if meaning is _Meaning.END and self._ended_by is None:
            self._ended_by = result
        self._outcomes[turn.place] = Outcome(prompt=turn.prompt, error=result)

    def outcomes(self) -> Outcomes:
        """Return all outcomes, once nothing runs any more, or raise what went wrong."""
        if self._ended_by is not None and self._broken is None:
            self._mark_unsent(self._ended_by)
        found = Outcomes(outcome for _, outcome in sorted(self._outcomes.items(), key=_place))
        found.ended_by = self._ended_by
        if self._broken is None:
            return found
        if paid := len(found.answers):
            self._broken.add_note(
                f"Of the other prompts {paid} had been answered, for ${found.cost}: the calls "
                "are in the journal, the answers are lost with this error."
            )
        try:
            raise self._broken
        finally:
            self._broken = None  # or its traceback and this would hold each other

    def _mark_unsent(self, error: Exception) -> None:
        for turn in self._again:
            self._outcomes[turn.place] = Outcome(prompt=turn.prompt, error=error)
        try:
            for place, prompt in enumerate(self._unread, start=self._read):
                self._outcomes[place] = Outcome(prompt=prompt, error=error)
        except Exception as failure:
            self._broken = failure


def _place(item: tuple[int, Outcome]) -> int:
    return item[0]


def _ensure_prompt(prompt: Any) -> Prompt:
    """Return a prompt that can be sent more than once. Raises ``TypeError`` for what is none."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
        raise TypeError(f"A prompt is text or a list of messages, not {type(prompt).__name__}.")
    return list(prompt)


# How it is carried out


def _context(paying: charge) -> Context:
    """Return the caller's context with one more charge, which ``prompts`` itself is not under."""
    context = copy_context()
    context.run(paying.__enter__)
    return context


def _prepare() -> None:
    """Raise what every call would raise, and look up who pays, while nothing is sent yet."""
    ledgers.current().ensure_durable()
    current_payer().charge()


def _kept(
    system: str | Iterable[Mapping[str, Any]] | None,
) -> str | Iterable[Mapping[str, Any]] | None:
    """Return a system prompt that can be sent more than once."""
    return system if system is None or isinstance(system, str) else list(system)


def _alone_in_its_database() -> bool:
    """Say whether other threads would see another database, or lock each other out of this one."""
    connection: Any = connections[ledgers.current().alias]
    in_memory = connection.vendor == "sqlite" and connection.is_in_memory_db()
    return bool(connection.in_atomic_block or in_memory)


def _attempt(one: Callable[[Prompt], Answer], turn: _Turn) -> Answer | Exception:
    try:
        return one(turn.prompt)
    except Exception as error:
        return error


async def _attempt_async(
    one: Callable[[Prompt], Awaitable[Answer]], turn: _Turn
) -> tuple[_Turn, Answer | Exception]:
    try:
        return turn, await one(turn.prompt)
    except Exception as error:
        return turn, error


_Jobs = SimpleQueue[tuple[_Turn, Context] | None]
_Results = SimpleQueue[tuple[_Turn, Answer | BaseException]]


def _ask_in_threads(run: _Run, one: Callable[[Prompt], Answer], paid: Context) -> None:
    """Carry a run out in as many threads as it needs at once; none of them outlives it.

    They are no pool, for a pool's threads cannot close their connections when they end.
    """
    jobs: _Jobs = SimpleQueue()
    results: _Results = SimpleQueue()
    threads: list[threading.Thread] = []
    try:
        while True:
            while (turn := run.next()) is not None:
                if len(threads) < run.running:
                    thread = threading.Thread(target=_work, args=(one, jobs, results))
                    thread.start()
                    threads.append(thread)
                jobs.put((turn, paid.copy()))
            if not run.running:
                return
            run.take(*results.get())
    finally:
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join()


def _work(one: Callable[[Prompt], Answer], jobs: _Jobs, results: _Results) -> None:
    """Do one job after the other, until there are no more."""
    try:
        while (job := jobs.get()) is not None:
            turn, context = job
            result: Answer | BaseException
            try:
                result = context.run(_attempt, one, turn)
            except BaseException as error:  # nobody else would hear of it, and the caller waits
                result = error
            results.put((turn, result))
    finally:
        connections.close_all()


async def _ask_in_tasks(
    run: _Run, one: Callable[[Prompt], Awaitable[Answer]], paid: Context
) -> None:
    """Carry a run out in tasks. The group ends with all of them, whatever happens."""
    tasks: set[asyncio.Task[tuple[_Turn, Answer | Exception]]] = set()
    async with asyncio.TaskGroup() as group:
        while True:
            while (turn := run.next()) is not None:
                attempt = _attempt_async(one, turn)
                tasks.add(group.create_task(attempt, context=paid.copy()))
            if not tasks:
                return
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                run.take(*task.result())
