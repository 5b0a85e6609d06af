"""``manage.py cost_report``: where the money went, for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.core.validators import validate_email

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.management.plain import PlainCommand, WrongArgument, parse_day
from ai_budget.models import FeatureBudget
from ai_budget.review.focus import focus_lines
from ai_budget.review.mailing import message_of
from ai_budget.review.render import RENDERERS
from ai_budget.review.report import cost_report
from ai_budget.review.spans import Span
from ai_budget.values import SITE

NOT_SENT = 1
"""The exit code of a report that no mail server took."""

_PIECE = 65_536

_Printed = Callable[[Span, int], Iterable[str]]


def _of_report(name: str) -> _Printed:
    return lambda span, top: RENDERERS[name](cost_report(span, top=top))


FORMATS: Mapping[str, _Printed] = {
    **{name: _of_report(name) for name in RENDERERS},
    "focus": lambda span, _top: focus_lines(span),
}
"""What prints each format, in pieces."""


class Command(PlainCommand):
    """Prints the report on stdout. Arguments that make no sense: one line on stderr, exit 2."""

    help = (
        "Show what AI calls cost: against budget and plan, by category, feature, user and model, "
        "week by week and beside the month before, with a forecast, savings and what needs "
        "attention. Days and months are those of AI_BUDGET['TIME_ZONE']."
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
        parser.add_argument("--format", metavar="FORMAT", help=f"{_formats()}; default: table")
        parser.add_argument("--feature", metavar="NAME", help="one feature or category alone")
        parser.add_argument(
            "--top", default=10, metavar="N", help="how many users and subjects; default: 10"
        )
        parser.add_argument(
            "--email",
            action="append",
            metavar="ADDRESS",
            help="send the report there instead, with a page that has its charts; repeatable",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        self.verbosity = options["verbosity"]
        try:
            addresses = _addresses(options["email"])
            printed = _printed(options["format"], mailed=bool(addresses))
            span, top = _span(options), _top(options["top"])
        except WrongArgument as error:
            self.fail(str(error))
        if addresses:
            self._send(span, top, addresses)
            return
        for piece in _joined(printed(span, top)):
            self.write(piece)

    def _send(self, span: Span, top: int, addresses: list[str]) -> None:
        message = message_of(cost_report(span, top=top), to=addresses)
        try:
            message.send()
        except Exception as error:
            # Each backend has errors of its own; what a library's say may hold more than a reason.
            reason = str(error) if isinstance(error, OSError) else ""
            lines = " ".join(f"{type(error).__name__} {reason}".split())
            self.fail(f"the report could not be sent: {lines}", code=NOT_SENT)
        if self.verbosity:
            self.print(f"Sent to {', '.join(addresses)}.")


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


def _addresses(values: Any) -> list[str]:
    given = [values] if isinstance(values, str) else list(values or ())
    addresses = list(dict.fromkeys(str(value) for value in given))
    for address in addresses:
        try:
            validate_email(address)
        except ValidationError:
            raise WrongArgument(f"--email {address!r} is no address") from None
    return addresses


def _printed(name: Any, *, mailed: bool) -> _Printed:
    if mailed and name is not None:
        raise WrongArgument("--email sends text and a page: leave out --format")
    name = "table" if name is None else name
    try:
        return FORMATS[name]
    except KeyError:
        raise WrongArgument(f"--format must be {_formats()}, not {name!r}") from None


def _formats() -> str:
    *others, last = FORMATS
    return f"{', '.join(others)} or {last}"


def _joined(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the same text in pieces that are worth a write each."""
    kept: list[str] = []
    size = 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size >= _PIECE:
            yield "".join(kept)
            kept, size = [], 0
    yield "".join(kept)
