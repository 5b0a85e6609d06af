"""What a worker does with a submission: one step at a time, each of which may be its last.

A submission belongs to whoever has moved ``next_look_at`` on; if nothing is heard of them until
then it is somebody else's, and what they still write of it is dropped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from django.db import connections

from ai_budget.batches.ending import finish_if_over
from ai_budget.batches.handing import hand_results
from ai_budget.batches.rows import NotMine, in_order, stay, submissions, update
from ai_budget.conf import conf
from ai_budget.exceptions import FeatureDisabled, LedgerUnavailable
from ai_budget.guard.batch import api
from ai_budget.guard.batch.results import charge_of, close_items, settle_results
from ai_budget.guard.batch.rows import LEASE, ROWS_AT_ONCE
from ai_budget.guard.rules import read_rules
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import patient_transaction, retry
from ai_budget.models import BatchItem, BatchSubmission, CallText
from ai_budget.policy.limits import ensure_enabled

log = logging.getLogger("ai_budget")

SEND_WITHIN = timedelta(hours=23)
"""After which a submission is not sent any more: it would outlive its reservation."""

NEVER_TAKEN_AFTER = timedelta(hours=26)
"""After which a submission that the API does not show among its own was never taken."""

LATE_LOOK = timedelta(hours=6)
"""How often a batch that was given up is still looked for."""

RESULTS_KEPT = timedelta(days=29)
"""How long the API keeps results."""

CLOCKS_APART = timedelta(hours=1)
"""How far the API's clock and ours may be apart."""

FIRST_LOOK = timedelta(seconds=10)
LONGEST_LOOK = timedelta(minutes=5)
"""How soon a submission is looked after again: often at first, then by its age."""

FIRST_RETRY = timedelta(seconds=30)
LONGEST_RETRY = timedelta(minutes=15)
"""How soon what failed is tried again; twice as long each time."""

MOST_TRIES = 8
"""How often a callback that fails is called again with the same results."""


def due(*, most: int = 100) -> list[int]:
    """Return the ids of submissions that wait for a step, the longest first."""
    now = ledgers.current().now()
    rows = submissions().filter(next_look_at__lte=now).order_by("next_look_at", "pk")
    found = rows.values_list("pk", flat=True)[:most]
    return retry(connections[conf.LEDGER_DATABASE], partial(list, found))


def advance(submission_id: int) -> None:
    """Take a submission one step further, if it is due and nobody else has it.

    Called again, by many at once, or after somebody died in it, it does what is left to do.
    Raises ``LedgerUnavailable``, and then it is due again after a while.
    """
    now = ledgers.current().now()
    submission = _claim(submission_id, now)
    if submission is None:
        return
    try:
        _take_further(submission, now)
        if submission.status == BatchSubmission.Status.DONE:
            finish_if_over(submission.batch)
    except NotMine:
        log.info("Submission %s of a batch was taken over.", submission)


def _take_further(submission: BatchSubmission, now: datetime) -> None:
    try:
        delay = _STEPS[submission.status](submission, now)
    except api.Unavailable as error:
        delay = _note_failure(submission, error.reason, now)
    if delay is None:
        update(submission, status=BatchSubmission.Status.DONE, next_look_at=None)
    else:
        update(submission, next_look_at=ledgers.current().now() + delay)


def _claim(submission_id: int, now: datetime) -> BatchSubmission | None:
    """Have a submission that is due to oneself for a while; None where somebody else has it."""
    connection = connections[conf.LEDGER_DATABASE]
    rows = submissions().filter(pk=submission_id, next_look_at__lte=now)
    if connection.features.has_select_for_update_skip_locked:
        rows = rows.select_for_update(skip_locked=True, of=_own_rows(connection))

    def claim() -> BatchSubmission | None:
        with patient_transaction(connection):
            found = rows.first()
            if found is None:
                return None
            same = BatchSubmission.objects.using(connection.alias).filter(
                pk=found.pk, next_look_at=found.next_look_at
            )
            found.next_look_at = now + LEASE
            # Where rows cannot be locked this decides between two that have both read it.
            return found if same.update(next_look_at=found.next_look_at) else None

    return retry(connection, claim)


