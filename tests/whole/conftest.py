"""Calls from end to end, with each ledger: real HTTP, the run's database, a Redis of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from django.db import connection, transaction
from django.test import TransactionTestCase

from ai_budget import periods
from ai_budget.testing import AnthropicSimulator
from tests.contention.redis_server import BINARY, RedisServer
from tests.whole.clocks import Clock
from tests.whole.workers import Elsewhere

LEDGERS = {
    "database": "ai_budget.ledger.database.DatabaseLedger",
    "redis": "ai_budget.ledger.redis.RedisLedger",
}


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if BINARY is None:
        # It is flushed before each test, so it cannot be one that others use.
        if os.environ.get("CI") == "true":
            pytest.fail("redis-server is not installed")
        pytest.skip("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


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


@pytest.fixture(scope="module")
def emptied_row_by_row() -> Iterator[None]:
    """Delete what a test committed; the flush of a whole database takes longer than the tests."""
    with mock.patch.object(TransactionTestCase, "_fixture_teardown", delete_rows):
        yield


def delete_rows(case: TransactionTestCase) -> None:
    tables = set(connection.introspection.django_table_names(only_existing=True))
    with (
        transaction.atomic(),
        connection.constraint_checks_disabled(),
        connection.cursor() as cursor,
    ):
        for table in tables - KEPT_TABLES:
            cursor.execute(f"DELETE FROM {connection.ops.quote_name(table)}")  # noqa: S608


KEPT_TABLES = {"django_migrations", "django_content_type", "auth_permission"}
"""What migrations fill."""


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
