"""All periodic work, for cron or a scheduler: run it every minute or so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.base import Ledger
from ai_budget.management.plain import PlainCommand


class Command(PlainCommand):
    """What cannot be done now is one line of error, exit 2, and is done by the next run."""

    help = "Book, at their bound, calls whose worker never came back; drop what counts no more."

    def handle(self, **options: Any) -> None:
        ledger = ledgers.current()
        failures: list[str] = []
        try:
            with _noted(failures):
                self._settle_overdue(ledger, always_say=options["verbosity"] > 1)
        finally:
            # A call that cannot be booked holds nothing else up.
            with _noted(failures):
                ledger.tidy()
        if failures:
            self.fail(" ".join(failures))

    def _settle_overdue(self, ledger: Ledger, *, always_say: bool) -> None:
        settled = 0
        try:
            while batch := ledger.settle_overdue():
                settled += batch
        finally:
            if settled or always_say:
                self.print(f"{settled} overdue calls settled at their bound.")


@contextmanager
def _noted(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except (CallInsideTransaction, LedgerUnavailable) as error:
        message = str(error)
        if message not in failures:  # one cause may keep two things from being done
            failures.append(message)
