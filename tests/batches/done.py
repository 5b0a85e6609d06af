"""Batches that somebody else works on: what they were handed, and whether all of it is right."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import ai_budget
from ai_budget.batches import Result
from ai_budget.guard.batch.rows import LEASE
from ai_budget.ledger import base as ledgers
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog
from ai_budget.testing import AnthropicSimulator
from tests.contention.books import assert_all_over
from tests.settings import DB_NAME

FEATURE = "nightly"
PROMPTS = ["one", "two", "three", "four", "five"]

# Beside the database of the run, for whoever works on it.
_HANDED = Path(tempfile.gettempdir(), f"{Path(DB_NAME).name}.handed")


def note(result: Result) -> None:
    """Be a callback that leaves a line for each result, whichever process has it."""
    line = f"{result.key} {result.status} {result.text!r}\n".encode()
    handle = os.open(_HANDED, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def handed() -> Counter[str]:
    """How often each result was handed over, by its item's id."""
    lines = _HANDED.read_text().splitlines() if _HANDED.exists() else []
    return Counter(line.split()[0] for line in lines)


def forget_handed() -> None:
    _HANDED.unlink(missing_ok=True)


def submit(prompts: Sequence[str] = PROMPTS) -> Batch:
    batch: Batch = ai_budget.submit_batch(prompts, feature=FEATURE, on_result=f"{__name__}.note")
    return batch


def submission_of(batch: Batch) -> BatchSubmission:
    """Return the one submission of a batch, as it is now."""
    return BatchSubmission.objects.get(batch=batch)


def status_of(batch: Batch) -> str:
    return submission_of(batch).status


def is_finished(batch: Batch) -> bool:
    """Whether all of it is over and told."""
    batch.refresh_from_db()
    return batch.status == Batch.Status.FINISHED and batch.told_at is not None


def make_due() -> None:
    """Let the time pass until every lease is over, and everything waits to be looked at."""
    now = ledgers.current().now()
    BatchSubmission.objects.exclude(next_look_at=None).update(next_look_at=now)
    untold = Batch.objects.filter(status=Batch.Status.FINISHED, told_at=None)
    untold.update(touched_at=now - timedelta(hours=1))


def is_let_go(batch: Batch) -> bool:
    """Whether all of it was sent, and nobody is at work on it."""
    soon = ledgers.current().now() + LEASE / 2
    rows = BatchSubmission.objects.filter(batch=batch)
    return not rows.exclude(status=BatchSubmission.Status.SENT, next_look_at__lt=soon).exists()


def assert_done_once(batch: Batch, api: AnthropicSimulator) -> None:
    """Every item was sent once, is booked once at what it cost, and was handed over.

    Nothing is held any more, and the books agree.
    """
    batch.refresh_from_db()
    submissions = list(batch.submissions.all())
    assert {it.status for it in submissions} == {"done"}
    assert sorted(str(it.api_id) for it in submissions) == sorted(api.batches.ids)
    items = list(BatchItem.objects.filter(batch=batch))
    assert {it.status for it in items} == {"succeeded"}
    calls = CallLog.objects.exclude(call_id=batch.call_id)
    assert sorted(call.call_id for call in calls) == sorted(it.call_id for it in items)
    bill = sum(ai_budget.price(it.model, it.usage, batch=True) for it in api.billed)
    assert sum(call.cost_nanousd or 0 for call in calls) == bill == batch.spent_nanousd > 0
    assert (batch.total, batch.succeeded) == (len(items), len(items))
    assert batch.held_nanousd == 0
    assert set(handed()) == {it.key for it in items}
    assert_all_over()


def assert_never_sent(batch: Batch, api: AnthropicSimulator) -> None:
    """The API had none of it, nothing is booked, and nothing is held any more."""
    batch.refresh_from_db()
    assert api.batches.ids == []
    items = list(BatchItem.objects.filter(batch=batch))
    assert {it.status for it in items} == {"expired"}
    assert not CallLog.objects.exclude(call_id=batch.call_id).exists()
    assert (batch.held_nanousd, batch.spent_nanousd, batch.open) == (0, 0, 0)
    assert set(handed()) == {it.key for it in items}
    assert_all_over()
