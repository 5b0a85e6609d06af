"""All periodic work, for cron or a scheduler: run it every minute or so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.core.management.base import CommandParser

from ai_budget import batches
from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.guard.overdue import settle_overdue
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.base import Ledger
from ai_budget.ledger.set_aside import SetAside
from ai_budget.management.plain import PlainCommand
from ai_budget.review import alerts, deliveries, rollups

log = logging.getLogger("ai_budget")


_MOST_NAMED = 5


class Command(PlainCommand):
    """What cannot be done now is one line of error, exit 2, and is done by the next run."""

    help = (
        "Send batches and read their results; book, at their bound, calls whose worker never came "
        "back; drop what counts no more; bring totals up to date; raise alerts and deliver "
        "them."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--leave-batches",
            action="store_true",
            help="leave sending batches and reading their results to another queue",
        )

    def handle(self, **options: Any) -> None:
        ledger = ledgers.current()
        work, aside = _Work(), SetAside()
        # Batches first, so that what was never sent is released, and not booked for being late.
        if not options["leave_batches"]:
            with work.going_on():
                for submission_id in batches.due():
                    with work.going_on():
                        batches.advance(submission_id)
        with work.going_on():
            batches.tidy()
        with work.going_on():
            self._settle_overdue(ledger, aside, always_say=options["verbosity"] > 1)
        with work.going_on():
            ledger.tidy(aside)
        with work.going_on():
            rollups.add_up(aside=aside)
        with work.going_on():
            alerts.evaluate(aside=aside)
        # Last, so that a notifier whose server is dead holds nothing else up.
        with work.going_on():
            deliveries.deliver(aside=aside)
        if aside.names:
            some = ", ".join(map(ascii, aside.names[:_MOST_NAMED]))
            work.failures.append(f"Set aside: {some}. An alert names each.")
        if work.faults:
            raise work.faults[0]
        if work.failures:
            self.fail(" ".join(work.failures))

    def _settle_overdue(self, ledger: Ledger, aside: SetAside, *, always_say: bool) -> None:
        settled = 0
        try:
            while batch := settle_overdue(ledger, aside):
                settled += batch
        finally:
            if settled or always_say:
                self.print(f"{settled} overdue calls settled at their bound.")


class _Work:
    """Steps of which none holds another up, and what kept them from being done.

    ``failures`` pass, and are what the next run is for; ``faults`` are mistakes.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.faults: list[Exception] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        try:
            yield
        except (CallInsideTransaction, LedgerUnavailable) as error:
            message = str(error)
            if message not in self.failures:  # one cause may keep two things from being done
                self.failures.append(message)
        except Exception as error:
            log.error("A step of the periodic work failed: %s", type(error).__name__)
            self.faults.append(error)
