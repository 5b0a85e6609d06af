"""What the whole suite shares: where the package comes from, and what a missing browser means."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import django
import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections, transaction
from django.test import SimpleTestCase, TransactionTestCase
from hypothesis import settings as hypothesis_settings
from pytest_django import DjangoDbBlocker
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

import ai_budget
from ai_budget.conf import conf
from ai_budget.ledger import base as ledgers
from ai_budget.testing import AnthropicSimulator
from tests.contention.processes import Worker, Workers
from tests.contention.redis_server import BINARY, RedisServer
from tests.depth import DEEP, deep
from tests.run import ONLY_DATABASE, chromium
from tests.settings import AI_BUDGET as GIVEN

pytest_plugins = ["ai_budget.testing.pytest_plugin"]

# A busy machine is no failure of the property under test.
hypothesis_settings.register_profile(
    "suite", deadline=None, max_examples=deep(200, else_=25), print_blob=True
)
hypothesis_settings.load_profile("suite")


# What a shell starts in the background ignores Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    package = f"ai_budget {ai_budget.__version__} from {ai_budget.__path__[0]}"
    return f"{package}, Django {django.__version__}"


DATABASE_FIXTURES = {"db", "transactional_db", "django_db_setup"}
"""Without one of these, a mark or a TestCase, pytest-django lets no test reach a database."""


def reaches_a_database(item: pytest.Item) -> bool:
    """Whether the test may; one of a TestCase is taken to do so."""
    cls = getattr(item, "cls", None)
    return (
        item.get_closest_marker("django_db") is not None
        or not DATABASE_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        or (cls is not None and issubclass(cls, SimpleTestCase))
    )


WORKERS, DEMO = "worker_processes", "first_demo"
"""Fixtures of a whole session that take seconds: eight processes, a month of spend."""

TOGETHER = {
    "tests/contention/": WORKERS,
    "tests/whole/test_changes.py": WORKERS,
    "tests/whole/test_single_flight.py": WORKERS,
    "tests/example/test_browser.py": DEMO,
    "tests/example/test_servers.py": DEMO,
}
"""Tests that share such a fixture run in one process, so that it is made once."""

SLOW = ("tests/example/", "tests/servers/", "tests/batches/test_celery.py", "tests/admin/")
"""What takes long for the number of its tests: begun early, so that none is left at the end."""


def run_together(nodeid: str) -> str | None:
    """Name what a test shares with others, if anything."""
    return next((shared for path, shared in TOGETHER.items() if nodeid.startswith(path)), None)


class SharingScheduler(LoadScopeScheduling):  # type: ignore[misc]
    """Gives files of tests to the processes of pytest-xdist, and those that share as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        return run_together(nodeid) or nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharingScheduler:
    config.option.loadscopereorder = False
    return SharingScheduler(config, log)


def turn(item: pytest.Item) -> int:
    """When a test is due: what takes longest in one piece goes first."""
    if run_together(item.nodeid):
        return 0
    return 1 if item.nodeid.startswith(SLOW) else 2


def pytest_collection_finish() -> None:
    """Spare the garbage collector seven thousand tests, which stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ONLY_DATABASE.items() <= os.environ.items():
        others = [item for item in items if not reaches_a_database(item)]
        items[:] = [item for item in items if reaches_a_database(item)]
        config.hook.pytest_deselected(items=others)
    if not DEEP:
        left = [item for item in items if item.get_closest_marker("deep")]
        items[:] = [item for item in items if not item.get_closest_marker("deep")]
        config.hook.pytest_deselected(items=left)
    items.sort(key=turn)
    for item in items:
        if item.get_closest_marker("browser") and chromium() is None:
            item.add_marker(pytest.mark.skip(reason="Chromium is not installed"))
        shared = {WORKERS, DEMO}.intersection(getattr(item, "fixturenames", ()))
        if shared and run_together(item.nodeid) not in shared:
            raise pytest.UsageError(f"{item.nodeid} shares {shared}: add its file to TOGETHER.")


def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> None:
    """Let no test ask for a database while it runs: it would be missing on all but SQLite."""
    if fixturedef.argname in {"db", "transactional_db"} and not reaches_a_database(request.node):
        pytest.fail(f"{request.node.nodeid} reaches a database: mark it with django_db")


@pytest.fixture(scope="session")
def django_db_modify_db_settings_xdist_suffix() -> None:
    """Leave the names of databases alone: ``tests.settings`` gives each worker one of its own."""


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """Close what async tests left open in their thread: PostgreSQL drops no database in use."""
    yield
    with django_db_blocker.unblock():
        asyncio.run(sync_to_async(connections.close_all)())


@pytest.fixture(scope="module", autouse=True)
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
def anthropic_api(anthropic_api: AnthropicSimulator, settings: Any) -> AnthropicSimulator:
    """The local API, with the ledger of this run: a site's tests have the database's."""
    chosen = {key: GIVEN[key] for key in ("LEDGER", "LEDGER_REDIS_URL") if key in GIVEN}
    settings.AI_BUDGET = {**settings.AI_BUDGET, **chosen}
    return anthropic_api


@pytest.fixture(autouse=True)
def empty_redis() -> Iterator[None]:
    """Forget the balances of the test before, as the database forgets its rows."""
    yield
    if conf.LEDGER.endswith("RedisLedger"):
        ledger: Any = ledgers.current()
        for key in ledger.client.scan_iter(match=f"{ledger.prefix}:*", count=1000):
            ledger.client.unlink(key)


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of the tests' own."""
    if BINARY is None:
        # Nothing here is safe in a Redis that others use: it is flushed, frozen and killed.
        if os.environ.get("CI") == "true":
            pytest.fail("redis-server is not installed")
        pytest.skip("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def worker_processes(django_db_setup: None) -> Iterator[list[Worker]]:
    """Eight processes, started once for all tests that need some."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: Worker(), range(Workers.COUNT)))
        list(pool.map(Worker.wait_until_ready, found))
        yield found
        list(pool.map(Worker.stop, found))


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The browser's executable, for ``playwright.chromium.launch(executable_path=...)``."""
    path = chromium()
    if path is None:
        pytest.skip("Chromium is not installed")
    return path
