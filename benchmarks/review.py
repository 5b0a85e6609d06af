"""Pages, reports and periodic work over ten million calls, and plain SQL over the calls beside it.

    python -m benchmarks.review [--rows 10000000] [--keep]

The calls are those of ``benchmarks.busy_log``: 90 days of them, in PostgreSQL, by 100,000 users
with 50 features. Their totals are made by what ``ai_budget_rebuild`` calls. Then, warm, in one
process, with the test client and as a superuser: what is printed is the median of the rounds.

Two plain aggregates over the calls stand for what the figures would cost without totals, each for
a month, and for all days: the sums by day, feature, model and status; and the users that spent
most. A ratio is of both together, for the same range: a page shows them and more. Of what a line
is meant to reach it says whether it does.

The memory of ``cost_report`` is that of a process of its own, at most and before it began, for a
day and for all days.

The database is dropped in the end, unless it is to be kept for the next run; one that was kept is
used as it is. It is PostgreSQL's alone; the server is found as ``tests.settings`` says.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from io import StringIO
from typing import Any

from benchmarks.crew import crew
from benchmarks.stage import configure

DATABASE = "test_ai_budget_review"
SETTINGS = {"API_KEY": "local"}

ROUNDS, WARM_UP = 7, 2
RAW_ROUNDS = 3
MARKS = 1_000

MOST_PAGE_MS, MOST_LIST_MS, MOST_REPORT_MS = 300.0, 100.0, 1_000.0
MOST_RATIO = 0.1
MOST_MORE_MB = 20.0
"""What a report of all days may need more than one of a day, in MB."""

SUMS = """
    SELECT day, feature_id, model, status, COUNT(*), SUM(counted), SUM(cost_nanousd),
           SUM(saved_nanousd), SUM(input_tokens), SUM(cache_read_tokens), SUM(output_tokens)
    FROM ai_budget_calllog WHERE reserved_at >= %s AND reserved_at < %s
    GROUP BY day, feature_id, model, status
"""
DEAREST = """
    SELECT user_id, SUM(counted), SUM(cost_nanousd)
    FROM ai_budget_calllog
    WHERE reserved_at >= %s AND reserved_at < %s AND user_id IS NOT NULL
    GROUP BY user_id ORDER BY 3 DESC LIMIT 10
