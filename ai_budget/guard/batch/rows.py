"""The rows of a batch, as everybody finds and changes them who has to do with it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import TypeVar

from django.db import connections

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.guard.telling import tell_row
from ai_budget.ledger import base as ledgers
from ai_budget.ledger import journal as journals
from ai_budget.ledger.base import Ledger
from ai_budget.ledger.connection import patient_transaction, retry
from ai_budget.models import Batch, BatchItem, CallLog, CallText
from ai_budget.values import Attempt, Charge, Kind, Settlement, Status

Value = TypeVar("Value")

ROWS_AT_ONCE = 1_000

LEASE = timedelta(minutes=5)
"""How long a worker that says nothing keeps a submission to itself."""


def chunks(values: Iterable[Value], size: int) -> Iterator[list[Value]]:
    """Yield the values in lists of at most so many."""
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some


def attempt_of(
    item: BatchItem,
    batch: Batch,
    *,
    charge: Charge,
    at: datetime,
    rates: str,
    cache_checked: bool = False,
) -> Attempt:
    """Return what the journal records of an item that is over."""
    return Attempt(
        call_id=item.call_id,
        number=0,
        charge=charge,
        category=batch.category,
        kind=Kind.BATCH,
        requested_model=item.requested_model,
        model=item.model,
        provider="anthropic",
        max_tokens=item.max_tokens,
        speed="",
        inference_geo=item.inference_geo,
        decision=item.decision,
        rates=rates,
        reserved_at=at,
        day=batch.day or periods.day(at, conf.TIME_ZONE).first_day,
        deadline=batch.deadline or at,
        cache_checked=cache_checked,
    )


def of_key(idempotency_key: str, charge: Charge) -> Batch | None:
    """Return the batch that was submitted with a key.

    Raises ``ValueError`` where it was submitted for somebody else, or with a key that is only
    taken for the same.
    """
    alias = conf.LEDGER_DATABASE
    rows = Batch.objects.using(alias).filter(idempotency_key=idempotency_key)
    found = retry(connections[alias], rows.first)
    if found is None:
        return None
    payer = (found.feature_id, found.user_id, found.subject)
    theirs = payer != (charge.feature, charge.user_id, charge.subject)
    if theirs or found.idempotency_key != idempotency_key:
        raise ValueError(
            "The idempotency key was used for a batch of another feature, user or subject."
        )
    return found


def reservation_row(batch: Batch) -> CallLog | None:
    """Return the row that holds what the open items of a batch may cost."""
    alias = conf.LEDGER_DATABASE
    rows = CallLog.objects.using(alias).filter(call_id=batch.call_id).order_by("pk")
    return retry(connections[alias], rows.first)


def release(ledger: Ledger, row: int) -> None:
    """Give back all that a reservation still holds: nothing of it was sent."""
    alias = conf.LEDGER_DATABASE
    # The tick may have booked it for being late.
    taken = [Status.RESERVED, Status.ESTIMATED]
    held = CallLog.objects.using(alias).filter(pk=row, status__in=taken)
    found = retry(connections[alias], held.first)
    if found is not None:
        unsent = Settlement(
            status=Status.RELEASED, cost_nanousd=0, keep_call=False, error="not sent"
        )
        ledger.release(journals.reservation_of(found), unsent)
        # As it is booked by now: somebody else may have been faster.
        rows = CallLog.objects.using(alias).filter(pk=row, status=Status.RELEASED)
        released = retry(connections[alias], rows.first)
        if released is not None:
            tell_row(released)


def discard(batch: Batch) -> None:
    """Give back what a batch holds that was never opened, and delete it.

    One that was opened after all is left as it is. Called again it does what was left to do.
    """
    ledger, alias = ledgers.current(), conf.LEDGER_DATABASE
    preparing = Batch.objects.using(alias).filter(pk=batch.pk, status=Batch.Status.PREPARING)
    # From here on nobody opens it any more.
    end = partial(preparing.update, finished_at=ledger.now())
    if not retry(connections[alias], end):
        return
    row = reservation_row(batch)
    if row is not None:
        release(ledger, row.pk)
    delete(batch)


def delete(batch: Batch) -> None:
    """Delete a batch that was never sent, with its items and their texts."""
    alias = conf.LEDGER_DATABASE
    items = BatchItem.objects.using(alias).filter(batch=batch)

    def find() -> list[tuple[int, uuid.UUID]]:
        return list(items.values_list("pk", "call_id")[:ROWS_AT_ONCE])

    def drop(some: Sequence[tuple[int, uuid.UUID]]) -> None:
        with patient_transaction(connections[alias]):
            calls = [call for _, call in some]
            CallText.objects.using(alias).filter(call_id__in=calls).delete()
            items.filter(pk__in=[pk for pk, _ in some]).delete()

    while some := retry(connections[alias], find):
        retry(connections[alias], partial(drop, some))
    # Its submissions go with it.
    retry(connections[alias], Batch.objects.using(alias).filter(pk=batch.pk).delete)
