"""``manage.py ai_budget_purge``: calls of days long gone deleted, their sums kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import date
from typing import Any

from django.core.management.base import CommandParser

from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.management.plain import PlainCommand, WrongArgument, parse_day
from ai_budget.review import purging
from ai_budget.review.purging import Obstacle

HELD_UP = 1
"""The exit code where a day is in the way that is not over yet."""

_EARLIEST = date(1970, 1, 1)
_MOST_AT_ONCE = 100_000


class Command(PlainCommand):
    """Says what was deleted on stdout, and on stderr what is in the way."""

    help = (
        "Delete the calls of days before a date, and their texts; what they add up to is kept. "
        "Each run goes on where the last one ended."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        # Values are checked in `handle`, where those that call_command passes arrive too.
        parser.add_argument(
            "--before",
            required=True,
            metavar="DATE",
            help="the first day to keep, such as 2026-10-01, in AI_BUDGET['TIME_ZONE']",
        )
        parser.add_argument(
            "--batch-size",
            default=5_000,
            metavar="N",
            help="how many calls to delete in one transaction; default: 5000",
        )
        parser.add_argument(
            "--max-seconds",
            metavar="SECONDS",
            help="end after that time, between two transactions",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="delete nothing: print what would be deleted"
        )

    def handle(self, **options: Any) -> None:
        try:
            before = parse_day("--before", options["before"])
            batch_size = _batch_size(options["batch_size"])
            max_seconds = _max_seconds(options["max_seconds"])
            if before < _EARLIEST:
                raise WrongArgument(f"--before ({before}) is out of range")
            if before > (last := purging.latest()):
                raise WrongArgument(
                    f"--before ({before}) is after {last}: balances are added up from the calls "
                    "since"
                )
            if options["dry_run"]:
                self._show(before)
            else:
                self._purge(before, batch_size=batch_size, max_seconds=max_seconds)
        except (WrongArgument, CallInsideTransaction, LedgerUnavailable) as error:
            self.fail(str(error))

    def _show(self, before: date) -> None:
        by_month = purging.purgeable(before)
        for month, calls in by_month.items():
            self.print(f"{month:%Y-%m}  {calls:>15,}")
        self.print(f"{_calls(sum(by_month.values()))} before {before} would be deleted.")
        obstacle = purging.obstacle_before(before)
        if obstacle is not None:
            self.fail(_in_the_way(obstacle), code=HELD_UP)

    def _purge(self, before: date, *, batch_size: int, max_seconds: float | None) -> None:
        progress = self._progress(before) if self.stderr.isatty() else lambda deleted: None
        try:
            ended = purging.purge(
                before, batch_size=batch_size, max_seconds=max_seconds, tell=progress
            )
        finally:
            progress(None)
        self.print(f"{_calls(ended.deleted)} before {before} deleted; what they add up to is kept.")
        if ended.obstacle is not None:
            self.fail(_in_the_way(ended.obstacle), code=HELD_UP)
        left = sum(purging.purgeable(before).values()) if ended.out_of_time else 0
        if left:
            self.print(f"The time is over: {_are(left)} left. Run it again to go on.")

    def _progress(self, before: date) -> Callable[[int | None], None]:
        """Return what draws how much is done over what it drew before, and wipes it at the end."""
        of = _calls(sum(purging.purgeable(before).values()))
        drawn = ""

        def draw(deleted: int | None) -> None:
            nonlocal drawn
            drawn = " " * len(drawn) + "\r" if deleted is None else f"{deleted:,} of {of} deleted"
            self.stderr.write(f"\r{drawn}", lambda text: text, ending="")
            self.stderr.flush()

        return draw


def _in_the_way(obstacle: Obstacle) -> str:
    reasons = []
    if obstacle.in_flight:
        reasons.append(f"{_are(obstacle.in_flight)} in flight")
    reasons += [f"batch {number} is not over" for number in obstacle.batches]
    return f"{obstacle.day} and later days have to wait: {', '.join(reasons)}"


def _calls(number: int) -> str:
    return "1 call" if number == 1 else f"{number:,} calls"


def _are(number: int) -> str:
    return f"{_calls(number)} {'is' if number == 1 else 'are'}"


def _batch_size(value: Any) -> int:
    text = str(value)
    if re.fullmatch("[0-9]{1,6}", text) and 1 <= int(text) <= _MOST_AT_ONCE:
        return int(text)
    raise WrongArgument(
        f"--batch-size must be a whole number from 1 to {_MOST_AT_ONCE}, not {value!r}"
    )


def _max_seconds(value: Any) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1
    if 0 <= seconds < math.inf:
        return seconds
    raise WrongArgument(f"--max-seconds must be seconds, 0 or more, not {value!r}")
