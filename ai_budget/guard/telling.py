"""Telling listeners what became of a call, which none of them can change."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextvars import Context
from typing import Any

from django.dispatch import Signal

from ai_budget import signals
from ai_budget.guard.charge import outside_calls
from ai_budget.ledger import journal as journals
from ai_budget.models import CallLog
from ai_budget.values import (
    Amounts,
    Attempt,
    Charge,
    Kind,
    Part,
    Reservation,
    Settlement,
    Status,
)

log = logging.getLogger("ai_budget")


def tell(signal: Signal, *, sender: type[Any], **values: Any) -> None:
    """Tell who listens; a listener's mistake is logged and changes nothing.

    What a listener asks Claude itself is a call of its own.
    """
    with outside_calls():
        results = signal.send_robust(sender=sender, **values)
    for receiver, result in results:
        if isinstance(result, Exception):
            log.error("The receiver %r failed: %s", receiver, type(result).__name__)


def tell_settled(
    reservation: Reservation,
    settlement: Settlement,
    *,
    sender: type[Any],
    context: Context | None = None,
) -> None:
    """Tell of one booking, after it was made."""
    tell(
        signals.call_settled,
        sender=sender,
        reservation=reservation,
        settlement=settlement,
        context=context,
    )


def tell_recorded(
    attempt: Attempt, settlement: Settlement, *, sender: type[Any], context: Context | None = None
) -> None:
    """Tell of what was journaled without a reservation."""
    unreserved = Reservation(id=0, attempt=attempt, amounts=Amounts(nanousd=0), balances=())
    tell_settled(unreserved, settlement, sender=sender, context=context)


def tell_parts(reservation: int, parts: Iterable[Part], *, sender: type[Any]) -> None:
    """Tell of the items of a reservation that was made for many."""
    for part in parts:
        own = Reservation(
            id=reservation,
            attempt=part.attempt,
            amounts=Amounts(nanousd=part.held_nanousd),
            balances=(),
        )
        tell_settled(own, part.settlement, sender=sender)


def tell_row(row: CallLog) -> None:
    """Tell of a booking that was made for a worker which is not there any more."""
    attempt = Attempt(
        call_id=row.call_id,
        number=row.attempt,
        charge=Charge(
            feature=row.feature_id, user_id=row.user_id, subject=row.subject, tags=row.tags
        ),
        category=row.category,
        kind=Kind(row.kind),
        requested_model=row.requested_model,
        model=row.model,
        provider=row.provider,
        max_tokens=row.max_tokens,
        speed=row.speed,
        inference_geo=row.inference_geo,
        decision=row.decision,
        rates=row.rates,
        reserved_at=row.reserved_at,
        day=row.day,
        deadline=row.deadline,
        cache_checked=row.cache_checked,
    )
    reservation = Reservation(
        id=row.pk,
        attempt=attempt,
        amounts=Amounts(nanousd=row.reserved_nanousd, calls=row.counted),
        balances=tuple(journals.keys_of(row)),
    )
    settlement = Settlement(
        status=Status(row.status),
        cost_nanousd=row.cost_nanousd or 0,
        error=row.error,
        keep_call=row.status != Status.RELEASED,
    )
    tell_settled(reservation, settlement, sender=CallLog)
