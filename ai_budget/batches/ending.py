"""The end of batches: finished, given up, forgotten."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

from django.db import connections
from django.db.models import Exists, OuterRef, Q, QuerySet

from ai_budget import signals
from ai_budget.batches.handing import hand
from ai_budget.batches.rows import NotMine, fresh, in_order, submissions
from ai_budget.conf import conf
from ai_budget.guard.batch.results import book_overdue, close_items, expire_items
from ai_budget.guard.batch.rows import LEASE, ROWS_AT_ONCE, discard
from ai_budget.guard.telling import tell
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import retry
from ai_budget.ledger.journal import DEADLINE_PASSED
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallText

PREPARED_WITHIN = timedelta(hours=1)
"""After which a batch whose maker says nothing is given up; nothing of it was sent."""

HANDED_WITHIN = timedelta(hours=1)
"""For how long a callback that fails is called again before a batch is told of as finished."""


def tidy() -> None:
    """Finish what is over, give up what has passed its deadline, and forget texts that are old.

    What cannot be done holds nothing else up; the first of its errors is raised in the end.
    """
    now = ledgers.current().now()
    batches = Batch.objects.using(conf.LEDGER_DATABASE)
    unmade = Q(status=Batch.Status.PREPARING, touched_at__lt=now - PREPARED_WITHIN)
    still_open = batches.filter(status=Batch.Status.OPEN)
    worked_on = submissions().filter(batch=OuterRef("pk")).exclude(status=_DONE)
    untold = batches.filter(status=Batch.Status.FINISHED, told_at=None)
    failures: list[Exception] = []
    _for_each(batches.filter(unmade), discard, failures)
    overdue = still_open.filter(deadline__lt=now).exclude(Exists(_unseen()))
    _for_each(overdue, partial(_give_up, now=now), failures)
    _for_each(still_open.exclude(Exists(worked_on)), finish_if_over, failures)
    _for_each(untold, partial(_tell_again, now=now), failures)
    try:
        _forget_texts(now)
    except Exception as error:
        failures.append(error)
    if failures:
        raise failures[0]


_DONE = BatchSubmission.Status.DONE


def _unseen() -> QuerySet[BatchSubmission]:
    """Return submissions that nobody has looked after since the deadline of their batch.

    Where no worker ran for long their results may lie ready.
    """
    at_the_api = [
        BatchSubmission.Status.SENT,
        BatchSubmission.Status.CANCELING,
        BatchSubmission.Status.ENDED,
    ]
    return submissions().filter(
        batch=OuterRef("pk"), status__in=at_the_api, next_look_at__lt=OuterRef("deadline")
    )


def _for_each(
    batches: QuerySet[Batch], do: Callable[[Batch], object], failures: list[Exception]
) -> None:
    try:
        found: list[Batch] = retry(connections[conf.LEDGER_DATABASE], partial(list, batches))
        for batch in found:
            try:
                do(batch)
            except NotMine:
                continue
            except Exception as error:
                failures.append(error)
    except Exception as error:
        failures.append(error)


def finish_if_over(batch: Batch) -> None:
    """Finish a batch of which nothing is open any more, and tell of it."""
    alias = conf.LEDGER_DATABASE
    batch = fresh(batch)
    now = ledgers.current().now()
    given_up = batch.deadline is not None and now >= batch.deadline
    working = submissions().filter(batch=batch).exclude(status=_DONE)
    if batch.open or (not given_up and retry(connections[alias], working.exists)):
        return
    still_open = Batch.objects.using(alias).filter(pk=batch.pk, status=Batch.Status.OPEN)
    finished = {"status": Batch.Status.FINISHED, "finished_at": now, "touched_at": now}
    if retry(connections[alias], partial(still_open.update, **finished)):
        _tell_finished(fresh(batch))


# Telling


def _tell_again(batch: Batch, *, now: datetime) -> None:
    """Tell of a batch whose teller has died, or whose callback has failed: ever less often."""
    age = batch.touched_at - (batch.finished_at or batch.touched_at)
    if now >= batch.touched_at + max(LEASE, age):
        _touch(batch)
        _tell_finished(batch)


def _tell_finished(batch: Batch) -> None:
    """Hand on what came without a result of the API, and send the signal."""
    alias = conf.LEDGER_DATABASE
    trying = batch.touched_at < (batch.finished_at or batch.touched_at) + HANDED_WITHIN
    if batch.on_result and not _hand_rest(batch) and trying:
        return
    tell(signals.batch_finished, sender=Batch, batch=batch)
    if not conf.LOG_PROMPTS:
        hits = BatchItem.objects.using(alias).filter(batch=batch, status=BatchItem.Status.CACHED)
        for some in in_order(hits):
            CallText.objects.using(alias).filter(call_id__in=[it.call_id for it in some]).delete()
    told = Batch.objects.using(alias).filter(pk=batch.pk)
    retry(connections[alias], partial(told.update, told_at=ledgers.current().now()))


def _hand_rest(batch: Batch) -> bool:
    """Hand on what is over without a line of results; say whether the callback took it all."""
    alias = conf.LEDGER_DATABASE
    # What came with results was handed on, or tried often enough, as they were read.
    without = Q(submission=None) | Q(submission__ended_at=None) | Q(error=DEADLINE_PASSED)
    rest = BatchItem.objects.using(alias).filter(without, batch=batch, handed=False)
    taken = True
    for some in in_order(rest.exclude(status=BatchItem.Status.SUCCEEDED)):
        texts = CallText.objects.using(alias).in_bulk([item.call_id for item in some])
        messages = {
            item.pk: json.loads(texts[item.call_id].message)
            for item in some
            if item.call_id in texts and texts[item.call_id].message
        }
        taken = hand(batch, some, messages, keep=partial(_touch, batch)) and taken
        _touch(batch)
    return taken


def _touch(batch: Batch) -> None:
    """Keep telling of a batch to oneself. Raises ``NotMine``."""
    alias = conf.LEDGER_DATABASE
    now = ledgers.current().now()
    mine = Batch.objects.using(alias).filter(pk=batch.pk, touched_at=batch.touched_at, told_at=None)
    if not retry(connections[alias], partial(mine.update, touched_at=now)):
        raise NotMine
    batch.touched_at = now


# Giving up


def _give_up(batch: Batch, *, now: datetime) -> None:
    """Book what is open of a batch at its bound, for its deadline has passed.

    What was never sent is released. The API is asked to stop, and looked after for the truth.
    """
    rows = submissions().filter(batch=batch).exclude(status=_DONE)
    stop = partial(rows.update, cancel_requested=True, next_look_at=now)
    retry(connections[conf.LEDGER_DATABASE], stop)
    # From here on nobody sends one that waits.
    for submission in rows.filter(status=BatchSubmission.Status.WAITING):
        while close_items(submission, BatchItem.Status.EXPIRED, "not sent in time"):
            pass
    book_overdue(batch)
    expire_items(batch)
    finish_if_over(batch)


def _forget_texts(now: datetime) -> None:
    """Delete texts that are older than the settings keep them; not what is yet to be sent."""
    alias = conf.LEDGER_DATABASE
    old = now - timedelta(days=conf.LOG_PROMPTS_DAYS)
    texts = CallText.objects.using(alias)
    still_open = BatchItem.objects.filter(call_id=OuterRef("pk"), status=BatchItem.Status.OPEN)
    forgotten = texts.filter(kept_at__lt=old).exclude(Exists(still_open))

    def find() -> list[uuid.UUID]:
        return list(forgotten.values_list("pk", flat=True)[:ROWS_AT_ONCE])

    while ids := retry(connections[alias], find):
        retry(connections[alias], texts.filter(pk__in=ids).delete)
