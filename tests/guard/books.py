"""What tests look up after a call: the journal, the balances, and the provider's own bill."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.db.models import QuerySet

import ai_budget
from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, SpendWindow
from ai_budget.periods import Period, Window
from ai_budget.testing import AnthropicSimulator
from ai_budget.values import BalanceKey, Balances

P = ParamSpec("P")
T = TypeVar("T")

MODEL = "claude-haiku-5-5"
"""What calls use that do not care."""

QUESTION: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
}
"""A request that may be asked again."""


def rows() -> list[CallLog]:
    """Every attempt, in order."""
    return list(CallLog.objects.order_by("id"))


def only_row() -> CallLog:
    """The attempt, where there must be one."""
    (row,) = rows()
    return row


def statuses() -> list[str]:
    return [row.status for row in rows()]


def bill(api: AnthropicSimulator) -> list[int]:
    """What the provider charges for each answer, in nano-dollars."""
    return [ai_budget.price(billed.model, billed.usage) for billed in api.billed]


def ledger_of_the_run() -> type[ledgers.Ledger]:
    """The ledger that the suite runs on, for tests that hold one of its steps up or break it."""
    return type(ledgers.current())


def today() -> Window:
    """The day that it is for the ledger."""
    return periods.day(ledgers.current().now(), conf.TIME_ZONE)


def site() -> Balances:
    """The whole site's balance of today."""
    return balance("*")


def balance(scope: str) -> Balances:
    """A scope's balance of today, as the ledger has it: nothing where it was never counted in."""
    key = BalanceKey(scope, Period.DAY, today().first_day)
    return ledgers.current().balances([key]).get(key, Balances())


def windows() -> QuerySet[SpendWindow]:
    """The balances as reports read them, brought up to date where they are kept elsewhere."""
    ledgers.current().tidy()
    return SpendWindow.objects.all()


def refusals() -> dict[str, int]:
    """How many calls each scope was refused, all of them counted in days."""
    refused = windows().exclude(refused=0)
    assert {window.period for window in refused} <= {Period.DAY}
    return {window.scope: window.refused for window in refused}


def assert_balanced() -> None:
    """Nothing is held, and each balance is the sum of its rows in the journal."""
    journal = rows()
    assert all(row.status != CallLog.Status.RESERVED for row in journal)
    spent, calls = Counter[BalanceKey](), Counter[BalanceKey]()
    for row in journal:
        for key in counted_in(row):
            spent[key] += row.cost_nanousd or 0
            calls[key] += row.counted if row.status != CallLog.Status.RELEASED else 0
    kept = ledgers.current().balances(spent)
    assert {key: (it.spent_nanousd, it.held_nanousd, it.calls) for key, it in kept.items()} == {
        key: (spent[key], 0, calls[key]) for key in spent
    }
    since = min((row.day for row in journal), default=today().first_day)
    assert ledgers.current().differences(since) == []


def counted_in(row: CallLog) -> list[BalanceKey]:
    """The balances of the whole site and of the feature that an attempt counts in."""
    return [
        BalanceKey(scope, period, first)
        for scope in ("*", f"feature:{row.feature_id}")
        for period, first in ((Period.DAY, row.day), (Period.MONTH, row.day.replace(day=1)))
    ]


def assert_exact(api: AnthropicSimulator) -> CallLog:
    """One attempt was made, and is booked at what the provider charges."""
    row = only_row()
    assert row.status == CallLog.Status.SETTLED
    assert [row.cost_nanousd] == bill(api)
    assert 0 < (row.cost_nanousd or 0) <= row.reserved_nanousd
    assert_balanced()
    return row


def assert_at_bound() -> CallLog:
    """One attempt was made, and is booked at all that was reserved for it."""
    row = only_row()
    assert row.status == CallLog.Status.ESTIMATED
    assert row.cost_nanousd == row.reserved_nanousd > 0
    assert_balanced()
    return row


def assert_released() -> CallLog:
    """One attempt was made, never left, and cost neither money nor a call."""
    row = only_row()
    assert row.status == CallLog.Status.RELEASED
    assert row.cost_nanousd == 0
    assert_balanced()
    assert site().calls == 0
    return row


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Look again and again until it is so. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.002)


async def in_db(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a look-up from an async test, in the thread that the ledger uses."""
    return await sync_to_async(step)(*args, **kwargs)
