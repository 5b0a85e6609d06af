"""Whether the books are right: the journal, added up here, against what the ledger says."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, timedelta
from io import StringIO

from django.core.management import call_command

import ai_budget
from ai_budget import periods
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog
from ai_budget.periods import Period
from ai_budget.testing import AnthropicSimulator, freeze
from ai_budget.values import BalanceKey, Balances, Bucket, Limit, Status
from tests.ledger.given import sums_of_calls

LONG_AFTER = timedelta(hours=3)
"""Later than any deadline of these tests, and on the same day or the next."""


def journal() -> dict[BalanceKey, Balances]:
    """What every balance has to be, by the journal alone."""
    return {
        BalanceKey(scope, Period(period), date.fromisoformat(first_day)): Balances(
            spent_nanousd=spent, held_nanousd=held, calls=calls
        )
        for (scope, period, first_day), (spent, held, calls) in sums_of_calls().items()
    }


def kept(keys: Iterable[BalanceKey]) -> dict[BalanceKey, Balances]:
    """What the ledger says of them; empty balances are as good as none."""
    found = ledgers.current().balances(keys)
    return {
        key: Balances(spent_nanousd=it.spent_nanousd, held_nanousd=it.held_nanousd, calls=it.calls)
        for key, it in found.items()
        if it.taken_nanousd or it.spent_nanousd or it.calls
    }


def assert_books_agree(limits: Iterable[Limit | Bucket] = ()) -> None:
    """Every balance is the sum of its rows, and the ledger finds the same.

    Balances of ``limits`` are looked at too, though no row may count in them.
    """
    summed = journal()
    keys = {*summed, *(limit.key for limit in limits if isinstance(limit, Limit))}
    found = kept(keys)
    assert found == summed, {key: (found.get(key), summed.get(key)) for key in keys}
    if keys:
        since = min(key.first_day for key in keys)
        assert ledgers.current().differences(since) == []


def assert_all_over() -> None:
    """Nothing is held any more: not by the journal, and so not by the ledger either."""
    assert not CallLog.objects.filter(status=Status.RESERVED).exists()
    assert_books_agree()


def tick(at: datetime | None = None) -> None:
    """Do the periodic work, long after every deadline."""
    with freeze((at or periods.now()) + LONG_AFTER):
        call_command("ai_budget_tick", stdout=StringIO())


def booked(**which: object) -> int:
    """What these calls cost together, by the journal."""
    rows = CallLog.objects.filter(cost_nanousd__gt=0, **which)
    return sum(row.cost_nanousd or 0 for row in rows)


def bill(api: AnthropicSimulator) -> int:
    """What the provider charges for everything, in nano-dollars."""
    return sum(ai_budget.price(it.model, it.usage) for it in api.billed)
