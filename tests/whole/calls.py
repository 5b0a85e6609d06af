"""Calls by every verb, what they came to, and whether the books are right afterwards."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

from asgiref.sync import async_to_sync

import ai_budget
from ai_budget.exceptions import AIBudgetError
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, SpendWindow
from ai_budget.periods import Period
from ai_budget.testing import Reply
from ai_budget.values import BalanceKey, Balances
from tests.ledger.given import sums_of_calls, sums_of_windows

HAIKU, SONNET, OPUS = "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"
TOKENS = 300
LONG = Reply(output_tokens=TOKENS)
"""An answer as long as it may be: into a limit that holds so many, no other fits."""


# Ways to call, each the whole of a call ---------------------------------------------------------


def ask(feature: str = "chat", **options: Any) -> None:
    ai_budget.ask("Hello", feature=feature, max_tokens=TOKENS, **options)


def stream(feature: str = "chat", **options: Any) -> None:
    with ai_budget.stream("Hello", feature=feature, max_tokens=TOKENS, **options) as answer:
        "".join(answer)


def guarded(feature: str = "chat", **options: Any) -> None:
    model = options.pop("model", HAIKU)
    messages: Any = [{"role": "user", "content": "Hello"}]
    client = ai_budget.client(feature=feature, **options)
    client.messages.create(model=model, max_tokens=TOKENS, messages=messages)


def aask(feature: str = "chat", **options: Any) -> None:
    async_to_sync(ai_budget.aask)("Hello", feature=feature, max_tokens=TOKENS, **options)


def astream(feature: str = "chat", **options: Any) -> None:
    async def read() -> None:
        streaming = ai_budget.astream("Hello", feature=feature, max_tokens=TOKENS, **options)
        async with streaming as answer:
            async for _ in answer:
                pass

    async_to_sync(read)()


WAYS: dict[str, Callable[..., None]] = {
    "ask": ask,
    "stream": stream,
    "guarded": guarded,
    "aask": aask,
    "astream": astream,
}


def outcome(feature: str = "chat", **options: Any) -> str:
    """Ask, and return what became of it: "answered", or the name of the refusal."""
    try:
        ask(feature, **options)
    except AIBudgetError as error:
        return type(error).__name__
    return "answered"


def most(feature: str = "chat", **options: Any) -> int:
    """What one call is reserved at, in nano-dollars."""
    estimate = ai_budget.estimate("Hello", feature=feature, max_tokens=TOKENS, **options)
    return estimate.most_nanousd


# The books ---------------------------------------------------------------------------------------


def last() -> CallLog:
    """The last attempt, in the order in which they were journaled."""
    return CallLog.objects.latest("id")


def balance(scope: str, first_day: date, period: Period = Period.DAY) -> Balances:
    """What the ledger holds in one window, without its count of refusals."""
    key = BalanceKey(scope, period, first_day)
    found = ledgers.current().balances([key]).get(key, Balances())
    return Balances(
        spent_nanousd=found.spent_nanousd, held_nanousd=found.held_nanousd, calls=found.calls
    )


def spent(cost: int | None, *, calls: int = 1) -> Balances:
    """A balance in which nothing is in flight."""
    return Balances(spent_nanousd=cost or 0, calls=calls)


def assert_books_agree(since: date | None = None) -> None:
    """Each balance is the sum of the journal, added up without the ledger's own arithmetic."""
    journal = sums_of_calls()
    kept = {
        (scope, period, first): balance(scope, date.fromisoformat(first), Period(period))
        for scope, period, first in journal
    }
    assert {
        name: (found.spent_nanousd, found.held_nanousd, found.calls) for name, found in kept.items()
    } == journal
    if not ledgers.current().needs_redis:
        assert sums_of_windows() == journal
    if since is not None:
        assert ledgers.current().differences(since) == []


def assert_nothing_happened() -> None:
    """No row was written, and no balance."""
    assert not CallLog.objects.exists()
    assert not SpendWindow.objects.exclude(calls=0, held_nanousd=0, spent_nanousd=0).exists()
    ledger: Any = ledgers.current()
    if ledger.needs_redis:
        assert list(ledger.client.scan_iter()) == []
