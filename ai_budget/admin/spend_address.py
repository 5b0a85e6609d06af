"""What the address of the spend page asks for: a range of days, and whose calls.

What makes no sense in it is left out and told, and never an error: addresses are typed, kept and
sent around.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

from django.contrib.auth import get_user_model
from django.http import QueryDict
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ai_budget import periods
from ai_budget.admin.filters import models_named, tag_of
from ai_budget.conf import conf
from ai_budget.models import CallLog, DayTotal, FeatureBudget
from ai_budget.review.callers import user_by_key
from ai_budget.review.names import deleted_user
from ai_budget.review.spans import Span
from ai_budget.values import SITE

RANGES: Mapping[str, Any] = {
    "today": gettext_lazy("Today"),
    "week": gettext_lazy("Last 7 days"),
    "month": gettext_lazy("This month"),
    "last_month": gettext_lazy("Last month"),
    "30": gettext_lazy("Last 30 days"),
    "90": gettext_lazy("Last 90 days"),
}
"""What a range is called. It is ``first`` and ``last`` where it is none of these."""

OWN = "own"
_DEFAULT = "month"
_MOST_DAYS = 3660
_EARLIEST = date(2000, 1, 1)
STACKS = ("feature", "model")
"""What a day's spend is shown by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The range, from the first day to the last one, and what is left out of it.

    ``problems`` says what in the address made no sense.
    """

    zone: ZoneInfo
    today: date
    range: str = _DEFAULT
    first: date
    last: date
    feature: str = SITE
    model: str = ""
    user_id: Any = None
    user_name: str = ""
    tag: str = ""
    stack: str = STACKS[0]
    problems: tuple[str, ...] = ()
    features: tuple[str, ...] = field(default=(), compare=False)
    models: tuple[str, ...] = field(default=(), compare=False)

    @property
    def since(self) -> datetime:
        """The first moment of the range."""
        return periods.midnight(self.first, self.zone)

    @property
    def until(self) -> datetime:
        """The first moment after the range."""
        return periods.midnight(self.last + timedelta(days=1), self.zone)

    @property
    def span(self) -> Span:
        """The calls that are asked for."""
        return self.within(self.since, self.until)

    @property
    def days(self) -> list[date]:
        """The days of the range that have begun."""
        count = (min(self.last, self.today) - self.first).days + 1
        return [self.first + timedelta(days=offset) for offset in range(count)]

    @property
    def user_label(self) -> str:
        """Who the user is, whether or not the account still exists."""
        return self.user_name or deleted_user(self.user_id)

    @property
    def is_filtered(self) -> bool:
        """Whether some calls of the range are left out."""
        whole = self.feature == SITE and not self.model
        return not (whole and self.user_id is None and not self.tag)

    def within(self, since: datetime, until: datetime) -> Span:
        """Return what is asked for, in another range."""
        return Span(
            since=since,
            until=until,
            feature=self.feature,
            model=self.model,
            user_id=self.user_id,
            tag=tag_of(self.tag),
        )

    def query(self, **changes: Any) -> str:
        """Return the address that asks for this, with changes; ``?`` where it asks for nothing."""
        it = replace(self, **changes)
        own = it.range == OWN
        asked = {
            "range": "" if own or it.range == _DEFAULT else it.range,
            "first": it.first.isoformat() if own else "",
            "last": it.last.isoformat() if own else "",
            "feature": "" if it.feature == SITE else it.feature,
            "model": it.model,
            "user": "" if it.user_id is None else it.user_id,
            "tag": it.tag,
            "by": "" if it.stack == STACKS[0] else it.stack,
        }
        return "?" + urlencode({name: value for name, value in asked.items() if value})


def asked_for(query: QueryDict) -> Asked:
    """Return what an address asks for. Four small queries, however many calls there are."""
    zone = conf.TIME_ZONE
    today = periods.day(periods.now(), zone).first_day
    features = tuple(sorted(FeatureBudget.objects.values_list("name", flat=True)))
    reader = _Reader(query, today)
    key, first, last = reader.days()
    user_id, user_name = reader.user()
    named = models_named()
    model = reader.model(named)
    return Asked(
        zone=zone,
        today=today,
        range=key,
        first=first,
        last=last,
        feature=reader.feature(features),
        model=model,
        user_id=user_id,
        user_name=user_name,
        tag=reader.tag(),
        stack=reader.stack(),
        features=tuple(name for name in features if name != SITE),
        models=tuple(sorted({*named, model} - {""})),
        problems=tuple(reader.problems),
    )


class _Reader:
    """Reads one parameter after the other, and collects what makes no sense."""

    def __init__(self, query: QueryDict, today: date) -> None:
        self.query = query
        self.today = today
        self.problems: list[str] = []

    def days(self) -> tuple[str, date, date]:
        """Return the name of the range, its first day and its last."""
        own = self._own_days()
        if own is not None:
            return OWN, *own
        key = self._text("range") or _DEFAULT
        if key not in RANGES:
            self._tell(_("There is no range “%(value)s”; this month is shown."), key)
            key = _DEFAULT
        return key, *_days_of(key, self.today)

    def feature(self, features: tuple[str, ...]) -> str:
        name = self._text("feature")
        if name and name not in features:
            self._tell(_("There is no feature “%(value)s”; all are shown."), name)
            return SITE
        return name or SITE

    def model(self, named: set[str]) -> str:
        name = self._text("model")
        if not name or name in named or _was_used(name):
            return name
        self._tell(_("No call was made to a model “%(value)s”; all are shown."), name)
        return ""

    def user(self) -> tuple[Any, str]:
        """Return a user's key and name: by the name that was typed, or the key that was linked."""
        name = self._text("username")
        if name:
            users = get_user_model()
            try:
                key = users._default_manager.get_by_natural_key(name).pk
            except users.DoesNotExist:
                self._tell(_("There is no user “%(value)s”; all are shown."), name)
                return None, ""
            return key, name
        text = self._text("user")
        if not text:
            return None, ""
        try:
            key, user = user_by_key(text)
        except LookupError:
            self._tell(_("“%(value)s” is no user’s key; all users are shown."), text)
            return None, ""
        return key, "" if user is None else user.get_username()

    def tag(self) -> str:
        text = self._text("tag")
        tag = tag_of(text)
        if tag is None:
            if text:
                self._tell(_("A tag is written as name=value, not as “%(value)s”."), text)
            return ""
        return "=".join(tag)

    def stack(self) -> str:
        name = self._text("by")
        return name if name in STACKS else STACKS[0]

    def _own_days(self) -> tuple[date, date] | None:
        texts = self._text("first"), self._text("last")
        if not any(texts):
            return None
        days = [self._day(text) for text in texts if text]
        found = [day for day in days if day is not None]
        if len(found) < len(days):
            return None
        first = found[0] if texts[0] else found[0].replace(day=1)
        last = found[-1] if texts[1] else max(self.today, first)
        if first > last:
            self._tell(_("The last day comes before the first; the range is left out."))
        elif first > self.today:
            self._tell(_("That range has not begun yet; it is left out."))
        elif (last - first).days >= _MOST_DAYS:
            self._tell(_("A range has ten years at most; it is left out."))
        else:
            return first, last
        return None

    def _day(self, text: str) -> date | None:
        try:
            day = date.fromisoformat(text)
        except ValueError:
            day = date.min
        if _EARLIEST <= day < date(9990, 1, 1):
            return day
        self._tell(_("“%(value)s” is no day such as 2026-10-15; the range is left out."), text)
        return None

    def _text(self, name: str) -> str:
        # A database knows no NUL, and nobody has typed one.
        return (self.query.get(name) or "").replace("\0", "").strip()

    def _tell(self, problem: str, value: str = "") -> None:
        self.problems.append(problem % {"value": value} if value else problem)


_LENGTHS: Mapping[str, int] = {"today": 1, "week": 7, "30": 30, "90": 90}


def _days_of(key: str, today: date) -> tuple[date, date]:
    if key in _LENGTHS:
        return today - timedelta(days=_LENGTHS[key] - 1), today
    month = today.replace(day=1)
    if key == "last_month":
        return periods.previous_month(month), month - timedelta(days=1)
    return month, periods.next_month(month) - timedelta(days=1)


def _was_used(model: str) -> bool:
    """Whether any call went to a model that no budget, rate or setting names."""
    tables: tuple[Callable[..., Any], ...] = (CallLog.objects.filter, DayTotal.objects.filter)
    return any(rows(model=model).exists() for rows in tables)
