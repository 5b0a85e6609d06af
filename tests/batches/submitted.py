"""What tests look up after a submission: its rows, what would be sent, and what it holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import ai_budget
from ai_budget import batches
from ai_budget.conf import conf
from ai_budget.ledger import base as ledgers
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog, CallText
from ai_budget.pricing.bound import bound
from ai_budget.pricing.rates import resolve
from ai_budget.testing import AnthropicSimulator
from ai_budget.values import Difference
from tests.guard.books import rows, site

FEATURE = "nightly"
HAIKU, SONNET, OPUS = "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"


def submit(requests: Any, **options: Any) -> Batch:
    given = {"feature": FEATURE, "max_tokens": 100, **options}
    batch: Batch = ai_budget.submit_batch(requests, **given)
    return batch


def items(batch: Batch) -> list[BatchItem]:
    """The items of a batch, in their order."""
    return list(BatchItem.objects.filter(batch=batch).order_by("position"))


def keys(batch: Batch) -> list[str]:
    return [item.key for item in items(batch)]


def statuses_of(batch: Batch) -> list[str]:
    return [item.status for item in items(batch)]


def to_be_sent(batch: Batch) -> list[dict[str, Any]]:
    """The parameters of every item as they are kept until they are sent."""
    texts = CallText.objects.in_bulk([item.call_id for item in items(batch)])
    return [json.loads(texts[item.call_id].request) for item in items(batch)]


def most(params: dict[str, Any]) -> int:
    """The most that one request can cost in a batch."""
    rates = resolve(params["model"])
    return bound(params, rates, batch=True, declared_geo=conf.INFERENCE_GEO).nanousd


def reservation(batch: Batch) -> CallLog:
    """The row that holds what the open items may cost."""
    return CallLog.objects.get(call_id=batch.call_id)


def assert_nothing_left(api: AnthropicSimulator) -> None:
    """Nothing was sent, nothing is held, nothing counts, and no row of a batch is there."""
    assert api.requests == []
    for model in (Batch, BatchSubmission, BatchItem, CallText):
        assert not model._default_manager.exists()
    assert all(row.status == CallLog.Status.RELEASED for row in rows())
    assert (site().spent_nanousd, site().held_nanousd, site().calls) == (0, 0, 0)
    since = ledgers.current().now().date() - timedelta(days=1)
    assert ledgers.current().differences(since) == []


def differences(batch: Batch) -> list[Difference]:
    """The balances since the batch was reserved that are not the sum of the journal."""
    assert batch.day is not None
    return ledgers.current().differences(batch.day)


def work_off(batch: Batch) -> Batch:
    """Send it, wait for it, and read its results, as the workers do; return it as it is then."""
    for _ in range(6):
        for submission in due_now(batch):
            batches.advance(submission)
    batches.tidy()
    batch.refresh_from_db()
    return batch


def due_now(batch: Batch) -> Iterable[int]:
    """Let the time pass until all that is not over of a batch is due."""
    open_ones = BatchSubmission.objects.filter(batch=batch, next_look_at__isnull=False)
    open_ones.update(next_look_at=ledgers.current().now())
    return list(open_ones.values_list("pk", flat=True))
