"""``manage.py cost_report``: where the money went, for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.core.management.base import CommandParser

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.management.plain import PlainCommand, WrongArgument, parse_day
from ai_budget.models import FeatureBudget
from ai_budget.review.queries import Report, Span, cost_report
from ai_budget.review.render import RENDERERS
from ai_budget.values import SITE


class Command(PlainCommand):
    """Prints the report on stdout. Arguments that make no sense: one line on stderr, exit 2."""

    help = (
        "Show what AI calls cost: against the budget, by feature, user and model, with refusals "
        "and downgrades. Days and months are those of AI_BUDGET['TIME_ZONE']."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        # Values are checked in `handle`, where those that call_command passes arrive too.
        parser.add_argument(
            "--month", metavar="MONTH", help='a month such as 2026-10, "this" (default) or "last"'
        )
        parser.add_argument(
            "--since", metavar="DATE", help="the first day, such as 2026-10-01; instead of --month"
        )
        parser.add_argument(
            "--until",
            metavar="DATE",
            help="the day after the last one (exclusive); today is the last by default",
        )
        parser.add_argument(
            "--format", default="table", metavar="FORMAT", help=f"{_formats()}; default: table"
        )
        parser.add_argument("--feature", metavar="NAME", help="one feature or category alone")
        parser.add_argument(
            "--top", default=10, metavar="N", help="how many users and subjects; default: 10"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            renderer = _renderer(options["format"])
            span, top = _span(options), _top(options["top"])
        except WrongArgument as error:
            self.fail(str(error))
        self.write(renderer(cost_report(span, top=top)))


def _span(options: dict[str, Any]) -> Span:
    month, since, until = options["month"], options["since"], options["until"]
    if since is None and until is not None:
        raise WrongArgument("--until needs --since")
    if month is not None and since is not None:
        raise WrongArgument("give either --month or --since, not both")
    zone = conf.TIME_ZONE
    today = periods.day(periods.now(), zone).first_day
    if since is None:
        first, after = _month("this" if month is None else str(month), today)
    else:
        first, after = _days(since, until, today)
    return _between(first, after, zone, _feature(options["feature"]))


def _days(since: Any, until: Any, today: date) -> tuple[date, date]:
    first = parse_day("--since", since)
    if until is None:
        if first > today:
            raise WrongArgument(f"--since ({first}) is after today ({today})")
        return first, today + timedelta(days=1)
    after = parse_day("--until", until)
    if first >= after:
        raise WrongArgument(f"--since ({first}) must be before --until ({after})")
    return first, after


def _between(first: date, after: date, zone: ZoneInfo, feature: str) -> Span:
    try:
        since, until = periods.midnight(first, zone), periods.midnight(after, zone)
    except OverflowError:
        raise WrongArgument(f"the days from {first} to {after} are out of range") from None
    return Span(since=since, until=until, feature=feature)


def _month(text: str, today: date) -> tuple[date, date]:
    if text == "this":
        first = today.replace(day=1)
    elif text == "last":
        first = periods.previous_month(today)
    else:
        first = _first_of_month(text)
    try:
        return first, periods.next_month(first)
    except OverflowError:
        raise WrongArgument(f"--month {text} is out of range") from None


def _first_of_month(text: str) -> date:
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}", text):
        try:
            return date.fromisoformat(f"{text}-01")
        except ValueError:
            pass
    raise WrongArgument(f'--month must be such as 2026-10, "this" or "last", not {text!r}')


def _feature(name: str | None) -> str:
    if name is None or name == SITE:
        return SITE
    if FeatureBudget.objects.using(conf.LEDGER_DATABASE).filter(name=name).exists():
        return name
    raise WrongArgument(f"there is no feature {name!r}")


def _top(value: Any) -> int:
    try:
        top = int(value)
    except (TypeError, ValueError):
        top = 0
    if top < 1:
        raise WrongArgument(f"--top must be a whole number from 1 on, not {value!r}")
    return top


def _renderer(name: str) -> Callable[[Report], str]:
    try:
        return RENDERERS[name]
    except KeyError:
        raise WrongArgument(f"--format must be {_formats()}, not {name!r}") from None


def _formats() -> str:
    *others, last = RENDERERS
    return f"{', '.join(others)} or {last}"
