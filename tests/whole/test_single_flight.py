"""Equal calls at once from eight processes: one is sent, and every one of them is answered."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
from django.core.management import call_command
from django.db import connection, connections
from django.test import override_settings

import ai_budget
from ai_budget import periods
from ai_budget.models import CallLog, FeatureBudget, UserQuota
from ai_budget.testing import AnthropicSimulator, Fail, Hang, Reply, freeze
from ai_budget.values import Status
from tests.contention.processes import Worker, Workers
from tests.contention.redis_server import RedisServer
from tests.factories import UserFactory
from tests.guard.books import assert_balanced, wait_until
from tests.processes import PATIENCE

pytestmark = pytest.mark.django_db(transaction=True)

with_one_ledger = pytest.mark.parametrize("ledger_settings", ["database"], indirect=True)

WORKERS = Workers.COUNT
HUNDRED = [13] * 4 + [12] * 4
FIFTY = [6] * 6 + [7] * 2
Ask = Mapping[str, Any]

# In the workers ----------------------------------------------------------------------------------


def ask_together(cache: str, times: int, lease: float, asked: Ask) -> list[str]:
    """Ask the same so many times at once; return what was said, or what was raised."""
    said: list[str] = []
    together = threading.Barrier(times)

    def ask() -> None:
        together.wait(PATIENCE)
        try:
            said.append(ai_budget.ask("Why?", max_tokens=20, **asked).text)
        except Exception as error:
            said.append(type(error).__name__)
        finally:
            connections.close_all()

    with in_redis(cache), mock.patch("ai_budget.guard.answers.SHORTEST_LEASE", lease):
        threads = [threading.Thread(target=ask) for _ in range(times)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    return said


def in_redis(url: str) -> override_settings:
    cache = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": url}
    return override_settings(CACHES={"default": cache})


# In the test -------------------------------------------------------------------------------------


class Crew:
    """Workers that ask one question, and find each other's answers in one Redis."""

    def __init__(self, workers: list[Worker], cache: str, settings: Mapping[str, Any]) -> None:
        self.workers = workers
        self._cache, self._settings = cache, dict(settings)

    def begin(self, shares: list[int], *, lease: float = 10, **asked: Any) -> None:
        """Let each ask as often as its share says; ``lease`` is what a claim lasts, in seconds."""
        self._busy = self.workers[: len(shares)]
        for worker, times in zip(self._busy, shares, strict=True):
            arguments = self._cache, times, lease, {"feature": "chat", **asked}
            worker.begin(ask_together, *arguments, settings=self._settings, at=None)

    def said(self) -> Counter[str]:
        """Return what was said and how often, once all are done."""
        return Counter(text for worker in self._busy for text in worker.result())

    def ask(self, shares: list[int], **asked: Any) -> Counter[str]:
        self.begin(shares, **asked)
        return self.said()


@pytest.fixture
def cache(redis_process: RedisServer, ledger_settings: dict[str, Any]) -> str:
    """The address of an empty cache, beside the ledger if that is in the same server."""
    redis_process.make_ready()
    return redis_process.url.replace("/0", "/1")


@pytest.fixture
def crew(
    worker_processes: list[Worker], cache: str, api: AnthropicSimulator, settings: Any
) -> Iterator[Crew]:
    yield Crew(worker_processes, cache, settings.AI_BUDGET)
    assert_balanced()


def statuses() -> Counter[str]:
    return Counter(CallLog.objects.values_list("status", flat=True))


def test_a_hundred_equal_calls_are_one_request(crew: Crew, api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.enqueue(Reply(text="Once.", delay=0.3))
    # A server of PostgreSQL takes a hundred connections, and each of these threads has its own.
    shares = FIFTY if connection.vendor == "postgresql" else HUNDRED

    said = crew.ask(shares)

    assert said == {"Once.": sum(shares)}
    assert len(api.requests) == len(api.billed) == 1
    assert statuses() == {Status.CACHED: sum(shares) - 1, Status.SETTLED: 1}


def test_calls_of_one_user_are_one_request(crew: Crew, api: AnthropicSimulator) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="private")
    api.enqueue(Reply(text="Once.", delay=0.3))

    said = crew.ask([3] * WORKERS, user=UserFactory.create().pk)

    assert said == {"Once.": 24}
    assert len(api.requests) == 1


def test_never_more_answers_are_counted_than_a_quota_has_calls(
    crew: Crew, api: AnthropicSimulator
) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared", cache_counts=True)
    UserQuota.objects.create(daily_calls=7)
    api.enqueue(Reply(text="Once.", delay=0.2))

    said = crew.ask([3] * WORKERS, user=UserFactory.create().pk)
    call_command("ai_budget_rebuild", "--check")
    call_command("ai_budget_tick")

    assert said == {"Once.": 7, "QuotaExceeded": 17}
    assert statuses() == {Status.CACHED: 6, Status.SETTLED: 1}
    assert sum(CallLog.objects.values_list("counted", flat=True)) == 7


@with_one_ledger
def test_where_whoever_asks_fails_and_tries_again_everybody_is_answered(
    crew: Crew, api: AnthropicSimulator
) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.enqueue(Fail(status=500, retry_after=0.01, delay=0.2), Reply(text="Second.", delay=0.1))

    said = crew.ask([2] * WORKERS)

    assert said == {"Second.": 16}
    assert len(api.requests) == 2


@with_one_ledger
def test_a_cache_that_is_emptied_meanwhile_costs_a_request_and_no_answer(
    crew: Crew, api: AnthropicSimulator, redis_process: RedisServer
) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.default = Reply(text="Still.", delay=0.5)
    crew.begin([2] * WORKERS)
    wait_until(lambda: api.requests)

    redis_process.flush()

    assert crew.said() == {"Still.": 16}
    assert len(api.requests) <= 2


@with_one_ledger
def test_where_the_worker_that_asks_is_killed_another_asks(
    crew: Crew, cache: str, api: AnthropicSimulator, settings: Any
) -> None:
    FeatureBudget.objects.create(name="chat", cache_scope="shared")
    api.enqueue(Hang(seconds=5), Reply(text="By another.", delay=0.1))
    doomed = Worker()
    doomed.wait_until_ready()
    alone = Crew([doomed], cache, settings.AI_BUDGET)
    alone.begin([1], lease=0.1)
    wait_until(lambda: api.requests)
    crew.begin([2] * WORKERS, lease=5)

    doomed.process.kill()
    said = crew.said()

    assert said == {"By another.": 16}
    assert len(api.requests) == 2
    with freeze(periods.now() + timedelta(hours=2)):
        call_command("ai_budget_tick")