"""

Range = tuple[date, date]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keep", action="store_true", help="leave the database for the next run")
    options = parser.parse_args()
    if options.keep:
        os.environ.setdefault("AI_BUDGET_TEST_DB_NAME", DATABASE)
    configure("postgresql")

    from django.test import override_settings

    from ai_budget import periods
    from benchmarks import busy_log

    mail = "django.core.mail.backends.locmem.EmailBackend"
    with (
        _database(keep=options.keep),
        override_settings(AI_BUDGET=SETTINGS, EMAIL_BACKEND=mail),
        periods.override_clock(lambda: busy_log.NOW),
    ):
        _make(options.rows)
        _measure()


@contextmanager
def _database(*, keep: bool) -> Iterator[None]:
    from django.test.utils import setup_databases, teardown_databases

    # Without aliases: it would read all that is in a database that was kept.
    databases = setup_databases(verbosity=0, interactive=False, keepdb=keep, serialized_aliases=[])
    try:
        yield
    finally:
        if not keep:
            teardown_databases(databases, verbosity=0)


def _make(rows: int) -> None:
    from ai_budget.models import QuarterTotal
    from ai_budget.review import rollups
    from benchmarks import busy_log

    if busy_log.made(rows):
        print(f"{rows:,} calls, kept from before")
    else:
        print(f"{rows:,} calls in {busy_log.DAYS} days")
        busy_log.make(rows)
    if not QuarterTotal.objects.exists():
        begun = time.perf_counter()
        rollups.rebuild()
        taken = time.perf_counter() - begun
        print(f"  {'totals of all calls':<32} {taken:8.1f} s  {rows / taken:,.0f} calls/s")
        busy_log.vacuum()


# What is timed


def _measure() -> None:
    from ai_budget.review import rollups

    visitor = _Visitor()
    month, all_days = _months()[1], _all_days()
    past = _months()[0]
    raw = {days: _raw(days) for days in (month, past, all_days)}
    print("warm, in milliseconds")
    page = partial(_line, most=MOST_PAGE_MS, most_ratio=MOST_RATIO)
    page("spend page, this month", visitor.page("spend"), raw=raw[month])
    page("spend page, 90 days", visitor.page("spend", range="90"), raw=raw[all_days])
    page("spend page, one feature", visitor.page("spend", feature="support-0"), raw=raw[month])
    report = partial(_line, most=MOST_REPORT_MS, raw=raw[past])
    for form in ("table", "csv", "html"):
        report(f"cost_report --month, {form}", partial(_report, past, form))
    _line("cost_report --month, focus", partial(_report, past, "focus"), raw=raw[past])
    listed = partial(_line, most=MOST_LIST_MS)
    listed("calls, first page", visitor.page("calllog_changelist"))
    listed("calls, one feature", visitor.page("calllog_changelist", feature="support-0"))
    listed("calls, a rare feature", visitor.page("calllog_changelist", feature="nightly-49"))
    listed("calls, a request id", visitor.page("calllog_changelist", q=_some_request_id()))
    _line("a user's page", visitor.page("user_spend", args=[_keen_user()]))
    _line("alerts", _evaluate)
    _line("a scrape", _scrape)
    _mark(MARKS)
    _line(f"spend page, {MARKS:,} marks behind", visitor.page("spend"), raw=raw[month])
    begun = time.perf_counter()
    rollups.add_up()
    print(f"  {f'a tick adds up {MARKS:,} marks':<32} {(time.perf_counter() - begun) * 1e3:8.0f}")
    print("memory of cost_report, in MB at most")
    for form in ("csv", "focus"):
        _memory(form)


def _months() -> tuple[Range, Range]:
    """Return the month before the present one, and that one."""
    from ai_budget import periods
    from benchmarks import busy_log

    this = busy_log.NOW.date().replace(day=1)
    return (periods.previous_month(this), this), (this, periods.next_month(this))


def _all_days() -> Range:
    from benchmarks import busy_log

    return busy_log.first_day(), busy_log.NOW.date() + timedelta(days=1)


def _raw(days: Range) -> float:
    """Time both aggregates, and return their milliseconds."""
    from django.db import connection

    bounds = [datetime.combine(day, datetime.min.time(), UTC) for day in days]

    def run(statement: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement, bounds)
            cursor.fetchall()

    sums = _median(partial(run, SUMS), rounds=RAW_ROUNDS)
    dearest = _median(partial(run, DEAREST), rounds=RAW_ROUNDS)
    print(f"  plain SQL, {days[0]} to {days[1]}: sums {sums:,.0f} ms, users {dearest:,.0f} ms")
    return sums + dearest


def _line(
    name: str,
    work: Callable[[], object],
    *,
    raw: float | None = None,
    most: float | None = None,
    most_ratio: float | None = None,
) -> None:
    taken = _median(work, rounds=ROUNDS)
    print(f"  {name:<32} {taken:8.0f}{_reach(taken, most)}", end="")
    if raw is not None:
        ratio = taken / raw
        print(f", {ratio:.3f} of plain SQL{_reach(ratio, most_ratio)}", end="")
    print(flush=True)


def _reach(value: float, most: float | None) -> str:
    return "" if most is None else f" ({'keeps to' if value <= most else 'MISSES'} {most:g})"


def _median(work: Callable[[], object], *, rounds: int) -> float:
    for _ in range(WARM_UP):
        work()
    return statistics.median(_milliseconds(work) for _ in range(rounds))


def _milliseconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1e3


class _Visitor:
    """A superuser with a browser."""

    def __init__(self) -> None:
        from django.contrib.auth import get_user_model
        from django.test import Client

        users: Any = get_user_model()._default_manager
        superuser = users.filter(is_superuser=True).first() or users.create_superuser("boss")
        self._client = Client()
        self._client.force_login(superuser)

    def page(self, name: str, *, args: list[Any] | None = None, **asked: str) -> Callable[[], None]:
        """Return what gets a page of the admin."""
        from django.urls import reverse

        address = reverse(f"admin:ai_budget_{name}", args=args)

        def get() -> None:
            response = self._client.get(address, asked)
            assert response.status_code == 200, response.status_code

        return get


def _report(days: Range, form: str) -> int:
    from django.core.management import call_command

    out = StringIO()
    call_command("cost_report", since=days[0], until=days[1], format=form, stdout=out)
    return len(out.getvalue())


def _some_request_id() -> str:
    from ai_budget.models import CallLog

    half = (CallLog.objects.order_by("-pk").values_list("pk", flat=True).first() or 0) // 2
    calls = CallLog.objects.filter(pk__gte=half).exclude(request_id="").order_by("pk")
    return str(calls.values_list("request_id", flat=True).first())


def _keen_user() -> Any:
    """Return the user that has most calls."""
    from ai_budget.models import UserTotal

    months = UserTotal.objects.filter(period="month").order_by("-calls")
    return months.values_list("user_id", flat=True).first()


def _evaluate() -> None:
    from ai_budget.review import alerts

    alerts.evaluate()


def _scrape() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from ai_budget.metrics.prometheus import BudgetCollector

    registry = CollectorRegistry()
    registry.register(BudgetCollector())
    generate_latest(registry)


def _mark(marks: int) -> None:
    """Mark the latest calls, as if they had been booked just now."""
    from django.db import connection

    columns = "reserved_at, day, user_id, subject"
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO ai_budget_totalmark ({columns}) SELECT {columns} FROM ai_budget_calllog "
            "WHERE status <> 'reserved' ORDER BY id DESC LIMIT %s",
            [marks],
        )


# Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Needed:
    """MB of a process, before it began and at most, and the characters that it printed."""

    before: float
    most: float
    characters: int


def _memory(form: str) -> None:
    first, after = _all_days()
    needed = []
    for days in ((after - timedelta(days=2), after - timedelta(days=1)), (first, after)):
        with crew(1, database="postgresql") as hands:
            needed += hands.run(print_report, days, form, settings=SETTINGS)
    day, every = needed
    more = every.most - day.most
    print(f"  {form:<6} a day {day.most:.0f} ({day.before:.0f} before), all days", end="")
    print(f" {every.most:.0f} for {every.characters / 1e6:.1f} MB of text:", end="")
    print(f" {more:+.0f}{_reach(more, MOST_MORE_MB)}", flush=True)


def print_report(start: Callable[[], object], number: int, days: Range, form: str) -> Needed:
    """Print a report into nothing; the first, of no day, is for what is imported on the way."""
    from django.core.management import call_command

    from ai_budget import periods
    from benchmarks import busy_log

    empty = (date(2026, 1, 1), date(2026, 1, 2))
    with periods.override_clock(lambda: busy_log.NOW):
        _report(empty, form)
        before = _peak_mb()
        out = _Counter()
        call_command("cost_report", since=days[0], until=days[1], format=form, stdout=out)
    return Needed(before=before, most=_peak_mb(), characters=out.characters)


class _Counter(StringIO):
    """Counts what is written, and forgets it."""

    characters = 0

    def write(self, text: str, /) -> int:
        self.characters += len(text)
        return len(text)


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
