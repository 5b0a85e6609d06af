from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.cache import BaseCache, caches
from django.core.cache.backends.locmem import LocMemCache

from ai_budget.savings.prompt_account import Account

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")


class CountsNoLower(LocMemCache):
    """Counts as memcached does: never below zero."""

    def incr(self, key: Any, delta: int = 1, version: Any = None) -> int:
        left = max(0, super().incr(key, delta, version))
        self.set(key, left, None, version=version)
        return left


BACKENDS = {
    "locmem": "django.core.cache.backends.locmem.LocMemCache",
    "redis": "django.core.cache.backends.redis.RedisCache",
    "django-redis": "django_redis.cache.RedisCache",
}


def redis_answers() -> bool:
    import redis

    try:
        redis.Redis.from_url(REDIS).ping()
    except redis.RedisError:
        return False
    return True


@pytest.fixture(params=BACKENDS)
def cache(request: pytest.FixtureRequest, settings: Any) -> Iterator[BaseCache]:
    if "redis" in request.param and not redis_answers():
        pytest.skip("Redis does not answer")
    prefix = f"test-{uuid.uuid4().hex}"
    location = REDIS if "redis" in request.param else prefix
    settings.CACHES = {
        "default": {
            "BACKEND": BACKENDS[request.param],
            "LOCATION": location,
            "KEY_PREFIX": prefix,
        }
    }
    found = caches["default"]
    yield found
    found.delete(Account(found, "chat").key)


def balance(account: Account, cache: BaseCache) -> int:
    return account.balance(cache.get(account.key))


def test_a_new_account_has_nothing_to_take(cache: BaseCache) -> None:
    account = Account(cache, "chat")
    assert not account.take(1)
    assert balance(account, cache) == 0


def test_what_was_given_can_be_taken_once(cache: BaseCache) -> None:
    account = Account(cache, "chat")
    account.give(100)
    assert account.take(60)
    assert not account.take(60)
    assert account.take(40)
    assert balance(account, cache) == 0


def test_an_account_that_is_lost_begins_again_at_nothing(cache: BaseCache) -> None:
    account = Account(cache, "chat")
    account.give(100)
    cache.delete(account.key)
    assert not account.take(1)
    account.give(5)
    assert balance(account, cache) == 5


def test_a_write_that_cost_more_than_was_taken_for_it_is_paid_off_first(cache: BaseCache) -> None:
    account = Account(cache, "chat")
    account.give(-30)
    account.give(20)
    assert not account.take(1)
    account.give(11)
    assert account.take(1)


def test_a_cache_that_counts_no_lower_than_zero_is_not_overdrawn() -> None:
    cache = CountsNoLower(uuid.uuid4().hex, {})
    account = Account(cache, "chat")
    account.give(10)
    assert not account.take(11)
    assert balance(account, cache) == 10


def test_features_have_accounts_of_their_own(cache: BaseCache) -> None:
    Account(cache, "chat").give(10)
    assert not Account(cache, "mail").take(1)


def test_small_amounts_are_exact_beside_large_ones(cache: BaseCache) -> None:
    account = Account(cache, "chat")
    account.give(10**15)  # a million dollars
    assert account.take(10**15 - 1)
    assert account.take(1)
    assert not account.take(1)


@pytest.mark.contention
def test_many_threads_together_take_no_more_than_there_is(cache: BaseCache) -> None:
    Account(cache, "chat").give(1_000)
    taken: list[int] = []
    gate = threading.Barrier(8)

    def work(number: int) -> None:
        own = caches["default"]
        account = Account(own, "chat")
        gate.wait()
        for turn in range(100):
            amount = 7 + (number + turn) % 5
            if account.take(amount):
                taken.append(amount)
                if turn % 3 == 0:  # some of it comes back
                    account.give(amount - 1)
                    taken.append(1 - amount)
        own.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = balance(Account(cache, "chat"), cache)
    assert left == 1_000 - sum(taken)
    assert left >= 0
    assert left < 12  # and what there is can be taken
