"""The ledger's work with nothing but the driver of its store: what a measurement stands beside."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from django.db import connection

KEYS = ("*|day", "*|month", "feature|day", "feature|month")

Step = Callable[[], object]


def create_tables() -> None:
    """Create tables of the shape of the journal and the balances, with four hot rows."""
    from ai_budget.models import CallLog, SpendWindow

    for table, model in (("bare_call", CallLog), ("bare_window", SpendWindow)):
        with connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE IF EXISTS {table}")
        _create_like(table, model)
    with connection.cursor() as cursor:
        for key in KEYS:
            cursor.execute(
                "INSERT INTO bare_window VALUES (%s, 'x', 'day', '2026-11-22', 0, 0, 0, 0)", [key]
            )


def pair(_: int, model: str) -> Step:
    """Return the bare pair of transactions.

    Begin, INSERT one row, one UPDATE over four balance rows, commit; begin, UPDATE the row,
    UPDATE the four, commit. PostgreSQL gives the rows of an UPDATE no order, and two of them
    meet in a deadlock: there a SELECT ... FOR UPDATE inside it locks them in one.
    """
    driver, mark, key = _driver()
    columns, values = _row(model)
    four = ", ".join([mark] * len(KEYS))
    among = f"{key} IN ({four})"
    if connection.vendor == "postgresql":
        ordered = f"SELECT {key} FROM bare_window WHERE {among} ORDER BY {key} FOR UPDATE"
        among = f"{key} = ANY(ARRAY({ordered}))"
    insert = (
        f"INSERT INTO bare_call ({', '.join(columns)}) "
        f"VALUES ({', '.join([mark] * len(columns))}) RETURNING id"
    )
    take = (
        f"UPDATE bare_window SET held_nanousd = held_nanousd + {mark}, calls = calls + 1 "
        f"WHERE {among}"
    )
    close = f"UPDATE bare_call SET status = 'settled', cost_nanousd = {mark} WHERE id = {mark}"
    give = (
        f"UPDATE bare_window SET spent_nanousd = spent_nanousd + {mark}, "
        f"held_nanousd = held_nanousd - {mark} WHERE {among}"
    )

    def run() -> None:
        cursor = driver.cursor()
        cursor.execute("BEGIN")
        cursor.execute(insert, values)
        (number,) = cursor.fetchone()
        cursor.execute(take, [1000, *KEYS])
        cursor.execute("COMMIT")
        cursor.execute("BEGIN")
        cursor.execute(close, [700, number])
        cursor.execute(give, [700, 1000, *KEYS])
        cursor.execute("COMMIT")

    return run


def one_update(_: int) -> Step:
    """Return the least that can guard a limit: one conditional UPDATE of one hot row."""
    driver, mark, key = _driver()
    update = (
        f"UPDATE bare_window SET held_nanousd = held_nanousd + {mark} "
        f"WHERE {key} = {mark} AND spent_nanousd + held_nanousd + {mark} <= {mark}"
    )
    given = [1000, KEYS[2], 1000, 10**15]
    return lambda: driver.cursor().execute(update, given)


def script_pair(_: int, url: str) -> Step:
    """Return two minimal scripts on Redis: check four balances and add; then subtract."""
    import redis

    client = redis.Redis.from_url(url)
    add = client.script_load(_CHECK_AND_ADD)
    subtract = client.script_load(_SUBTRACT)
    keys = [f"bare:{{hot}}:{key}" for key in KEYS]

    def run() -> None:
        client.evalsha(add, len(keys), *keys, 1000, 10**15)
        client.evalsha(subtract, len(keys), *keys, 1000)

    return run


_CHECK_AND_ADD = """
for _, key in ipairs(KEYS) do
  if tonumber(redis.call('GET', key) or 0) + ARGV[1] > tonumber(ARGV[2]) then return 0 end
end
for _, key in ipairs(KEYS) do redis.call('INCRBY', key, ARGV[1]) end
return 1
"""

_SUBTRACT = """
for _, key in ipairs(KEYS) do redis.call('DECRBY', key, ARGV[1]) end
return 1
"""


def moving_window(_: int, url: str) -> Step:
    """Return one hit of the moving window of ``limits`` on Redis, under a limit never reached."""
    try:
        limits, storages, strategies = map(
            importlib.import_module, ("limits", "limits.storage", "limits.strategies")
        )
    except ImportError:
        raise SystemExit("Measuring beside it needs: pip install limits") from None
    limiter = strategies.MovingWindowRateLimiter(storages.RedisStorage(url))
    most = limits.RateLimitItemPerHour(10_000_000)
    return lambda: limiter.hit(most, "hot")


def _driver() -> tuple[Any, str, str]:
    """Return the driver's connection, its placeholder, and how it writes the column ``key``."""
    connection.ensure_connection()
    mark = "?" if connection.vendor == "sqlite" else "%s"
    return connection.connection, mark, connection.ops.quote_name("key")


def _row(model: str) -> tuple[list[str], list[Any]]:
    """Return the columns of the journal and what an ordinary call writes into them."""
    from ai_budget import periods
    from ai_budget.models import CallLog

    now = periods.now()
    row = CallLog(
        feature_id="benchmark",
        requested_model=model,
        model=model,
        max_tokens=64,
        reserved_nanousd=1000,
        rates="r" * 250,
        reserved_at=now,
        day=now.date(),
        deadline=now,
    )
    fields = [field for field in CallLog._meta.concrete_fields if not field.primary_key]
    columns = [connection.ops.quote_name(str(field.column)) for field in fields]
    values = [field.get_db_prep_save(getattr(row, field.attname), connection) for field in fields]
    return columns, values


def _create_like(table: str, model: Any) -> None:
    """Create a table of the same columns and indexes under another name."""
    name = model._meta.db_table
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(f"CREATE TABLE {table} (LIKE {name} INCLUDING ALL)")
            return
        if connection.vendor == "mysql":
            cursor.execute(f"CREATE TABLE {table} LIKE {name}")
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
