"""Calls from end to end, with each ledger: real HTTP, the run's database, a Redis of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ai_budget import periods
from ai_budget.testing import AnthropicSimulator
from tests.contention.redis_server import RedisServer
from tests.whole.clocks import Clock
from tests.whole.workers import Elsewhere

LEDGERS = {
    "database": "ai_budget.ledger.database.DatabaseLedger",
    "redis": "ai_budget.ledger.redis.RedisLedger",
}


@pytest.fixture(params=list(LEDGERS))
def ledger_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What names the ledger of the test, which is run once with each."""
    chosen: dict[str, Any] = {"LEDGER": LEDGERS[request.param]}
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_process")
        server.make_ready()
        chosen["LEDGER_REDIS_URL"] = server.url
    return chosen


@pytest.fixture
def api(
    anthropic_api: AnthropicSimulator, ledger_settings: dict[str, Any], settings: Any
) -> AnthropicSimulator:
    """The local API, and the ledger of the test."""
    settings.AI_BUDGET = {**settings.AI_BUDGET, **ledger_settings}
    return anthropic_api


@pytest.fixture
def clock() -> Iterator[Clock]:
    """The budget's clock, which stands still until it is moved."""
    clock = Clock()
    with periods.override_clock(lambda: clock.at):
        yield clock


@pytest.fixture(scope="session")
def worker_process(django_db_setup: None) -> Iterator[Elsewhere]:
    worker = Elsewhere()
    yield worker
    worker.stop()
