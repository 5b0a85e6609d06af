"""Eight processes with guarded clients and one API, which keeps a bill of its own."""

from __future__ import annotations

import random
import threading
from decimal import Decimal
from typing import Any

import pytest

import ai_budget
from ai_budget import money
from ai_budget.models import CallLog, FeatureBudget, UserQuota
from ai_budget.testing import (
    AnthropicSimulator,
    CutBeforeResponse,
    CutStream,
    Fail,
    Reply,
    StreamError,
    TruncateCleanly,
)
from tests.contention import work
from tests.contention.books import assert_all_over, bill, booked, tick
from tests.contention.conftest import Store
from tests.contention.processes import Workers

pytestmark = [pytest.mark.contention, pytest.mark.django_db(transaction=True)]

LIMIT_USD = Decimal("0.0015")
CALLS = 12


class Whims:
    """An API that mostly answers: chosen by a seed, one step for each request that comes."""

    def __init__(self, seed: int) -> None:
        self._chance, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Any:
        with self._lock:
            chosen = self._chance.random()
            tokens = self._chance.randint(1, 64)
        reply = Reply(output_tokens=tokens)
        if chosen < 0.75:
            return reply
        return self._chance.choice(
            [
                Fail(status=529, retry_after=0.01),
                Fail(status=400),
                CutStream(after_events=4, reply=reply),
                CutBeforeResponse(billed=True),
                StreamError(after_events=4, reply=reply),
                TruncateCleanly(reply=reply),
            ]
        )


def test_the_bill_is_at_most_what_is_booked_which_is_at_most_the_limit(
    store: Store, workers: Workers, api: AnthropicSimulator
) -> None:
    FeatureBudget.objects.create(name="chat", daily_limit_usd=LIMIT_USD)
    FeatureBudget.objects.create(name="mail", monthly_limit_usd=LIMIT_USD / 2)
    UserQuota.objects.create(daily_calls=25)
    api.default = Whims(7)

    refused = sum(workers.do(work.converse, [(CALLS, seed) for seed in range(Workers.COUNT)]))

    api.wait_until_idle()
    tick()
    assert_all_over()
    assert refused > 0
    assert 0 < bill(api) <= booked()
    for name, limit in (("chat", LIMIT_USD), ("mail", LIMIT_USD / 2)):
        assert booked(feature=name) <= money.parse_usd(limit)
    # Nothing was sent that was not journaled first, and all that was billed is found by its id.
    paid = CallLog.objects.exclude(status="released")
    assert len([it for it in api.requests if it.path == "/v1/messages"]) == paid.count()
    costs = {it.request_id: ai_budget.price(it.model, it.usage) for it in api.billed}
    exact = paid.filter(status="settled", cost_nanousd__gt=0)
    assert exact.count() > 0
    for row in exact:
        assert row.cost_nanousd == costs[row.request_id], row.request_id
