"""What tests look up after a call: the journal, the balances, and the provider's own bill."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from asgiref.sync import sync_to_async

import ai_budget
from ai_budget.models import CallLog, SpendWindow
from ai_budget.testing import AnthropicSimulator

P = ParamSpec("P")
T = TypeVar("T")

MODEL = "claude-haiku-5-5"
"""What calls use that do not care."""


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


def site() -> SpendWindow:
    """The whole site's balance of today."""
    return SpendWindow.objects.get(scope="*", period="day")


def balance(scope: str) -> SpendWindow:
    """A scope's balance of today."""
    return SpendWindow.objects.get(scope=scope, period="day")


def assert_balanced() -> None:
    """Nothing is held, and each balance is the sum of its rows in the journal."""
    journal = rows()
    assert all(row.status != CallLog.Status.RESERVED for row in journal)
    counted = sum(row.counted for row in journal if row.status != CallLog.Status.RELEASED)
    for window in SpendWindow.objects.filter(scope="*"):
        assert window.held_nanousd == 0
        assert window.spent_nanousd == sum(row.cost_nanousd or 0 for row in journal)
        assert window.calls == counted
    for window in SpendWindow.objects.filter(scope__startswith="feature:"):
        name = window.scope.removeprefix("feature:")
        mine = [row for row in journal if row.feature_id == name]
        assert window.held_nanousd == 0
        assert window.spent_nanousd == sum(row.cost_nanousd or 0 for row in mine)


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


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Look again and again until it is so. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.002)


async def in_db(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a look-up from an async test, in the thread that the ledger uses."""
    return await sync_to_async(step)(*args, **kwargs)