def _own_rows(connection: Any) -> tuple[str, ...]:
    """Lock the submission and not its batch, where the database can tell them apart."""
    return ("self",) if connection.features.has_select_for_update_of else ()


def _note_failure(submission: BatchSubmission, reason: str, now: datetime) -> timedelta | None:
    """Note what went wrong with a submission, and return when to try again."""
    log.warning("Submission %s of a batch: %s", submission, reason)
    again = submission.error == reason[:64]
    tries = min(submission.tries + 1, 1_000) if again else 1
    update(submission, tries=tries, error=reason[:64])
    if _is_given_up(submission, now):
        return _late_look(submission, now)
    return min(LONGEST_RETRY, FIRST_RETRY * (1 << min(tries - 1, 10)))


def _note_success(submission: BatchSubmission) -> None:
    """Forget what had gone wrong before."""
    if submission.error:
        update(submission, tries=0, error="")


def _is_given_up(submission: BatchSubmission, now: datetime) -> bool:
    deadline = submission.batch.deadline
    return deadline is not None and now >= deadline


def _late_look(submission: BatchSubmission, now: datetime) -> timedelta | None:
    """Return when to look again for what was given up; None once the API keeps it no more."""
    over = submission.sent_at is None or now > submission.sent_at + RESULTS_KEPT
    return None if over else LATE_LOOK


def _pace(submission: BatchSubmission, now: datetime) -> timedelta | None:
    """Return when to look again for what goes on: soon for what was sent just now."""
    if _is_given_up(submission, now):
        return _late_look(submission, now)
    age = now - (submission.sent_at or now)
    return min(LONGEST_LOOK, max(FIRST_LOOK, age / 10))


def _release(submission: BatchSubmission, status: BatchItem.Status, error: str) -> None:
    """Give back what is held for all open items of a submission."""
    while close_items(submission, status, error):
        stay(submission)


# Sending


def _send(submission: BatchSubmission, now: datetime) -> timedelta | None:
    """Send a submission that waits."""
    reserved_at = submission.batch.reserved_at or submission.batch.created_at
    if now > reserved_at + SEND_WITHIN:
        _release(submission, BatchItem.Status.EXPIRED, "not sent in time")
        return None
    if submission.cancel_requested:
        _release(submission, BatchItem.Status.CANCELED, "")
        return None
    if not _is_enabled(submission, now):
        return _note_failure(submission, "the feature is paused", now)
    body = _body(submission)
    if body is None:
        return None
    if not _mark(submission):
        return timedelta()  # it was canceled meanwhile
    try:
        api_id = api.create(body)
    except api.Rejected as error:
        if not error.later:
            _record(submission, BatchSubmission.Status.ENDED, error=error.reason[:64])
            return _collect(submission, now)
        _record(submission, BatchSubmission.Status.WAITING, sent_at=None)
        delay = _note_failure(submission, error.reason, now)
        return max(delay or FIRST_RETRY, timedelta(seconds=error.retry_after))
    except api.Unheard as error:
        _record(submission, BatchSubmission.Status.UNCERTAIN)
        return _note_failure(submission, error.reason, now)
    _record(submission, BatchSubmission.Status.SENT, api_id=api_id, tries=0, error="")
    return FIRST_LOOK


def _is_enabled(submission: BatchSubmission, now: datetime) -> bool:
    """Say whether the budgets that pay for it let anything be sent just now."""
    try:
        ensure_enabled(read_rules(charge_of(submission.batch), at=now))
    except FeatureDisabled:
        return False
    return True


