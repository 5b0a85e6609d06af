"""Balances that are kept elsewhere, copied to SpendWindow: admin and reports read them there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import partial

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from ai_budget.ledger.connection import retry
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import SpendWindow
from ai_budget.periods import Period
from ai_budget.values import BalanceKey, Balances

log = logging.getLogger("ai_budget")


def mirror(
    connection: BaseDatabaseWrapper,
    period: Period,
    first_day: date,
    *,
    balances: Mapping[str, Balances],
    refused: Mapping[str, int],
    aside: SetAside,
) -> None:
    """Bring the rows of one day or month to these balances, and add refusals, by scope.

    A scope that has refusals alone keeps its balances as they are. One that no row can be
    written for is set ``aside``; the others are written.
    """
    rows = SpendWindow.objects.using(connection.alias)
    targets = ["key"] if connection.features.supports_update_conflicts_with_target else None

    def write(scopes: Sequence[str]) -> None:
        there = {row.scope: row for row in rows.filter(period=period, first_day=first_day)}
        changed = []
        for scope in scopes:
            row = there.get(scope) or SpendWindow(scope=scope, period=period, first_day=first_day)
            before = _state(row)
            if scope in balances:
                _put(row, balances[scope])
            row.refused += refused.get(scope, 0)
            if _state(row) != before:
                changed.append(row)
        with transaction.atomic(using=connection.alias):
            rows.bulk_create(
                changed,
                update_conflicts=True,
                update_fields=["spent_nanousd", "held_nanousd", "calls", "refused"],
                unique_fields=targets,
                batch_size=500,
            )

    scopes = sorted({*balances, *refused})
    aside.do_together(
        "the balance of", scopes, lambda some: retry(connection, partial(write, some))
    )


def mirrored(
    connection: BaseDatabaseWrapper, keys: Iterable[BalanceKey]
) -> dict[BalanceKey, Balances]:
    """Return balances as they were copied last; keys that were never copied are left out."""
    by_row = {SpendWindow.key_for(key.scope, key.period, key.first_day): key for key in keys}
    return {
        by_row[row.pk]: Balances(
            spent_nanousd=row.spent_nanousd,
            held_nanousd=row.held_nanousd,
            calls=row.calls,
            refused=row.refused,
        )
        for row in SpendWindow.objects.using(connection.alias).filter(pk__in=by_row)
    }


def _state(row: SpendWindow) -> tuple[int, int, int, int]:
    return row.spent_nanousd, row.held_nanousd, row.calls, row.refused


def _put(row: SpendWindow, balance: Balances) -> None:
    amounts = (balance.spent_nanousd, balance.held_nanousd, balance.calls)
    if min(amounts) < 0:
        log.error("The balance of %s is damaged: run ai_budget_rebuild.", row)
    row.spent_nanousd, row.held_nanousd, row.calls = (max(0, amount) for amount in amounts)
