"""Calls whose worker never came back: booked at their bound, for nobody knows what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from django.db import connections

from ai_budget.guard.telling import tell_row
from ai_budget.ledger import journal as journals
from ai_budget.ledger.base import Ledger
from ai_budget.ledger.connection import retry
from ai_budget.ledger.journal import DEADLINE_PASSED
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import CallLog
from ai_budget.values import Status

_ROWS_AT_ONCE = 1_000
"""No fewer than a ledger settles at once."""


def settle_overdue(ledger: Ledger, aside: SetAside | None = None) -> int:
    """Book reservations past their deadline at their bound, and tell of them; return how many.

    What will not settle is set ``aside``. Raises ``LedgerUnavailable`` if none will.
    """
    aside = aside or SetAside()
    find = partial(
        journals.overdue,
        ledger.alias,
        ledger.now(),
        most=_ROWS_AT_ONCE,
        leave=aside.keys("call"),
    )
    late = [row.pk for row in retry(connections[ledger.alias], find)]
    settled = ledger.settle_overdue(aside=aside)
    tell_overdue(ledger.alias, late)
    return settled


def tell_overdue(alias: str, late: Sequence[int]) -> None:
    """Tell of those rows that were booked at their bound, not of what somebody else booked."""
    if not late:
        return
    rows = CallLog.objects.using(alias).filter(
        pk__in=late, status=Status.ESTIMATED, error=DEADLINE_PASSED
    )
    for row in retry(connections[alias], lambda: list(rows)):
        tell_row(row)