def _body(submission: BatchSubmission) -> bytes | None:
    """Return the JSON of what is open of a submission, put together from the texts as kept.

    None where nothing is.
    """
    alias = conf.LEDGER_DATABASE
    items = BatchItem.objects.using(alias).filter(
        submission=submission, status=BatchItem.Status.OPEN
    )
    parts: list[bytes] = []
    for some in in_order(items):
        texts = CallText.objects.using(alias).in_bulk([item.call_id for item in some])
        for item in some:
            head = json.dumps(item.custom_id)
            request = texts[item.call_id].request
            parts.append(f'{{"custom_id":{head},"params":{request}}}'.encode())
    return b'{"requests":[' + b",".join(parts) + b"]}" if parts else None


def _mark(submission: BatchSubmission) -> bool:
    """Write down that a submission is about to be sent; say whether it is still to be.

    Raises ``NotMine``: of two that want to send it only one does.
    """
    alias = conf.LEDGER_DATABASE
    at = ledgers.current().now()
    values = {
        "status": BatchSubmission.Status.SENDING,
        "sent_at": at,
        "next_look_at": at + LEASE,
    }
    mine = BatchSubmission.objects.using(alias).filter(
        pk=submission.pk,
        next_look_at=submission.next_look_at,
        status=BatchSubmission.Status.WAITING,
    )
    wanted = mine.filter(cancel_requested=False)
    if retry(connections[alias], partial(wanted.update, **values)):
        _set(submission, values)
        return True
    if retry(connections[alias], mine.exists):
        return False
    raise NotMine


def _record(submission: BatchSubmission, status: BatchSubmission.Status, **values: Any) -> None:
    """Write down what became of sending a submission.

    Whoever sent it knows best, though others may have taken it for lost meanwhile. Raises
    ``NotMine`` where somebody has decided about it.
    """
    alias = conf.LEDGER_DATABASE
    undecided = BatchSubmission.objects.using(alias).filter(
        pk=submission.pk,
        sent_at=submission.sent_at,
        api_id=None,
        status__in=[BatchSubmission.Status.SENDING, BatchSubmission.Status.UNCERTAIN],
    )
    values |= {"status": status, "next_look_at": ledgers.current().now() + LEASE}
    recorded = 0
    try:
        recorded = retry(connections[alias], partial(undecided.update, **values))
    finally:
        if not recorded and values.get("api_id"):
            log.error("The API has submission %s as %s.", submission, values["api_id"])
    if not recorded:
        raise NotMine
    _set(submission, values)


