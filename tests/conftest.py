"""What the whole suite shares: where the package comes from, and what a missing browser means."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import django
import pytest
from asgiref.sync import sync_to_async
from django.db import connections
from hypothesis import settings as hypothesis_settings
from pytest_django import DjangoDbBlocker

import ai_budget
from ai_budget.conf import conf
from ai_budget.ledger import base as ledgers
from ai_budget.testing import AnthropicSimulator
from tests.run import chromium
from tests.settings import AI_BUDGET as GIVEN

pytest_plugins = ["ai_budget.testing.pytest_plugin"]

# A busy machine is no failure of the property under test.
hypothesis_settings.register_profile("suite", deadline=None)
hypothesis_settings.load_profile("suite")


def pytest_report_header() -> str:
    package = f"ai_budget {ai_budget.__version__} from {ai_budget.__path__[0]}"
    return f"{package}, Django {django.__version__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if chromium() is not None:
        return
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason="Chromium is not installed"))


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """Close what async tests left open in their thread: PostgreSQL drops no database in use."""
    yield
    with django_db_blocker.unblock():
        asyncio.run(sync_to_async(connections.close_all)())


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
def chromium_path() -> str:
    """The browser's executable, for ``playwright.chromium.launch(executable_path=...)``."""
    path = chromium()
    if path is None:
        pytest.skip("Chromium is not installed")
    return path
