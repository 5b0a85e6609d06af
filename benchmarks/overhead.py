"""What the guard adds to a call, beside the bare call and beside a bare pair of transactions.

    python -m benchmarks.overhead [--calls 300] [--databases sqlite,postgresql] [--memory 10000]

In one run, on one machine, against one local API: the SDK's bare call, the guarded call, and
the ledger's own SQL with nothing but the driver. The bare pair is: begin, INSERT one row, one
UPDATE over four balance rows, commit; begin, UPDATE the row, UPDATE the four, commit.

Printed for each database, sync and async: the milliseconds that the guard adds at p50 and p99,
and the ratio of the p50 to the bare pair's. PostgreSQL is found through PGHOST and the like.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROMPT = "Say in one sentence what a budget is."
MODEL = "claude-haiku-5-5"


def main() -> None:
    options = _options()
    if options.database is None:
        _print_import_time()
        for database in options.databases.split(","):
            _in_own_process(database, options)
        return
    _configure(options.database)
    from django.test.utils import setup_databases, teardown_databases

    databases = setup_databases(verbosity=0, interactive=False)
    try:
        _measure(options)
    finally:
        teardown_databases(databases, verbosity=0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--memory", type=int, default=0, help="calls to watch memory over")
    parser.add_argument("--database", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_own_process(database: str, options: argparse.Namespace) -> None:
    """One database a process: Django is configured once."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--database", database]
    command += ["--calls", str(options.calls), "--memory", str(options.memory)]
    subprocess.run(command, check=True)


def _configure(database: str) -> None:
    os.environ["AI_BUDGET_TEST_DB"] = database
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    import django

    django.setup()


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

    with _local_api() as base_url:
        local = {
            "API_KEY": "local",
            "BASE_URL": base_url,
            "DAILY_LIMIT_USD": "100000",
            "MONTHLY_LIMIT_USD": "100000",
        }
        with override_settings(AI_BUDGET=local):
            print(f"\n{connection.display_name}, {options.calls} calls")
            _compare("sync", *_sync(options.calls, base_url))
            _compare("async", *asyncio.run(_async(options.calls, base_url)))
            if options.memory:
                _memory(options.memory)


@contextmanager
def _local_api() -> Iterator[str]:
    """Serve the local API from a process of its own, as a provider would."""
    script = (
        "import sys; from ai_budget.testing.simulator import AnthropicSimulator as Api;"
        "api = Api(history=100).start(); print(api.base_url, flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True
    ) as api:
        assert api.stdin is not None
        assert api.stdout is not None
        yield api.stdout.readline().strip()
        api.stdin.close()


def _compare(name: str, pair: list[float], bare: list[float], guarded: list[float]) -> None:
    added50 = _p(guarded, 50) - _p(bare, 50)
    added99 = _p(guarded, 99) - _p(bare, 99)
    print(
        f"  {name:5} p50: bare pair {_p(pair, 50):.3f} ms, bare call {_p(bare, 50):.3f} ms,", end=""
    )
    print(f" guarded call {_p(guarded, 50):.3f} ms; added p50 {added50:.3f} ms,", end="")
    print(f" p99 {added99:.3f} ms; added p50 / bare pair = {added50 / _p(pair, 50):.2f}")


def _sync(calls: int, base_url: str) -> list[list[float]]:
    import anthropic
    from django.db import connection

    import ai_budget

    client = anthropic.Anthropic(api_key="local", base_url=base_url)
    guarded = ai_budget.guard(client, feature="benchmark")

    def call(one: Any) -> Callable[[], object]:
        messages = [{"role": "user", "content": PROMPT}]
        return lambda: one.messages.create(model=MODEL, max_tokens=64, messages=messages)

    steps = [_timed(_bare_pair(connection)), _timed(call(client)), _timed(call(guarded))]
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
    from django.db import connection, connections

    import ai_budget

    client = anthropic.AsyncAnthropic(api_key="local", base_url=base_url)
    guarded = ai_budget.guard(client, feature="benchmark")
    # On the ledger's own connection, which belongs to the thread of sync_to_async.
    pair = sync_to_async(_timed(await sync_to_async(_bare_pair)(connection)))

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


def _timed(step: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1000

    return timed


def _bare_pair(connection: Any) -> Callable[[], None]:
    """Return the ledger's statements on tables of the same shape, without Django."""
    from ai_budget.models import CallLog, SpendWindow

    connection.ensure_connection()
    driver = connection.connection
    for table, model in (("bare_call", CallLog), ("bare_window", SpendWindow)):
        with connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE IF EXISTS {table}")
        _create_like(connection, table, model)
    keys = ["*|day", "*|month", "feature|day", "feature|month"]
    mark = "?" if connection.vendor == "sqlite" else "%s"
    columns = [
        str(field.column) for field in CallLog._meta.concrete_fields if not field.primary_key
    ]
    row = CallLog(
        feature_id="benchmark",
        requested_model=MODEL,
        model=MODEL,
        max_tokens=64,
        reserved_nanousd=1000,
        rates="r" * 250,
        reserved_at=_now(),
        day=_now().date(),
        deadline=_now(),
    )
    values = [
        field.get_db_prep_save(getattr(row, field.attname), connection)
        for field in CallLog._meta.concrete_fields
        if not field.primary_key
    ]
    with connection.cursor() as cursor:
        for key in keys:
            cursor.execute(
                "INSERT INTO bare_window VALUES (%s, 'x', 'day', '2026-11-22', 0, 0, 0, 0)", [key]
            )
    marks = ", ".join([mark] * len(columns))
    four = ", ".join([mark] * 4)
    insert = f"INSERT INTO bare_call ({', '.join(columns)}) VALUES ({marks}) RETURNING id"
    take = (
        f"UPDATE bare_window SET held_nanousd = held_nanousd + {mark}, calls = calls + 1 "
        f"WHERE key IN ({four})"
    )
    close = f"UPDATE bare_call SET status = 'settled', cost_nanousd = {mark} WHERE id = {mark}"
    give = (
        f"UPDATE bare_window SET spent_nanousd = spent_nanousd + {mark}, "
        f"held_nanousd = held_nanousd - {mark} WHERE key IN ({four})"
    )

    def pair() -> None:
        cursor = driver.cursor()
        cursor.execute("BEGIN")
        cursor.execute(insert, values)
        (number,) = cursor.fetchone()
        cursor.execute(take, [1000, *keys])
        cursor.execute("COMMIT")
        cursor.execute("BEGIN")
        cursor.execute(close, [700, number])
        cursor.execute(give, [700, 1000, *keys])
        cursor.execute("COMMIT")

    return pair


def _create_like(connection: Any, table: str, model: Any) -> None:
    """Create a table of the same columns and indexes under another name."""
    name = model._meta.db_table
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(f"CREATE TABLE {table} (LIKE {name} INCLUDING ALL)")
            return
        cursor.execute(
            "SELECT sql FROM sqlite_master WHERE tbl_name = %s AND sql IS NOT NULL", [name]
        )
        for (statement,) in cursor.fetchall():
            cursor.execute(
                statement.replace(f'"{name}"', table)
                .replace("ai_budget_call_", "bare_call_")
                .replace("ai_budget_window_", "bare_window_")
                .replace("ai_budget_calllog_", "bare_calllog_")
            )


def _now() -> Any:
    from ai_budget import periods

    return periods.now()


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


def _p(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main()
