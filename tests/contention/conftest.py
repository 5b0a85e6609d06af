"""Both ledgers on the run's database, a Redis of our own, and eight worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from django.db import connection

from ai_budget.testing import AnthropicSimulator
from tests.contention.processes import Worker, Workers
from tests.contention.redis_server import RedisServer
from tests.depth import DEEP

DATABASE, REDIS = (
    "ai_budget.ledger.database.DatabaseLedger",
    "ai_budget.ledger.redis.RedisLedger",
)

NO_API = {"API_KEY": "key", "BASE_URL": "http://127.0.0.1:9"}


@dataclass(frozen=True, kw_only=True)
class Store:
    """A ledger, as AI_BUDGET names it; ``redis`` is the server it keeps its balances in."""

    settings: dict[str, Any]
    redis: RedisServer | None = None

    @property
    def redis_url(self) -> str:
        assert self.redis is not None
        return self.redis.url

    def flush(self) -> None:
        if self.redis is not None:
            self.redis.flush()


@pytest.fixture
def redis_server(redis_process: RedisServer) -> Iterator[RedisServer]:
    """Redis, running and empty, and again so afterwards."""
    redis_process.make_ready()
    yield redis_process
    redis_process.make_ready()


# The ledger in Redis is the same whichever database keeps its journal: the deep suite tries all.
BOTH = DEEP or connection.vendor == "sqlite"


@pytest.fixture(params=["database", "redis"] if BOTH else ["database"])
def store(request: pytest.FixtureRequest, settings: Any) -> Store:
    """The ledger of the test, which is run once with each."""
    if request.param == "database":
        chosen = Store(settings={"LEDGER": DATABASE, **NO_API})
    else:
        chosen = _in_redis(request.getfixturevalue("redis_server"))
    settings.AI_BUDGET = dict(chosen.settings)
    return chosen


@pytest.fixture
def redis_store(settings: Any, redis_server: RedisServer) -> Store:
    """The ledger in Redis, for what can only happen to it."""
    chosen = _in_redis(redis_server)
    settings.AI_BUDGET = dict(chosen.settings)
    return chosen


def _in_redis(server: RedisServer) -> Store:
    return Store(settings={"LEDGER": REDIS, "LEDGER_REDIS_URL": server.url, **NO_API}, redis=server)


@pytest.fixture
def workers(request: pytest.FixtureRequest, worker_processes: list[Worker]) -> Workers:
    """Eight processes that use the test's ledger."""
    name = "redis_store" if "redis_store" in request.fixturenames else "store"
    store: Store = request.getfixturevalue(name)
    return Workers(worker_processes, store.settings)


@pytest.fixture
def api(anthropic_api_server: AnthropicSimulator, request: pytest.FixtureRequest) -> Any:
    """The local API, to which this test's calls go, its workers' too."""
    name = "redis_store" if "redis_store" in request.fixturenames else "store"
    store: Store = request.getfixturevalue(name)
    anthropic_api_server.reset()
    store.settings["BASE_URL"] = anthropic_api_server.base_url
    request.getfixturevalue("settings").AI_BUDGET = dict(store.settings)
    return anthropic_api_server
