"""Batches for tests: submitted, worked on by a clock that is moved, and looked up."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import ai_budget
from ai_budget import batches, periods
from ai_budget.guard.batch.rows import LEASE
from ai_budget.ledger import base as ledgers
from ai_budget.models import Batch, BatchItem, BatchSubmission, CallLog
from ai_budget.periods import Period
from ai_budget.testing import AnthropicSimulator
from ai_budget.values import BalanceKey, Balances, Status
from tests.contention.books import assert_books_agree
from tests.whole.clocks import Clock

FEATURE = "nightly"
MODEL = "claude-haiku-5-5"
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
OVER = LEASE + timedelta(seconds=1)
"""After so long a submission whose worker says nothing is anybody's."""

COUNTED = ("succeeded", "cached", "errored", "canceled", "expired", "refused")

HANDED: list[batches.Result] = []
"""What ``take`` was called with."""


@contextmanager
def standing_still() -> Iterator[Clock]:
    """Let the budget's clock stand still until it is moved, with nothing handed yet."""
    clock = Clock()
    HANDED.clear()
    with periods.override_clock(lambda: clock.at):
        yield clock


def take(result: batches.Result) -> None:
    """Be a callback that remembers."""
    HANDED.append(result)


TAKE = f"{__name__}.take"


def asked(prompt: str, **params: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], **params}


def submit(*requests: Any, **options: Any) -> Batch:
    """Submit requests, or three where none are given; each finds its own answer."""
    given: dict[str, Any] = {"feature": FEATURE, "model": MODEL, "max_tokens": 50, **options}
    batch: Batch = ai_budget.submit_batch(requests or ["one", "two", "three"], **given)
    return batch


def work() -> None:
    """Do what is due, as one worker would."""
    for submission_id in batches.due():
        batches.advance(submission_id)
    batches.tidy()


def later(clock: Clock, by: timedelta = 6 * MINUTE) -> None:
    """Let time pass, and do what is due then."""
    clock.at += by
    work()


def sent(*requests: Any, **options: Any) -> Batch:
    """Submit, and have it sent."""
    batch = submit(*requests, **options)
    work()
    assert submission_of(batch).status == "sent"
    return batch


def over(clock: Clock, *requests: Any, **options: Any) -> Batch:
    """Submit, and have it done with."""
    batch = sent(*requests, **options)
    later(clock)
    return now(batch)


def now(batch: Batch) -> Batch:
    """Return a batch as it is now."""
    return Batch.objects.get(pk=batch.pk)


def submission_of(batch: Batch) -> BatchSubmission:
    """Return the only submission of a batch, as it is now."""
    return BatchSubmission.objects.select_related("batch").get(batch=batch)


def items_of(batch: Batch) -> list[BatchItem]:
    return list(BatchItem.objects.filter(batch=batch).order_by("position"))


def statuses(batch: Batch) -> list[str]:
    return [item.status for item in items_of(batch)]


def calls_of(batch: Batch) -> list[CallLog]:
    """Return what the items of a batch were booked as, in their order."""
    found = {call.call_id: call for call in CallLog.objects.exclude(call_id=batch.call_id)}
    return [found[item.call_id] for item in items_of(batch) if item.call_id in found]


def reservation_of(batch: Batch) -> CallLog:
    return CallLog.objects.get(call_id=batch.call_id)


def bill(api: AnthropicSimulator) -> int:
    """Return what the provider charges for everything, in nano-dollars."""
    return sum(ai_budget.price(it.model, it.usage, batch=True) for it in api.billed)


def creations(api: AnthropicSimulator) -> int:
    """Return how many batches the API was asked to make, whether it did or not."""
    return sum((it.method, it.path) == ("POST", "/v1/messages/batches") for it in api.requests)


def assert_counted(batch: Batch) -> None:
    """The batch counts what its items are, and the ledger holds and has booked the same."""
    batch = now(batch)
    items = items_of(batch)
    ended = Counter(item.status for item in items)
    assert {name: getattr(batch, name) for name in COUNTED} == {
        name: ended[name] for name in COUNTED
    }
    assert batch.total == len(items)
    held = sum(item.reserved_nanousd for item in items if item.status == "open")
    booked = sum(call.cost_nanousd or 0 for call in calls_of(batch))
    row = reservation_of(batch)
    if row.status == Status.RESERVED:
        assert (row.reserved_nanousd, row.counted) == (held, ended["open"])
    assert batch.held_nanousd == held
    assert batch.spent_nanousd == booked + (row.cost_nanousd or 0)
    assert_books_agree()


def assert_settled(batch: Batch, api: AnthropicSimulator) -> None:
    """The batch is finished, holds nothing, and costs what the provider charges."""
    assert_counted(batch)
    batch = now(batch)
    assert batch.status == Batch.Status.FINISHED
    assert batch.held_nanousd == 0
    assert batch.spent_nanousd == sum(call.cost_nanousd or 0 for call in calls_of(batch))
    assert batch.spent_nanousd == bill(api)
    assert not CallLog.objects.filter(status=Status.RESERVED).exists()


def site(batch: Batch) -> Balances:
    """Return what the ledger has for the whole site on the day of a batch."""
    assert batch.day is not None
    key = BalanceKey("*", Period.DAY, batch.day)
    return ledgers.current().balances([key]).get(key, Balances())


@contextmanager
def page_in_between() -> Iterator[str]:
    """Yield the address of a proxy that answers everything with a page of its own."""
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<p>Sign in to the network</p>")

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
