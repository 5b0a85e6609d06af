"""``manage.py sort_notes``: what cron or Celery beat starts every night."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

import ai_budget
from example_project.desk import nightly
from example_project.desk.templatetags.desk import usd


class Command(BaseCommand):
    """Ends at once: the tick sends the batch and brings its results."""

    help = "Have the notes at the desk sorted by a batch, at half the price. Safe to run twice."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--results",
            action="store_true",
            help="show what came of the last night, and submit nothing",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            if options["results"]:
                self._show_results()
            else:
                self._submit()
        except ai_budget.AIBudgetError as error:
            raise CommandError(str(error)) from None

    def _submit(self) -> None:
        batch = nightly.sort_notes()
        if batch is None:
            self.stdout.write("There is no note to sort.")
            return
        self.stdout.write(
            f"Batch {batch.pk}: {_notes(batch.total)}, {usd(batch.held_usd)} held, "
            f"{usd(batch.spent_usd)} spent."
        )
        if batch.refused:
            self.stdout.write(
                f"The budget has no room for {_notes(batch.refused)}; the next night tries again."
            )

    def _show_results(self) -> None:
        batch = nightly.latest()
        if batch is None:
            self.stdout.write("There was no night yet.")
            return
        for result in batch.results():
            came = result.text if result.ok else result.error
            self.stdout.write(f"{result.key:>6}  {result.status:<9}  {usd(result.cost)}  {came}")
        self.stdout.write(f"{batch.succeeded} of {batch.total} sorted for {usd(batch.spent_usd)}.")


def _notes(count: int) -> str:
    return "1 note" if count == 1 else f"{count} notes"
