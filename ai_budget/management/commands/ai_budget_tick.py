"""All periodic work, for cron or a scheduler: run it every minute or so."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from ai_budget.ledger import base as ledgers


class Command(BaseCommand):
    help = "Book, at their bound, calls whose worker never came back; drop what counts no more."

    def handle(self, **options: Any) -> None:
        ledger = ledgers.current()
        settled = 0
        while batch := ledger.settle_overdue():
            settled += batch
        if settled or options["verbosity"] > 1:
            self.stdout.write(f"{settled} overdue calls settled at their bound.")
        ledger.tidy()
