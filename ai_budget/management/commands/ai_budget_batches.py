"""``manage.py ai_budget_batches``: batches listed, watched, canceled and submitted again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandParser
from django.db import connections
from django.db.models import Count, Q, QuerySet

from ai_budget import batches as verbs
from ai_budget import money
from ai_budget.conf import conf
from ai_budget.exceptions import AIBudgetError, LedgerUnavailable
from ai_budget.ledger.connection import retry
from ai_budget.management.plain import PlainCommand, WrongArgument
from ai_budget.models import Batch, BatchSubmission

INTERRUPTED = 130
"""The exit code of a watch that Ctrl-C ended: what comes after it must not take it for the end."""

_EVERY_OPEN_ONE = "open"
_STATES = ("succeeded", "cached", "errored", "canceled", "expired", "refused")
_FORMATS = ("table", "json")
_BAR = 20
_NARROWEST = 20

Found = TypeVar("Found")


class Command(PlainCommand):
    """Arguments that make no sense, and what is refused: one line on stderr, exit 2."""

    help = (
        "List the batches that are open and the most recent ones; watch them, cancel one, or "
        "submit what was not answered of one again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        # Values are checked in `handle`, where those that call_command passes arrive too.
        parser.add_argument(
            "--watch",
            nargs="?",
            const=_EVERY_OPEN_ONE,
            metavar="ID",
            help="show the progress of one batch, or of all that are open, until they are over",
        )
        parser.add_argument(
            "--interval",
            default=5,
            metavar="SECONDS",
            help="how often to look while watching; default: 5",
        )
        parser.add_argument(
            "--cancel", metavar="ID", help="cancel what is not answered yet of a batch"
        )
        parser.add_argument(
            "--resubmit",
            metavar="ID",
            help="submit what was not answered of a finished batch, as a batch of its own",
        )
        parser.add_argument(
            "--limit", default=20, metavar="N", help="how many recent batches to list; default: 20"
        )
        parser.add_argument(
            "--format", default="table", metavar="FORMAT", help="table (default) or json"
        )

    def handle(self, **options: Any) -> None:
        try:
            self._follow(options)
        except (WrongArgument, LedgerUnavailable) as error:
            self.fail(str(error))

    def _follow(self, options: dict[str, Any]) -> None:
        if options["format"] not in _FORMATS:
            raise WrongArgument(f"--format must be table or json, not {options['format']!r}")
        verbs_given = [
            name for name in ("watch", "cancel", "resubmit") if options[name] is not None
        ]
        if len(verbs_given) > 1:
            raise WrongArgument(f"give either --{verbs_given[0]} or --{verbs_given[1]}, not both")
        if verbs_given and options["format"] == "json":
            raise WrongArgument("--format json is for the list alone")
        if options["watch"] is not None:
            self._watch(options["watch"], interval=_seconds("--interval", options["interval"]))
        elif options["cancel"] is not None:
            self._cancel(_batch("--cancel", options["cancel"]))
        elif options["resubmit"] is not None:
            self._resubmit(_batch("--resubmit", options["resubmit"]))
        else:
            self._list(_number("--limit", options["limit"]), options["format"])

    # The list

    def _list(self, limit: int, form: str) -> None:
        found = _read(lambda: _open_and_recent(limit))
        if form == "json":
            self.write(json.dumps([_as_data(batch) for batch in found], indent=2) + "\n")
        elif not found:
            self.print("There are no batches.")
        else:
            for line in _table(found):
                self.print(line)

    # Watching

    def _watch(self, which: Any, *, interval: float) -> None:
        wanted = (
            [batch.pk for batch in _read(lambda: list(_batches().filter(_IS_OPEN)))]
            if which == _EVERY_OPEN_ONE
            else [_batch("--watch", which).pk]
        )
        if not wanted:
            self.print("No batch is open.")
            return
        show = self._redraw if self._can_redraw() else self._say_what_is_new
        shown: list[str] = []
        try:
            while True:
                found = _read(lambda: list(_batches().filter(pk__in=wanted).order_by("pk")))
                shown = show(found, shown)
                if all(batch.status == Batch.Status.FINISHED for batch in found):
                    break
                pause(interval)
        except KeyboardInterrupt:
            self.fail("stopped watching; the batches go on", code=INTERRUPTED)
        for batch in found:
            self.print(_ending(batch))

    def _can_redraw(self) -> bool:
        return self.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def _redraw(self, found: Sequence[Batch], shown: list[str]) -> list[str]:
        """Draw a line a batch over those that were drawn before."""
        # A line that wraps could not be found again.
        width = max(shutil.get_terminal_size().columns - 1, _NARROWEST)
        lines = [_bar_line(batch)[:width] for batch in found]
        up = f"\x1b[{len(shown)}A" if shown else ""
        self.write(up + "".join(f"\r\x1b[2K{line}\n" for line in lines))
        return lines

    def _say_what_is_new(self, found: Sequence[Batch], shown: list[str]) -> list[str]:
        lines = [_progress_line(batch) for batch in found]
        for line in lines:
            if line not in shown:
                self.print(line)
        return lines

    # Decisions

    def _cancel(self, batch: Batch) -> None:
        if batch.status == Batch.Status.FINISHED:
            raise WrongArgument(f"batch {batch.pk} is finished")
        verbs.cancel(batch)
        self.print(f"Batch {batch.pk} is being canceled; open items: {batch.open:,}.")

    def _resubmit(self, batch: Batch) -> None:
        later = batch.resubmitted_as.using(conf.LEDGER_DATABASE).order_by("pk").first()
        if later is not None:
            raise WrongArgument(f"batch {batch.pk} was submitted again as batch {later.pk} already")
        try:
            created = verbs.resubmit(batch)
        except (AIBudgetError, ImproperlyConfigured, TypeError, ValueError) as error:
            self.fail(str(error))
        self.print(
            f"Batch {batch.pk} is submitted again as batch {created.pk}; items: "
            f"{created.total:,}, held: {_usd(created.held_nanousd)}."
        )


def pause(seconds: float) -> None:
    """Wait for the next look."""
    time.sleep(seconds)


# Arguments ---------------------------------------------------------------------------------------


def _batch(option: str, value: Any) -> Batch:
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise WrongArgument(f"{option} takes the number of a batch, not {value!r}") from None
    found = _read(_batches().filter(pk=number).first)
    if found is None:
        raise WrongArgument(f"there is no batch {number}")
    return found


def _number(option: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise WrongArgument(f"{option} must be a whole number from 1 on, not {value!r}")
    return number


def _seconds(option: str, value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise WrongArgument(f"{option} must be seconds, more than 0 and less than a day")
    return seconds


# Reading -----------------------------------------------------------------------------------------

_IS_OPEN = ~Q(status=Batch.Status.FINISHED)
_IS_UNCERTAIN = Q(submissions__status=BatchSubmission.Status.UNCERTAIN)


def _batches() -> QuerySet[Batch]:
    """Return batches, each with how many of its submissions are uncertain."""
    rows: QuerySet[Batch] = Batch.objects.using(conf.LEDGER_DATABASE).order_by("-pk")
    return rows.annotate(uncertain=Count("submissions", filter=_IS_UNCERTAIN))


def _open_and_recent(limit: int) -> list[Batch]:
    """Return the most recent batches, and all that are open however old, the newest first."""
    recent = list(_batches()[:limit])
    older = _batches().filter(_IS_OPEN, pk__lt=recent[-1].pk) if recent else []
    return [*recent, *older]


def _read(query: Callable[[], Found]) -> Found:
    return retry(connections[conf.LEDGER_DATABASE], query)


# Showing -----------------------------------------------------------------------------------------


def _as_data(batch: Batch) -> dict[str, Any]:
    """Return a batch as plain values. New keys may come; those that are here stay."""
    return {
        "id": batch.pk,
        "feature": batch.feature_id,
        "user_id": None if batch.user_id is None else str(batch.user_id),
        "subject": batch.subject,
        "status": batch.status,
        "uncertain_submissions": _uncertain(batch),
        "items": batch.total,
        "open": batch.open,
        **{state: getattr(batch, state) for state in _STATES},
        "reserved_usd": format(batch.reserved_usd, "f"),
        "held_usd": format(batch.held_usd, "f"),
        "spent_usd": format(batch.spent_usd, "f"),
        "created_at": batch.created_at.isoformat(),
        "finished_at": None if batch.finished_at is None else batch.finished_at.isoformat(),
    }


def _table(found: Sequence[Batch]) -> list[str]:
    """Return aligned columns; the first three hold names, the others figures."""
    rows = [["Batch", "Feature", "Status", "Items over", "Held", "Spent", "Created (UTC)"]]
    rows += [
        [
            str(batch.pk),
            batch.feature_id,
            _status(batch),
            f"{_over(batch):,} of {batch.total:,}",
            _usd(batch.held_nanousd),
            _usd(batch.spent_nanousd),
            f"{batch.created_at:%Y-%m-%d %H:%M}",
        ]
        for batch in found
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    aligned = ["<", "<", "<", ">", ">", ">", ">"]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _bar_line(batch: Batch) -> str:
    """Return a line for a terminal, what matters most first: it is cut where it does not fit."""
    filled = _BAR * _over(batch) // batch.total if batch.total else 0
    bar = "#" * filled + "-" * (_BAR - filled)
    uncertain = _uncertain(batch)
    figures = [
        f"{_over(batch):,} of {batch.total:,}",
        *([f"{uncertain} uncertain"] if uncertain else []),
        f"{money.format_usd(batch.held_nanousd)} held",
        f"{money.format_usd(batch.spent_nanousd)} spent",
    ]
    return f"{batch.pk} {batch.feature_id} [{bar}] {_percent(batch):>3} %  {', '.join(figures)}"


def _progress_line(batch: Batch) -> str:
    return (
        f"Batch {batch.pk} {batch.feature_id}: {_percent(batch)} %, "
        f"{_over(batch):,} of {batch.total:,} items over, {_usd(batch.held_nanousd)} held, "
        f"{_usd(batch.spent_nanousd)} spent, {_status(batch)}"
    )


def _ending(batch: Batch) -> str:
    numbers = [f"{number:,} {state}" for state in _STATES if (number := getattr(batch, state))]
    items = ", ".join(numbers) or "no items"
    return f"Batch {batch.pk} is finished: {items}; {_usd(batch.spent_nanousd)} spent."


def _status(batch: Batch) -> str:
    label = Batch.Status(batch.status).name.lower()
    uncertain = _uncertain(batch)
    return f"{label}, {uncertain} uncertain" if uncertain else label


def _uncertain(batch: Batch) -> int:
    return int(getattr(batch, "uncertain", 0))


def _over(batch: Batch) -> int:
    return batch.total - batch.open


def _percent(batch: Batch) -> int:
    return 100 * _over(batch) // batch.total if batch.total else 0


def _usd(nanousd: int) -> str:
    return money.format_usd(nanousd, decimals=4)
