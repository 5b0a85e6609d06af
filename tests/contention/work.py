"""What tests have workers do besides calls: each is one verb, done as a worker would."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import date, datetime
from typing import Any

import anthropic
import httpx2
import redis
from django.db import connections

import ai_budget
from ai_budget.exceptions import LedgerUnavailable, LimitReached, RateLimited
from ai_budget.ledger import base as ledgers
from ai_budget.values import BalanceKey, Balances, Bucket, Reservation, Settlement
from tests.contention import books, calls, points

QUESTION: Any = {
    "model": "claude-haiku-5-5",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Hello"}],
}


def try_to_reserve(wish: calls.Wish) -> bool:
    """Reserve; False where a limit said no."""
    try:
        calls.reserve(wish)
    except LimitReached:
        return False
    return True


def settle(reservation: Reservation, settlement: Settlement) -> None:
    ledgers.current().settle(reservation, settlement)


def pass_for(seconds: float, bucket: Bucket) -> tuple[int, float, float]:
    """Take from a bucket as often as it lets; return how often, and from when until when."""
    passed, began = 0, time.monotonic()
    ledger = ledgers.current()
    while time.monotonic() < began + seconds:
        with suppress(RateLimited):
            ledger.take([bucket], at=ledger.now())
            passed += 1
    return passed, began, time.monotonic()


def pass_times(times: int, bucket: Bucket) -> int:
    """Try to take from a bucket so many times; return how often it let."""
    passed = 0
    for _ in range(times):
        with suppress(RateLimited):
            ledgers.current().take([bucket], at=ledgers.current().now())
            passed += 1
    return passed


def tick(at: datetime) -> None:
    books.tick(at)


def rebuild(since: date) -> None:
    ledgers.current().rebuild(since)


def differences(since: date) -> None:
    ledgers.current().differences(since)


def balances(keys: Iterable[BalanceKey]) -> Mapping[BalanceKey, Balances]:
    """Look, which fills what is missing."""
    return ledgers.current().balances(keys)


def lose_everything_and_look(url: str, keys: Iterable[BalanceKey]) -> None:
    """Have Redis forget, and its balances filled anew."""
    flush(url)
    balances(keys)


def lose_everything_and_reserve(url: str, wish: calls.Wish) -> bool:
    """Have Redis forget, and be the first to take from what is filled anew."""
    flush(url)
    return try_to_reserve(wish)


def lose_windows_and_reserve(url: str, wish: calls.Wish) -> bool:
    """Have Redis evict its windows, but no bucket, and reserve."""
    with redis.Redis.from_url(url) as client:
        for pattern in ("*:day:*", "*:month:*"):
            for key in client.scan_iter(match=pattern):
                client.delete(key)
    return try_to_reserve(wish)


def flush(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()


def call_claude(feature: str, stream: bool = False) -> bool:
    """Make a call over HTTP; False where it was not made."""
    client = ai_budget.client(feature=feature, max_retries=0, timeout=5)
    try:
        if stream:
            with client.messages.stream(**QUESTION) as answer:
                answer.until_done()
        else:
            client.messages.create(**QUESTION)
    except (LimitReached, LedgerUnavailable, anthropic.APIConnectionError):
        return False
    finally:
        client.close()
    return True


def converse(count: int, seed: int) -> int:
    """Make calls of several callers, some of them streams; return how many were refused."""
    chance, refused = random.Random(seed), 0
    for _ in range(count):
        feature, user = chance.choice(["chat", "chat", "mail"]), chance.choice([None, 7, 8])
        with ai_budget.charge(feature=feature, user=user):
            refused += ask_claude(stream=chance.random() < 0.4)
    return refused


def ask_claude(*, stream: bool) -> bool:
    """Ask, and say whether it was refused; whatever else may happen has happened."""
    client = ai_budget.client(max_retries=1, timeout=5)
    try:
        if stream:
            with client.messages.stream(**QUESTION) as answer:
                answer.until_done()
        else:
            client.messages.create(**QUESTION)
    except LimitReached:
        return True
    except (anthropic.AnthropicError, httpx2.HTTPError):
        return False
    return False


# Until a point -----------------------------------------------------------------------------------


def die_at(point: int, verb: Callable[..., object], *arguments: Any) -> points.Ended:
    """Have a process do it that is killed at that point."""
    _hang_up()
    return points.end_by(point, signal.SIGKILL, lambda: verb(*arguments))


def stop_at(point: int, verb: Callable[..., object], *arguments: Any) -> points.Ended:
    """Have a process do it that stops at that point, until ``points.go_on``."""
    _hang_up()
    return points.end_by(point, signal.SIGSTOP, lambda: verb(*arguments))


def stop_before_redis(point: int, verb: Callable[..., object], *arguments: Any) -> points.Ended:
    """Have a process do it that stops before a command to Redis, until ``points.go_on``."""
    _hang_up()
    return points.end_by(
        point, signal.SIGSTOP, lambda: verb(*arguments), counting=points.BeforeRedis
    )


def sleep_at(point: int, verb: Callable[..., object], *arguments: Any) -> points.Ended:
    """Have a process do it that sleeps at that point; when it goes on it is hours later."""
    _hang_up()
    return points.end_by(point, signal.SIGSTOP, lambda: verb(*arguments), points.wake_up_later)


def suspend_at(point: int, verb: Callable[..., object], *arguments: Any) -> points.Ended:
    """The same, with a machine that sleeps: its monotonic clock does, too."""
    _hang_up()
    wake_up = points.wake_up_with_the_machine
    return points.end_by(point, signal.SIGSTOP, lambda: verb(*arguments), wake_up)


def start(verb: Callable[..., object], *arguments: Any) -> int:
    """Have a process do it, that ``points.kill`` may end anywhere."""
    _hang_up()
    return points.start(lambda: verb(*arguments))


def _hang_up() -> None:
    """Leave no connection to a child, that would speak over its parent's."""
    connections.close_all()


def sums_made_by(keys: Iterable[BalanceKey]) -> int:
    """Look at balances; return how many times the journal was added up for it."""
    made = 0

    def count(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        nonlocal made
        made += "SUM(" in sql
        return execute(sql, *rest)

    with connections["default"].execute_wrapper(count):
        balances(keys)
    return made
