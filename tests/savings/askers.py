"""Processes that ask one question of one Redis, each with many threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 60.0
QUESTION = {"model": "claude-haiku-5-5", "messages": [{"role": "user", "content": "Why?"}]}


def django_redis(url: str, **options: Any) -> dict[str, Any]:
    cache = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": url, "KEY_PREFIX": "shop"}
    return {"default": {**cache, "OPTIONS": options}}


@contextmanager
def site(url: str) -> Iterator[None]:
    """Be a process of a site whose cache is there."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    import django
    from django.test import override_settings

    django.setup()
    with override_settings(CACHES=django_redis(url)):
        yield


def ask_together(url: str, threads: int, orders: Connection) -> None:
    """On a word, have all threads ask; report what each did and what it was told."""
    with site(url):
        start = threading.Barrier(threads + 1)
        told: list[tuple[str, str]] = []
        crew = [threading.Thread(target=_ask, args=(start, told)) for _ in range(threads)]
        for one in crew:
            one.start()
        orders.send("ready")
        orders.recv()
        start.wait(PATIENCE)
        for one in crew:
            one.join(PATIENCE)
        orders.send(told)


def _ask(start: threading.Barrier, told: list[tuple[str, str]]) -> None:
    from ai_budget import periods
    from ai_budget.savings.response_cache import Busy, Kept, claim, look_up, place_of

    place = place_of(QUESTION, scope="shared", feature="faq", owner=(), versions=(1,))
    assert place is not None
    start.wait(PATIENCE)
    at = periods.now()
    did = "found"
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        kept = look_up(place, at=at, ttl=600)
        if kept is not None:
            told.append((did, kept.message))
            return
        right = claim(place, at=at, seconds=60)
        if isinstance(right, Busy):
            did = "waited"
            time.sleep(0.005)
            continue
        told.append(("asked", f'"by {os.getpid()}"'))
        time.sleep(0.05)  # what the API takes, so that others do come meanwhile
        answer = Kept(message=f'"by {os.getpid()}"', cost_nanousd=1, model="m", kept_at=at)
        right.store(answer, seconds=600)
        return


def claim_and_hang(url: str, seconds: float, orders: Connection) -> None:
    """Take the right to ask, say so, and do nothing with it until killed."""
    from ai_budget import periods
    from ai_budget.savings.response_cache import claim, place_of

    with site(url):
        place = place_of(QUESTION, scope="shared", feature="faq", owner=(), versions=(1,))
        assert place is not None
        right = claim(place, at=periods.now(), seconds=seconds)
        orders.send(type(right).__name__)
        orders.recv()
