"""What keeping answers saves on a trace of queries, and what a lookup costs beside ``cache.get``.

    python -m benchmarks.lookups --trace FILE

The file is tab-separated, plain or gzip, with the columns ``Date``, ``Query``,
``IsImplicitIntent``, ``Country`` and ``PopularityScore`` (1 to 100), a row for each query of a
day and country. Two readings of it are replayed on a simulated clock, through the code that
answers calls, with Django's LocMem cache and room for all:

- "rows": every row is asked once, in the order of the file, evenly over its day;
- "weighted": every row is asked as often as its score, at random times of its day.

A question is an ``ask`` with the country in its system prompt and the query as its text. In
private scope it is of one of 1,000 users, of whom the n-th asks in proportion to 1/n. An answer
has 50 to 400 tokens of four bytes, drawn for each query, and costs what a model at $1 and $5 per
million tokens does. Whatever is random is drawn with a fixed seed.

A lookup is ``place_of`` and ``look_up``, of what the replay would find: "as asked" the last 1,000
of the weighted trace, with their repetitions; "all different" 3,000 that are not repeated, which
are more than a process remembers to have read. The bare get is ``django.core.cache.cache.get``
of the same stored values, in turn with the lookups; what is printed is the median of the rounds.
"""

from __future__ import annotations

import argparse
import csv
import gc
import gzip
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.stage import configure

SEED = 2026
USERS = 1000
DAY = 86_400
LOOKUPS, DIFFERENT = 1000, 3000
ROUNDS, TURN = 15, 25
MODEL = "claude-haiku-5-5"
INPUT_NANOUSD, OUTPUT_NANOUSD = 1_000, 5_000
LOCMEM = {
    "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
    "LOCATION": "lookups",
    "OPTIONS": {"MAX_ENTRIES": 10**9},
}


@dataclass(frozen=True, slots=True, order=True)
class Asked:
    """One query: when, where, and by whom."""

    at: datetime
    query: str
    country: str
    user: str


@dataclass(slots=True)
class Bill:
    """What a replay came to, in nano-dollars."""

    asks: int = 0
    hits: int = 0
    paid: int = 0
    saved: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", required=True)
    replay_queries(parser.parse_args().trace)


def replay_queries(path: str) -> None:
    """Print the hit rates and savings of a trace, and the microseconds of a lookup."""
    configure("sqlite")
    rows = _read(Path(path))
    weighted = _weighted(rows)
    for name, asks in (("rows", _in_order(rows)), ("weighted", weighted)):
        print(f"{name}: {len(asks):,} questions")
        for scope, days in itertools.product(("shared", "private"), (1, 7)):
            with _cache(LOCMEM):
                bill = _replay(asks, scope=scope, ttl=days * DAY)
            print(f"  {scope:7} kept for {days} d: hit rate {bill.hits / bill.asks:.1%},", end="")
            print(f" saved {bill.saved / (bill.paid + bill.saved):.1%} of the bill")
    for name, chosen in _caches():
        print(f"a lookup, {name}")
        for scope in ("shared", "private"):
            with _cache(chosen):
                _time_lookups(weighted, scope=scope)


# The trace


