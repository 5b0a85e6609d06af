"""What the guard adds to a call, beside the bare call and beside a bare pair of transactions.

    python -m benchmarks.overhead [--calls 300] [--databases sqlite,postgresql] [--memory 10000]

In one run, on one machine, against one local API: the SDK's bare call, the guarded call, and
the ledger's own SQL with nothing but the driver: the bare pair of ``benchmarks.bare``, which is
begin, INSERT one row, one UPDATE over four balance rows, commit; begin, UPDATE the row, UPDATE
the four, commit.

Printed for each database, sync and async: the milliseconds that the guard adds at p50 and p99,
and the ratio of the p50 to the bare pair's. PostgreSQL is found through PGHOST and the like.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from benchmarks import bare
from benchmarks.stage import configure, empty_database, in_own_process, local_api, percentile

PROMPT = "Say in one sentence what a budget is."
MODEL = "claude-haiku-5-5"


def main() -> None:
    options = _options()
    if options.database is None:
        _print_import_time()
        for database in options.databases.split(","):
            given = ["--calls", str(options.calls), "--memory", str(options.memory)]
            in_own_process("benchmarks.overhead", database, given)
        return
    configure(options.database)
    with empty_database():
        _measure(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--memory", type=int, default=0, help="calls to watch memory over")
    parser.add_argument("--database", help=argparse.SUPPRESS)
    return parser.parse_args()


def _print_import_time() -> None:
    """Compare django.setup() with and without the app, in fresh processes."""
    script = (
        "import time, django; from django.conf import settings;"
        "settings.configure(INSTALLED_APPS=['django.contrib.contenttypes','django.contrib.auth'"
        "{app}], DATABASES={{'default': {{'ENGINE': 'django.db.backends.sqlite3'}}}});"
        "start = time.perf_counter(); django.setup(); print(time.perf_counter() - start)"
    )

    def setup_ms(app: str) -> float:
        command = [sys.executable, "-c", script.format(app=app)]
        runs = [
            float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(7)
        ]
        return statistics.median(runs) * 1000

    without, with_app = setup_ms(""), setup_ms(",'ai_budget'")
    print(f"django.setup(): {without:.0f} ms, with ai_budget {with_app:.0f} ms", end="")
    print(f" (+{with_app - without:.1f} ms)")


def _measure(options: argparse.Namespace) -> None:
    from django.db import connection
    from django.test import override_settings

    with local_api(history=100) as api:
        local = {
            "API_KEY": "local",
            "BASE_URL": api.base_url,
            "DAILY_LIMIT_USD": "100000",
            "MONTHLY_LIMIT_USD": "100000",
        }
        with override_settings(AI_BUDGET=local):
            print(f"\n{connection.display_name}, {options.calls} calls")
            _compare("sync", *_sync(options.calls, api.base_url))
            _compare("async", *asyncio.run(_async(options.calls, api.base_url)))
            if options.memory:
                _memory(options.memory)


def _compare(name: str, pair: list[float], call: list[float], guarded: list[float]) -> None:
    pair50, call50, guarded50 = (percentile(times, 50) for times in (pair, call, guarded))
    added50 = guarded50 - call50
    added99 = percentile(guarded, 99) - percentile(call, 99)
    print(f"  {name:5} p50: bare pair {pair50:.3f} ms, bare call {call50:.3f} ms,", end="")
    print(f" guarded call {guarded50:.3f} ms; added p50 {added50:.3f} ms,", end="")
    print(f" p99 {added99:.3f} ms; added p50 / bare pair = {added50 / pair50:.2f}")


def _sync(calls: int, base_url: str) -> list[list[float]]:
    import anthropic

    import ai_budget

    client = anthropic.Anthropic(api_key="local", base_url=base_url)
    guarded = ai_budget.guard(client, feature="benchmark")

    def call(one: Any) -> Callable[[], object]:
        messages = [{"role": "user", "content": PROMPT}]
        return lambda: one.messages.create(model=MODEL, max_tokens=64, messages=messages)

    steps = [_timed(_bare_pair()), _timed(call(client)), _timed(call(guarded))]
    times: list[list[float]] = [[], [], []]
    # All three in turn, so that what disturbs the machine disturbs each alike.
    for number in range(-20, calls):
        taken = [step() for step in steps]
        if number >= 0:
            for one, value in zip(times, taken, strict=True):
                one.append(value)
    return times


async def _async(calls: int, base_url: str) -> list[list[float]]:
    import anthropic
    from asgiref.sync import sync_to_async
    from django.db import connections

    import ai_budget

    client = anthropic.AsyncAnthropic(api_key="local", base_url=base_url)
    guarded = ai_budget.guard(client, feature="benchmark")
    # On the ledger's own connection, which belongs to the thread of sync_to_async.
    pair = sync_to_async(_timed(await sync_to_async(_bare_pair)()))

    async def call(one: Any) -> float:
        start = time.perf_counter()
        await one.messages.create(
            model=MODEL, max_tokens=64, messages=[{"role": "user", "content": PROMPT}]
        )
        return (time.perf_counter() - start) * 1000

    times: list[list[float]] = [[], [], []]
    for number in range(-20, calls):
        taken = [await pair(), await call(client), await call(guarded)]
        if number >= 0:
            for one, value in zip(times, taken, strict=True):
                one.append(value)
    await client.close()
    await sync_to_async(connections.close_all)()
    return times


def _bare_pair() -> Callable[[], object]:
    bare.create_tables()
    return bare.pair(0, MODEL)


def _timed(step: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1000

    return timed


def _memory(calls: int) -> None:
    """Print what many calls leave behind, after the first thousand have filled the caches."""
    import ai_budget

    def run(count: int) -> None:
        for _ in range(count):
            ai_budget.ask(PROMPT, feature="benchmark", max_tokens=64)

    run(1000)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run(calls)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    print(f"  memory after {calls} more calls: {grown / 1024:+.0f} KiB", end="")
    print(f" ({grown / calls:+.1f} bytes a call)")


if __name__ == "__main__":
    main()
