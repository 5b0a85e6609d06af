"""A batch from its submission to its last row, and its rows in a bare bulk_create beside it.

    python -m benchmarks.batches [--items 100000] [--bytes 300] [--databases postgresql]

The items are prompts of so many bytes, from a generator, and all of them are answered. The local
API has a process of its own, and so has every step: each shows what memory it needs at most, in
MB, and how much of that Python, Django and the SDK had when it began.

- preparing and reserving: ``submit_batch`` from its call to its return;
- sending, and collecting and settling: ``ai_budget.batches.advance`` on what is due, as a worker
  does it, from its call to its return, with all that it reads from the API;
- reading the results alone, and forgetting them: what the API and the SDK take of that;
- ``CallLog.objects.bulk_create`` of the very rows that were booked, made beforehand, into the
  same table, emptied, with as many in a transaction as settling has.

Then the books: what the rows add up to is what the local API billed, at half of its price; nothing
is held any more; and no balance differs from its rows. A line says what it is meant to reach, if
anything, and whether it does. The servers are found as ``tests.settings`` says.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from django.db import connection

from ai_budget import money
from benchmarks.crew import crew
from benchmarks.stage import LocalApi, configure, empty_database, in_own_process, local_api

FEATURE = "benchmark"
MODEL = "claude-haiku-5-5"
MOST_MEMORY = 300.0
LEAST_SETTLED = 2_000.0
MOST_TIMES_BARE = 3.0
SYSTEM = "Answer with one word: lending, opening hours, reservations, catalogue, praise or other."
QUESTION = (
    "I have had a book about lighthouses since last month and would like to keep it for another "
    "two weeks. Do I have to come by, or is a message enough? And what would it cost me if I "
    "brought it back a day too late? "
)
FAR_USD = "100000"
"""A limit that no run comes near to."""


def main() -> None:
    options = _options()
    if options.database is None:
        for database in options.databases.split(","):
            given = ["--items", str(options.items), "--bytes", str(options.bytes)]
            in_own_process("benchmarks.batches", database, given)
        return
    configure(options.database)
    with empty_database(), local_api(history=None) as api:
        _measure(options, api)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=300, help="of each prompt")
    parser.add_argument("--databases", default="postgresql")
    parser.add_argument("--database", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(options: argparse.Namespace, api: LocalApi) -> None:
    settings = {
        "API_KEY": "local",
        "BASE_URL": api.base_url,
        "DAILY_LIMIT_USD": FAR_USD,
        "MONTHLY_LIMIT_USD": FAR_USD,
    }

    def step(task: Callable[..., Taken], *given: Any) -> Taken:
        with crew(1, database=options.database) as hands:
            taken: Taken = hands.run(task, *given, settings=settings)[0]
        return taken

    print(f"\n{connection.display_name}, {options.items:,} items of {options.bytes:,} bytes")
    prepared = step(prepare, options.items, options.bytes)
    prepared.line("preparing and reserving", memory=MOST_MEMORY)
    step(send).line("sending", memory=MOST_MEMORY)
    settled = step(settle)
    settled.line("collecting and settling", least=LEAST_SETTLED, memory=MOST_MEMORY)
    step(read).line("reading results alone")
    _print_books(api)
    bare = step(create_bare)
    bare.line("bare bulk_create")
    times = settled.seconds / bare.seconds
    within = _within(times, MOST_TIMES_BARE)
    print(f"  settling takes {times:.2f} times as long as bulk_create{within}")


# Steps, each in a process of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """Seconds that a step took for so many items, and MB of memory before it and at most."""

    items: int
    seconds: float
    before: float
    most: float

    def line(self, name: str, *, least: float | None = None, memory: float | None = None) -> None:
        """Print it, with what it is to reach."""
        rate, reached = self.items / self.seconds, ""
        if least is not None:
            reached = f" ({'reaches' if rate >= least else 'MISSES'} {least:,.0f})"
        within = "" if memory is None else _within(self.most, memory)
        print(f"  {name:<24} {self.seconds:7.2f} s  {rate:9,.0f} items/s{reached},", end="")
        print(f" {self.most:.0f} MB at most{within}, {self.before:.0f} before", flush=True)


class _Watch:
    """Adds up the time of what is done under it, beside the memory of the whole process."""

    def __init__(self) -> None:
        self._before = _peak_mb()
        self._seconds = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._begun

    def taken(self, items: int) -> Taken:
        return Taken(items=items, seconds=self._seconds, before=self._before, most=_peak_mb())


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def prepare(start: Callable[[], object], number: int, items: int, size: int) -> Taken:
    """Submit a batch of so many items, each of so many bytes."""
    import ai_budget
    from ai_budget.guard.clients import bare

    bare()  # the SDK takes a second to be imported
    watch = _Watch()
    with watch:
        ai_budget.submit_batch(
            _requests(items, size), feature=FEATURE, model=MODEL, system=SYSTEM, max_tokens=16
        )
    return watch.taken(items)


def _requests(items: int, size: int) -> Iterator[tuple[str, str]]:
    said = QUESTION * (size // len(QUESTION) + 1)
    for place in range(items):
        yield f"question-{place}", f"Reader {place}: {said}"[:size]


def send(start: Callable[[], object], number: int) -> Taken:
    """Send all submissions of the batch."""
    from ai_budget import batches
    from ai_budget.guard.clients import bare
    from ai_budget.models import Batch

    bare()
    watch = _Watch()
    for submission in batches.due():
        with watch:
            batches.advance(submission)
    return watch.taken(Batch.objects.get().total)


def settle(start: Callable[[], object], number: int) -> Taken:
    """Look after the batch until it is over; the time between two looks is not counted."""
    from ai_budget import batches
    from ai_budget.guard.clients import bare
    from ai_budget.models import Batch

    bare()
    watch = _Watch()
    while Batch.objects.get().status == Batch.Status.OPEN:
        for submission in batches.due():
            with watch:
                batches.advance(submission)
        time.sleep(0.1)
    return watch.taken(Batch.objects.get().succeeded)


def read(start: Callable[[], object], number: int) -> Taken:
    """Read all results, and forget them."""
    from ai_budget.guard.batch import api
    from ai_budget.guard.clients import bare
    from ai_budget.models import BatchSubmission

    bare()
    watch = _Watch()
    lines = 0
    for api_id in BatchSubmission.objects.values_list("api_id", flat=True):
        with watch:
            lines += sum(1 for _ in api.results(str(api_id)))
    return watch.taken(lines)


def create_bare(start: Callable[[], object], number: int) -> Taken:
    """Write the rows that were booked once more, with nothing but Django."""
    from django.core.management.color import no_style
    from django.db import transaction

    from ai_budget.guard.batch.rows import ROWS_AT_ONCE, chunks
    from ai_budget.models import Batch, CallLog

    rows = list(CallLog.objects.exclude(call_id=Batch.objects.get().call_id).order_by("pk"))
    for row in rows:
        row.pk, row._state.adding = None, True
    emptied = connection.ops.sql_flush(no_style(), [CallLog._meta.db_table])
    connection.ops.execute_sql_flush(emptied)
    watch = _Watch()
    for some in chunks(rows, ROWS_AT_ONCE):
        with watch, transaction.atomic():
            CallLog.objects.bulk_create(some)
    return watch.taken(len(rows))


# Books


def _print_books(api: LocalApi) -> None:
    """Compare what was booked with what the API billed, at half of its price."""
    from django.db.models import Sum

    import ai_budget
    from ai_budget.ledger import base as ledgers
    from ai_budget.models import Batch, CallLog, SpendWindow

    batch = Batch.objects.get()
    bills = api.billed()
    bill = sum(ai_budget.price(model, usage, batch=True) for model, usage in bills)
    full = sum(ai_budget.price(model, {**usage, "service_tier": ""}) for model, usage in bills)
    booked = CallLog.objects.aggregate(cost=Sum("cost_nanousd"))["cost"]
    held = SpendWindow.objects.aggregate(held=Sum("held_nanousd"))["held"]
    differences = ledgers.current().differences(batch.created_at.date())
    exact = bill == booked == batch.spent_nanousd and batch.succeeded == batch.total
    print(f"  {batch.succeeded:,} of {batch.total:,} answered; booked {_usd(booked)}", end="")
    print(f" of {_usd(batch.reserved_nanousd)} reserved, the API's bill {_usd(bill)}", end="")
    print(f" {'to the nano-dollar' if exact else '(MUST BE THE SAME)'};", end="")
    print(f" {bill / full:.1%} of the ordinary price; held {_usd(held)}", end="")
    print(f"{_zero(held + batch.held_nanousd)}, {len(differences)} differences", end="")
    print(_zero(len(differences)), flush=True)


def _within(value: float, most: float) -> str:
    return f" ({'keeps to' if value <= most else 'MISSES'} {most:g})"


def _zero(value: int) -> str:
    return " (MUST BE 0)" if value else ""


def _usd(nanousd: int) -> str:
    return money.format_usd(nanousd, decimals=6)


if __name__ == "__main__":
    main()