def _set(submission: BatchSubmission, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(submission, name, value)


# Submissions of which nobody heard


def _doubt(submission: BatchSubmission, now: datetime) -> timedelta | None:
    """Take over from a worker that sent a submission and never said what came of it."""
    update(submission, status=BatchSubmission.Status.UNCERTAIN, error="nobody heard the answer")
    return _find(submission, now)


def _find(submission: BatchSubmission, now: datetime) -> timedelta | None:
    """Look for an uncertain submission among the API's batches, known by its items' ids.

    Those show in the results, so once it has ended. It is never sent again.
    """
    sent_at = submission.sent_at or now
    may_be_there = False
    for batch in _candidates(submission, sent_at):
        found = is_of(submission, batch.id) if batch.ended else None
        if found:
            return _adopt(submission, batch.id)
        may_be_there = may_be_there or found is None
    if may_be_there:
        return _pace(submission, now)
    if now > sent_at + NEVER_TAKEN_AFTER and _was_sent_here(submission):
        # A list that shows it no more, a day after it would have ended, never had it.
        _release(submission, BatchItem.Status.EXPIRED, "never accepted")
        return None
    return _late_look(submission, now) if _is_given_up(submission, now) else LONGEST_RETRY


def _was_sent_here(submission: BatchSubmission) -> bool:
    """Say whether a worker sent it, with the key that lists are read with.

    A guarded client may have another one, whose batches no list here shows.
    """
    ours = f"{submission.batch.call_id.hex}-"
    items = BatchItem.objects.using(conf.LEDGER_DATABASE).filter(submission=submission)
    return items.filter(custom_id__startswith=ours).exists()


def _candidates(submission: BatchSubmission, sent_at: datetime) -> list[api.ApiBatch]:
    """Return the API's batches of its size and time that are no other submission's."""
    alike = [
        batch
        for batch in api.created_since(sent_at - CLOCKS_APART)
        if batch.total == submission.items_count and batch.created_at < sent_at + CLOCKS_APART
    ]
    known = BatchSubmission.objects.using(conf.LEDGER_DATABASE).filter(
        api_id__in=[batch.id for batch in alike]
    )
    theirs = set(known.values_list("api_id", flat=True))
    return [batch for batch in alike if batch.id not in theirs]


def is_of(submission: BatchSubmission, api_id: str) -> bool | None:
    """Say whether a batch's results are those of a submission's items; None if none can be read."""
    try:
        line = next(api.results(api_id), None)
    except api.Unavailable:
        line = None
    if line is None:
        return None
    custom_id = str(line.get("custom_id"))
    items = BatchItem.objects.using(conf.LEDGER_DATABASE).filter(submission=submission)
    return custom_id in items.filter(custom_id=custom_id).values_list("custom_id", flat=True)


def _adopt(submission: BatchSubmission, api_id: str) -> timedelta:
    """Take a batch of the API for an uncertain submission; return when to look after it."""
    taken = {"status": BatchSubmission.Status.SENT, "api_id": api_id, "tries": 0, "error": ""}
    try:
        update(submission, **taken)
    except LedgerUnavailable:
        # Another submission with the same ids may have it by now: a client's that was repeated.
        if BatchSubmission.objects.using(conf.LEDGER_DATABASE).filter(api_id=api_id).exists():
            raise NotMine from None
        raise
    return timedelta()


# Submissions that the API has


def _look(submission: BatchSubmission, now: datetime) -> timedelta | None:
    """Ask how a submission stands, and read its results once it has ended."""
    told = api.retrieve(str(submission.api_id))
    if told.ended:
        at = ledgers.current().now()
        update(submission, status=BatchSubmission.Status.ENDED, ended_at=at, tries=0, error="")
        return _collect(submission, now)
    if submission.cancel_requested and submission.status == BatchSubmission.Status.SENT:
        api.cancel(told.id)
        update(submission, status=BatchSubmission.Status.CANCELING)
    _note_success(submission)
    return _pace(submission, now)


def _collect(submission: BatchSubmission, now: datetime) -> timedelta | None:
    """Read the results of a submission that has ended, book them and hand them on."""
    if not submission.api_id:  # the API has refused it
        _release(submission, BatchItem.Status.ERRORED, submission.error)
        return None
    keep = partial(stay, submission)
    for lines in api.results_in_chunks(submission.api_id, ROWS_AT_ONCE):
        settle_results(submission, lines)
        hand_results(submission, lines, keep=keep)
        keep()
    items = BatchItem.objects.using(conf.LEDGER_DATABASE).filter(submission=submission)
    if items.filter(status=BatchItem.Status.OPEN).exists():
        # The API gives a result for every item; what is missing is booked by the deadline.
        return _note_failure(submission, "results are missing", now)
    if not submission.batch.on_result or not items.filter(handed=False).exists():
        return None
    delay = _note_failure(submission, "the callback failed", now)
    if submission.tries >= MOST_TRIES:
        log.error("The callback of batch %s has not taken all results.", submission.batch_id)
        return None
    return delay


_Step = Callable[[BatchSubmission, datetime], timedelta | None]

_STEPS: Mapping[str, _Step] = {
    BatchSubmission.Status.WAITING: _send,
    BatchSubmission.Status.SENDING: _doubt,
    BatchSubmission.Status.UNCERTAIN: _find,
    BatchSubmission.Status.SENT: _look,
    BatchSubmission.Status.CANCELING: _look,
    BatchSubmission.Status.ENDED: _collect,
    BatchSubmission.Status.DONE: lambda submission, now: None,
}
