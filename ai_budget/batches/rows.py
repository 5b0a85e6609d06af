"""The rows of batches, as all their verbs find and change them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from django.db import connections
from django.db.models import QuerySet

from ai_budget.conf import conf
from ai_budget.guard.batch.rows import LEASE, ROWS_AT_ONCE
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import retry
from ai_budget.models import Batch, BatchItem, BatchSubmission


class NotMine(Exception):
    """Somebody else has it by now. Whoever notices leaves it to them."""


def submissions() -> QuerySet[BatchSubmission]:
    return BatchSubmission.objects.using(conf.LEDGER_DATABASE).select_related("batch")


def update(submission: BatchSubmission, **values: Any) -> None:
    """Write some of a submission's columns, while it is one's own. Raises ``NotMine``."""
    alias = conf.LEDGER_DATABASE
    mine = BatchSubmission.objects.using(alias).filter(
        pk=submission.pk, next_look_at=submission.next_look_at
    )
    if not retry(connections[alias], partial(mine.update, **values)):
        raise NotMine
    for name, value in values.items():
        setattr(submission, name, value)


def stay(submission: BatchSubmission) -> None:
    """Keep a submission to oneself for longer. Raises ``NotMine``."""
    update(submission, next_look_at=ledgers.current().now() + LEASE)


def fresh(batch: Batch) -> Batch:
    alias = conf.LEDGER_DATABASE
    rows = Batch.objects.using(alias)
    return retry(connections[alias], partial(rows.get, pk=batch.pk))


def in_order(items: QuerySet[BatchItem]) -> Iterator[list[BatchItem]]:
    """Yield items of a batch in their order, some at a time, however many there are."""
    after = -1
    while some := list(items.filter(position__gt=after).order_by("position")[:ROWS_AT_ONCE]):
        yield some
        after = some[-1].position
