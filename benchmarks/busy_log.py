"""A log of calls as a busy site has it after some months, made by PostgreSQL itself.

In every day a third of the users make a call, some of them many; nine in ten calls are a user's,
the others a tenant's or nobody's. Each of the features has mostly one model, and calls it
differently often. There are downgrades, answers from the caches, batches at night, estimates,
released attempts, repeats, and calls in flight. It is the same log every time: what is random is
drawn with a fixed seed, and the clock stands still at ``NOW``.

What goes with it is there, too: the users, the budgets, and every balance that the ledger would
have kept. It is written without a write-ahead log and indexed afterwards, which changes nothing
for those who read it.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from django.db import connection, connections
from django.db.models import Model, Q

from ai_budget.models import (
    CallLog,
    DayTotal,
    FeatureBudget,
    QuarterTotal,
    SpendWindow,
    SubjectTotal,
    UserTotal,
)
from ai_budget.periods import Period
from ai_budget.policy.limits import balance_keys
from ai_budget.pricing import rates
from ai_budget.values import BalanceKey, Charge

NOW = datetime(2026, 11, 22, 15, 7, tzinfo=UTC)
"""When it is in the log, for everyone who reads it."""

DAYS = 90
FEATURES = 50
CATEGORIES = ("support", "writing", "search", "code", "nightly")
NIGHTLY = CATEGORIES[-1]
CALLS_OF_A_USER = 100
"""Calls for each user there is."""

HAIKU, SONNET, OPUS = "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"
_NANOUSD = {HAIKU: (100, 500), SONNET: (2_000, 10_000), OPUS: (4_000, 20_000)}
"""What a token of each costs, sent and answered."""

LIMIT_USD = 10_000_000

_AT_ONCE = 3
"""Statements that fill the log at the same time."""


def make(rows: int) -> None:
    """Fill the empty tables with so many calls, and print how long each step takes."""
    with _step("budgets and users"):
        _make_budgets()
        _make_users(max(3, rows // CALLS_OF_A_USER))
    with _step(f"{rows:,} calls"), _without_indexes(CallLog):
        _make_calls(rows)
    with _step("balances"), _without_indexes(SpendWindow):
        _make_balances()
    with _step("statistics"):
        vacuum()


def vacuum() -> None:
    """Have the tables as they are on a site that has run for a while."""
    tables = (CallLog, SpendWindow, QuarterTotal, DayTotal, UserTotal, SubjectTotal)
    with connection.cursor() as cursor:
        for model in tables:
            cursor.execute(f"VACUUM (ANALYZE) {model._meta.db_table}")
        cursor.execute("ANALYZE")


def made(rows: int) -> bool:
    """Say whether the tables hold so many calls already, and raise if they hold other ones."""
    found = CallLog.objects.order_by("-id").values_list("id", flat=True).first()
    if found not in (None, rows):
        raise SystemExit(f"The database that was kept has {found:,} calls, not {rows:,}.")
    return found is not None


@contextmanager
def _step(name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    print(f"  {name:<32} {time.perf_counter() - begun:8.1f} s", flush=True)


# Budgets and users


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """A feature as the log has it; ``sent`` and ``answered`` are the tokens of a usual call."""

    number: int
    model: str
    cheaper: str
    sent: int
    answered: int
    cached: bool
    batched: bool

    @property
    def name(self) -> str:
        return f"{self.category}-{self.number}"

    @property
    def category(self) -> str:
        return CATEGORIES[self.number % len(CATEGORIES)]


def features() -> list[Feature]:
    """Return the features, the one that is called the most first."""
    models = ((SONNET, HAIKU), (HAIKU, HAIKU), (SONNET, HAIKU), (OPUS, SONNET), (HAIKU, HAIKU))
    chosen = [models[number % 7 % 5] for number in range(FEATURES)]
    return [
        Feature(
            number=number,
            model=model,
            cheaper=cheaper,
            sent=400 * (1 + number % 6),
            answered=120 * (1 + number % 5),
            cached=number % 4 == 1,
            batched=number % 20 == 4,
        )
        for number, (model, cheaper) in enumerate(chosen)
    ]


def _make_budgets() -> None:
    FeatureBudget.objects.create(name="*", monthly_limit_usd=LIMIT_USD, monthly_plan_usd=60_000)
    parents = {
        name: FeatureBudget.objects.create(name=name, monthly_plan_usd=12_000, plan_share=20)
        for name in CATEGORIES
    }
    for it in features():
        FeatureBudget.objects.create(
            name=it.name,
            parent=parents[it.category],
            monthly_limit_usd=LIMIT_USD // 10 if it.number % 2 else None,
            daily_limit_usd=LIMIT_USD // 100 if it.number % 3 else None,
            monthly_plan_usd=4_000 // (1 + it.number) + 100,
            model=it.model,
            max_tokens=2_048,
            cache_scope="shared" if it.cached else "off",
        )


def _make_users(users: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO auth_user (id, username, email, password, first_name, last_name, "
            "is_superuser, is_staff, is_active, date_joined) "
            "SELECT n, 'user-' || n, 'user-' || n || '@example.com', '!', '', '', "
            "false, false, true, %s FROM generate_series(1, %s) n",
            [NOW - timedelta(days=DAYS), users],
        )
        cursor.execute("SELECT setval(pg_get_serial_sequence('auth_user', 'id'), %s)", [users])


# Calls


def first_day() -> date:
    """Return the first day that has calls."""
    return NOW.date() - timedelta(days=DAYS - 1)


def _make_calls(rows: int) -> None:
    users = max(3, rows // CALLS_OF_A_USER)
    days: queue.SimpleQueue[tuple[date, int, int]] = queue.SimpleQueue()
    before = 0
    for day, calls in _calls_by_day(rows):
        days.put((day, calls, before))
        before += calls
    table = CallLog._meta.db_table
    # Days are dealt out one by one, so that the table is in the order of time by and large.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for worker in [pool.submit(_fill_days, days, users) for _ in range(_AT_ONCE)]:
            worker.result()
    with connection.cursor() as cursor:
        cursor.execute("SELECT setval(pg_get_serial_sequence(%s, 'id'), %s)", [table, rows])


def _calls_by_day(rows: int) -> list[tuple[date, int]]:
    """Share the calls among the days: fewer at weekends, ever more, and today is not over."""
    days = [first_day() + timedelta(days=n) for n in range(DAYS)]
    weights = [
        (0.6 if day.weekday() >= 5 else 1.0) * (1 + place / DAYS) for place, day in enumerate(days)
    ]
    weights[-1] *= _part_of_today()
    shares = [math.floor(rows * weight / sum(weights)) for weight in weights]
    shares[0] += rows - sum(shares)
    return list(zip(days, shares, strict=True))


def _part_of_today() -> float:
    return (NOW - datetime.combine(NOW.date(), datetime.min.time(), UTC)) / timedelta(days=1)


def _fill_days(days: queue.SimpleQueue[tuple[date, int, int]], users: int) -> None:
    try:
        with connection.cursor() as cursor:
            while True:
                try:
                    day, calls, before = days.get_nowait()
                except queue.Empty:
                    return
                cursor.execute("SELECT setseed(%s)", [day.toordinal() % 1000 / 1000])
                cursor.execute(_statement(day, calls=calls, before=before, users=users))
    finally:
        connections.close_all()


def _statement(day: date, *, calls: int, before: int, users: int) -> str:
    """Return the statement that writes the calls of one day, in the order of their time."""
    told = _told(day, calls=calls, users=users)
    columns = {
        "id": f"{before} + n",
        "call_id": "GEN_RANDOM_UUID()",
        "attempt": "repeated",
        "counted": "CASE status WHEN 'cached' THEN 0 ELSE 1 - repeated END",
        "feature_id": "name",
        "category": "category",
        "user_id": "CASE WHEN of_whom < 0.9 THEN user_id END",
        "subject": "CASE WHEN of_whom > 0.92 THEN 'tenant-' || user_id % 500 ELSE '' END",
        "kind": "kind",
        "status": "status",
        "requested_model": "asked",
        "model": "model",
        "provider": "'anthropic'",
        "input_tokens": "paid * sent",
        "cache_write_5m_tokens": "0",
        "cache_write_1h_tokens": "0",
        "cache_read_tokens": "paid * read",
        "output_tokens": "paid * answered",
        "thinking_tokens": "CASE WHEN number % 7 = 3 THEN paid * answered / 2 ELSE 0 END",
        "web_searches": "0",
        "service_tier": "CASE kind WHEN 'batch' THEN 'batch' ELSE 'standard' END",
        "speed": "''",
        "inference_geo": "'global'",
        "max_tokens": "2048",
        "stop_reason": "CASE WHEN paid = 0 THEN '' WHEN of_end < 0.02 THEN 'max_tokens' "
        "ELSE 'end_turn' END",
        "reserved_nanousd": "plain + 2048 * price_out",
        "cost_nanousd": "CASE WHEN status <> 'reserved' THEN paid * cost END",
        "saved_nanousd": "CASE status WHEN 'cached' THEN plain ELSE paid * (plain - cost) END",
        "saved_reason": "CASE status WHEN 'cached' THEN 'response cache' ELSE CONCAT_WS(', ', "
        "CASE WHEN paid = 1 AND kind = 'batch' THEN 'batch' END, "
        "CASE WHEN paid = 1 AND model <> asked THEN 'downgrade' END, "
        "CASE WHEN paid = 1 AND read > 0 THEN 'prompt cache' END) END",
        "cache_checked": "cached",
        "decision": "CASE WHEN model <> asked THEN '80% of the monthly limit' ELSE '' END",
        "rates": "rates",
        "request_id": f"CASE paid WHEN 1 THEN 'req_' || LEFT(MD5(({before} + n)::text), 24) "
        "ELSE '' END",
        "reserved_at": "at",
        "day": f"DATE '{day}'",
        "deadline": "at + INTERVAL '10 minutes'",
        "settled_at": "CASE WHEN status <> 'reserved' THEN at + latency * INTERVAL '1 ms' END",
        "latency_ms": "CASE WHEN status <> 'reserved' THEN latency END",
        "first_token_ms": "CASE WHEN paid = 1 AND kind = 'stream' THEN latency / 5 END",
        "error": "CASE status WHEN 'estimated' THEN 'deadline passed' ELSE '' END",
        "tags": "CASE WHEN of_tags < 0.3 THEN JSONB_BUILD_OBJECT('plan', "
        "(ARRAY['free', 'pro', 'team'])[1 + user_id % 3]) ELSE '{}' END",
    }
    written = {str(field.column) for field in CallLog._meta.concrete_fields}
    assert written == columns.keys(), written ^ columns.keys()
    return (
        f"INSERT INTO {CallLog._meta.db_table} ({', '.join(columns)}) "
        f"SELECT {', '.join(columns.values())} FROM ({told}) told ORDER BY n"
    )


def _told(day: date, *, calls: int, users: int) -> str:
    """Return the query for who calls what on a day, and how that ends.

    From the inside out: what is random is drawn, it says how the call is, and what that costs.
    """
    midnight = datetime.combine(day, datetime.min.time(), UTC)
    seconds = 86_400 * (_part_of_today() if day == NOW.date() else 1)
    active = users // 3
    drawn = f"""
        SELECT j, RANDOM() AS of_whom, RANDOM() AS of_state, RANDOM() AS of_kind,
               RANDOM() AS of_end, RANDOM() AS of_tags, RANDOM() AS of_size, RANDOM() AS of_user,
               FLOOR({FEATURES} * POWER(RANDOM(), 2))::int AS number,
               CASE WHEN RANDOM() < 0.4 THEN RANDOM()
                   ELSE (RANDOM() + RANDOM() + RANDOM()) / 3 END AS of_day
        FROM GENERATE_SERIES(1, {calls}) j
    """
    # Each of the active ones makes a call; after that, some are keener than others.
    turn = f"CASE WHEN j <= {active} THEN j - 1 ELSE FLOOR({active} * POWER(of_user, 2))::int END"
    made = f"""
        SELECT *,
               3 * ({turn}) + 1 + (({turn}) + {day.toordinal()}) % 3 AS user_id,
               TIMESTAMPTZ '{midnight}' + INTERVAL '1 second' * CASE WHEN batched THEN 7200
                   ELSE {seconds} * of_day END AS at,
               CASE WHEN batched THEN 'batch' WHEN of_kind < 0.3 THEN 'stream'
                   WHEN of_kind > 0.98 THEN 'router' ELSE 'ask' END AS kind,
               CASE WHEN of_kind > 0.9 AND of_kind < 0.95 THEN cheaper ELSE asked END AS model,
               (usual_sent * (0.5 + of_size))::bigint AS sent,
               (usual_answered * (0.5 + of_size))::bigint AS answered,
               CASE WHEN number % 6 = 2 THEN usual_sent * 2 ELSE 0 END AS read,
               (800 + 4000 * of_size)::int AS latency
        FROM ({drawn}) drawn JOIN ({_values_of_features()}) feature USING (number)
    """
    ended = f"""
        SELECT *, CASE WHEN at > TIMESTAMPTZ '{NOW}' - INTERVAL '60 seconds' THEN 'reserved'
                   WHEN cached AND kind <> 'router' AND of_state < 0.25 THEN 'cached'
                   WHEN of_state > 0.99 THEN 'released'
                   WHEN of_state > 0.985 THEN 'estimated' ELSE 'settled' END AS status,
               (of_state > 0.5 AND of_state < 0.51)::int AS repeated,
               ROW_NUMBER() OVER (ORDER BY at) AS n
        FROM ({made}) made
    """
    return f"""
        SELECT *, (status IN ('settled', 'estimated'))::int AS paid,
               (sent + read) * asked_price_in + answered * asked_price_out AS plain,
               ((sent * price_in + read * price_in / 10 + answered * price_out)
                   / CASE kind WHEN 'batch' THEN 2 ELSE 1 END)::bigint AS cost
        FROM ({ended}) ended JOIN ({_values_of_models()}) priced USING (model)
            JOIN ({_values_of_models(prefix="asked_")}) asked_priced
                ON asked_priced.asked_model = asked
    """


def _values_of_features() -> str:
    rows = [
        (
            it.number,
            it.name,
            it.category,
            it.model,
            it.cheaper,
            it.sent,
            it.answered,
            it.cached,
            it.batched,
        )
        for it in features()
    ]
    names = "number, name, category, asked, cheaper, usual_sent, usual_answered, cached, batched"
    return _values(rows, names)


def _values_of_models(prefix: str = "") -> str:
    rows = []
    for model, (price_in, price_out) in _NANOUSD.items():
        found = rates.resolve(model, provider="anthropic", at=NOW)
        rows.append((model, price_in, price_out, found.reference))
    names = ", ".join(prefix + name for name in ("model", "price_in", "price_out", "rates"))
    return _values(rows, names)


def _values(rows: Sequence[tuple[Any, ...]], names: str) -> str:
    written = ", ".join(
        "(" + ", ".join(f"'{it}'" if isinstance(it, str) else str(it) for it in row) + ")"
        for row in rows
    )
    return f"SELECT * FROM (VALUES {written}) given ({names})"


# Balances


def _make_balances() -> None:
    """Write what the ledger would have: a row for every scope that a call counts in."""
    _sum_callers("user_id", "user")
    _sum_callers("subject", "subject")
    _sum_budgets()
    _name_present()


_SUMS = (
    "COALESCE(SUM(cost_nanousd), 0) AS spent, COALESCE(SUM(reserved_nanousd) "
    "FILTER (WHERE status = 'reserved'), 0) AS held, SUM(counted) AS calls"
)
_BALANCES = "(key, scope, period, first_day, spent_nanousd, held_nanousd, calls, refused)"


def _sum_callers(column: str, name: str) -> None:
    """Write the balances of callers, alone and in each feature.

    Their keys are made up: the real ones are a digest that the database does not know. They are
    asked for only of the present.
    """
    table, windows = CallLog._meta.db_table, SpendWindow._meta.db_table
    whose = "user_id IS NOT NULL" if column == "user_id" else "subject <> ''"
    statements = []
    for period in Period:
        first = "day" if period is Period.DAY else "DATE_TRUNC('month', day)::date"
        for more, feature in (("''", "NULL"), ("',feature:' || feature", "feature_id")):
            scope = f"'{name}:' || caller || {more}"
            statements.append(
                f"INSERT INTO {windows} {_BALANCES} "
                f"SELECT MD5({scope} || '{period}' || first), {scope}, '{period}', first, "
                "spent, held, calls, 0 FROM ("
                f"SELECT {column} AS caller, {feature} AS feature, {first} AS first, {_SUMS} "
                f"FROM {table} WHERE status <> 'released' AND {whose} GROUP BY 1, 2, 3) summed"
            )
    _run_all(statements)


def _sum_budgets() -> None:
    """Write the balances of features, categories and the site; some were refused now and then."""
    table = CallLog._meta.db_table
    sums: dict[Any, list[int]] = {}
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT day, feature_id, category, {_SUMS} FROM {table} "
            "WHERE status <> 'released' GROUP BY 1, 2, 3"
        )
        for day, feature, category, *amounts in cursor.fetchall():
            for key in balance_keys(Charge(feature=feature), category, day):
                total = sums.setdefault(key, [0, 0, 0])
                for place, amount in enumerate(amounts):
                    total[place] += int(amount)
    SpendWindow.objects.bulk_create(
        [
            SpendWindow(
                scope=key.scope,
                period=key.period,
                first_day=key.first_day,
                spent_nanousd=spent,
                held_nanousd=held,
                calls=calls,
                refused=_refused(key),
            )
            for key, (spent, held, calls) in sums.items()
        ],
        batch_size=1_000,
    )


def _refused(key: BalanceKey) -> int:
    often = key.period is Period.DAY and key.scope.startswith("feature:")
    return key.first_day.day if often and key.scope.endswith("7") else 0


def _name_present() -> None:
    """Give the balances of today and this month of each user their real keys."""
    rows = SpendWindow.objects.filter(scope__startswith="user:").exclude(scope__contains=",")
    today = NOW.date()
    now = Q(period=Period.DAY, first_day=today)
    now |= Q(period=Period.MONTH, first_day=today.replace(day=1))
    found = list(rows.filter(now).values_list("key", "scope", "period", "first_day"))
    made_up = [key for key, *_ in found]
    real = [SpendWindow.key_for(scope, period, first) for _, scope, period, first in found]
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {SpendWindow._meta.db_table} SET key = real FROM "
            "UNNEST(%s::text[], %s::text[]) AS named (made_up, real) WHERE key = made_up",
            [made_up, real],
        )


# The database


@contextmanager
def _without_indexes(model: type[Model]) -> Iterator[None]:
    """Drop the indexes of a table that is filled, and create them afterwards."""
    table = model._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} SET UNLOGGED")
        cursor.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = %s AND indexname NOT IN "
            "(SELECT conname FROM pg_constraint)",
            [table],
        )
        indexes = cursor.fetchall()
        for name, _ in indexes:
            cursor.execute(f'DROP INDEX "{name}"')
    yield
    statements = [definition for _, definition in indexes]
    with _step(f"its {len(statements)} indexes"):
        _run_all(statements)


def _run_all(statements: Sequence[str]) -> None:
    """Run statements beside each other, with memory to sort in."""

    def run(statement: str) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET work_mem = '512MB'")
                cursor.execute("SET maintenance_work_mem = '1GB'")
                cursor.execute(statement)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(run, statements))
