"""What a person decides of a submission of which nobody knows whether the API took it."""

from __future__ import annotations

from functools import partial
from typing import Any

from django.db import connections

from ai_budget.batches.steps import advance, is_of
from ai_budget.conf import conf
from ai_budget.exceptions import AIBudgetError
from ai_budget.guard.batch import api
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.connection import retry
from ai_budget.models import BatchSubmission


def accept(submission: BatchSubmission, api_id: str) -> None:
    """Take a batch of the API for the submission: its results are booked as the submission's.

    Raises ``AIBudgetError`` where the API does not know it, where it is another submission's or
    has other items, as far as one can see, or where the submission is not uncertain.
    """
    alias = conf.LEDGER_DATABASE
    try:
        told = api.retrieve(api_id)
    except api.Unavailable as error:
        raise AIBudgetError(f"The API does not tell of {api_id!r}: {error.reason}.") from None
    if told.total != submission.items_count:
        raise AIBudgetError(
            f"{api_id!r} has {told.total} items and the submission {submission.items_count}."
        )
    known = BatchSubmission.objects.using(alias).filter(api_id=told.id)
    if told.id in known.values_list("api_id", flat=True):
        raise AIBudgetError(f"{api_id!r} belongs to another submission.")
    if told.ended and is_of(submission, told.id) is False:
        raise AIBudgetError(f"{api_id!r} has the results of other items.")
    _decide(submission, status=BatchSubmission.Status.SENT, api_id=told.id)


def send_again(submission: BatchSubmission) -> None:
    """Have the submission sent once more: the API never had it.

    If it did all the same, what that costs is not booked. Raises ``AIBudgetError`` where it is
    not uncertain.
    """
    _decide(submission, status=BatchSubmission.Status.WAITING, sent_at=None)


def release(submission: BatchSubmission) -> None:
    """Release what is held for the submission: the API never had it, and it is not wanted now.

    If it did all the same, what that costs is not booked. Raises ``AIBudgetError`` where it is
    not uncertain.
    """
    # What waits and is canceled is released, even if this process dies in the middle.
    waiting = BatchSubmission.Status.WAITING
    _decide(submission, status=waiting, sent_at=None, cancel_requested=True)
    advance(submission.pk)


def _decide(submission: BatchSubmission, **values: Any) -> None:
    """Write a decision, if there still is one to take."""
    alias = conf.LEDGER_DATABASE
    uncertain = BatchSubmission.objects.using(alias).filter(
        pk=submission.pk, status=BatchSubmission.Status.UNCERTAIN
    )
    values = {"tries": 0, "error": "", "next_look_at": ledgers.current().now(), **values}
    if not retry(connections[alias], partial(uncertain.update, **values)):
        raise AIBudgetError("The submission is not uncertain any more.")