def _read(path: Path) -> list[dict[str, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _in_order(rows: Sequence[dict[str, str]]) -> list[Asked]:
    chance = random.Random(SEED)
    asks = []
    for _, of_day in itertools.groupby(rows, key=lambda row: row["Date"]):
        today = list(of_day)
        step = DAY / len(today)
        asks += [_asked(row, number * step, chance) for number, row in enumerate(today)]
    return asks


def _weighted(rows: Sequence[dict[str, str]]) -> list[Asked]:
    chance = random.Random(SEED)
    times = (row for row in rows for _ in range(int(row["PopularityScore"])))
    return sorted(_asked(row, chance.random() * DAY, chance) for row in times)


_SHARES = list(itertools.accumulate(1 / rank for rank in range(1, USERS + 1)))


def _asked(row: dict[str, str], seconds: float, chance: random.Random) -> Asked:
    midnight = datetime.fromisoformat(row["Date"]).replace(tzinfo=UTC)
    (user,) = chance.choices(range(USERS), cum_weights=_SHARES)
    at = midnight + timedelta(seconds=seconds)
    return Asked(at, row["Query"], row["Country"], str(user))


def _question(asked: Asked) -> dict[str, Any]:
    return {
        "model": MODEL,
        "max_tokens": 1024,
        "system": f"You answer searches of people in {asked.country}.",
        "messages": [{"role": "user", "content": asked.query}],
    }


@cache
def _answer(query: str, country: str) -> tuple[str, int]:
    """Return the API's message as JSON, and its cost."""
    sent = math.ceil((len(query.encode()) + len(country) + 60) / 4)
    tokens = random.Random(f"{SEED} {query} {country}").randint(50, 400)
    message = {
        "id": "msg_0123456789abcdefghijklmn",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "word" * tokens}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": sent, "output_tokens": tokens, "service_tier": "standard"},
    }
    return json.dumps(message), sent * INPUT_NANOUSD + tokens * OUTPUT_NANOUSD


# The replay


def _replay(asks: Sequence[Asked], *, scope: str, ttl: float) -> Bill:
    """Ask everything, one after the other, and keep each answer."""
    from ai_budget.savings.response_cache import Claim, Kept, claim, look_up

    bill = Bill(asks=len(asks))
    for asked in asks:
        place = _place(_question(asked), asked.user, scope)
        kept = look_up(place, at=asked.at, ttl=ttl)
        if kept is not None:
            bill.hits += 1
            bill.saved += kept.cost_nanousd
            continue
        message, cost = _answer(asked.query, asked.country)
        bill.paid += cost
        right = claim(place, at=asked.at, seconds=60)
        assert isinstance(right, Claim), "nobody else asks"
        answer = Kept(message=message, cost_nanousd=cost, model=MODEL, kept_at=asked.at)
        right.store(answer, seconds=ttl)
    return bill


def _place(question: dict[str, Any], user: str, scope: str) -> Any:
    from ai_budget.savings.response_cache import place_of

    return place_of(question, scope=scope, feature="search", owner=("user", user), versions=(1, 1))


@contextmanager
def _cache(chosen: dict[str, Any]) -> Iterator[None]:
    """Have an empty cache, apart from others, and leave nothing in it."""
    from django.core.cache import cache
    from django.test import override_settings

    from ai_budget.savings.digest_keys import apart

    with override_settings(CACHES={"default": chosen}), apart():
        try:
            yield
        finally:
            # Of a Redis that others use, only what has our prefix.
            getattr(cache, "delete_pattern", lambda _: cache.clear())("*")
            cache.close()


def _caches() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield LocMem, and the Redis at REDIS_URL through each package, if it answers."""
    import redis

    yield "LocMem", LOCMEM
    url = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
    try:
        with redis.Redis.from_url(url) as client:
            client.ping()
    except redis.ConnectionError:
        print("no Redis answers at REDIS_URL")
        return
    django_redis = "django_redis.cache.RedisCache"
    prefix = f"lookups-{os.getpid()}"
    yield "django-redis", {"BACKEND": django_redis, "LOCATION": url, "KEY_PREFIX": prefix}


# The lookup


def _time_lookups(asks: Sequence[Asked], *, scope: str) -> None:
    last = asks[-LOOKUPS:]
    seen: dict[Any, Asked] = {}
    for asked in reversed(asks):
        seen.setdefault(_place(_question(asked), asked.user, scope).key, asked)
        if len(seen) == DIFFERENT:
            break
    for name, chosen in (("as asked", last), ("all different", list(seen.values()))):
        _replay(chosen, scope=scope, ttl=7 * DAY)
        _compare(f"  {scope:7} {name}", chosen, scope)


def _compare(name: str, asks: Sequence[Asked], scope: str) -> None:
    from django.core.cache import cache

    from ai_budget.savings.response_cache import look_up, place_of

    at = max(asked.at for asked in asks)
    questions = [(_question(asked), ("user", asked.user)) for asked in asks]
    keys = [_place(question, owner[1], scope).key for question, owner in questions]
    length = statistics.median(len(cache.get(key)) for key in keys)

    def bare(these: slice) -> None:
        for key in keys[these]:
            cache.get(key)

    def lookups(these: slice) -> None:
        for question, owner in questions[these]:
            place = place_of(question, scope=scope, feature="search", owner=owner, versions=(1, 1))
            assert place is not None
            assert look_up(place, at=at, ttl=7 * DAY) is not None

    # The trace is the benchmark's own: no collection of garbage shall search it meanwhile.
    gc.collect()
    gc.freeze()
    rounds = []
    for _ in range(ROUNDS):
        # In short turns, so that what disturbs the machine disturbs both alike.
        turns = [slice(start, start + TURN) for start in range(0, len(asks), TURN)]
        taken = [(_timed(bare, these), _timed(lookups, these)) for these in turns]
        rounds.append((sum(got for got, _ in taken), sum(ours for _, ours in taken)))
    bare_us, ours_us = (
        statistics.median(times) / len(asks) * 1e6 for times in zip(*rounds, strict=True)
    )
    ratio = statistics.median(ours / got for got, ours in rounds)
    print(f"{name}: {ours_us:.2f} us, bare get {bare_us:.2f} us, ratio {ratio:.2f}", end="")
    print(f" (entries of {length:.0f} characters)")


def _timed(work: Callable[[slice], None], these: slice) -> float:
    start = time.perf_counter()
    work(these)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
