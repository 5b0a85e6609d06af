"""One caller: what a user or a subject spent, and which limits hold for it and why.

Amounts are integer nano-dollars. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import reduce
from operator import add
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group
from django.core.exceptions import ValidationError
from django.db.models import Q

from ai_budget import money, periods
from ai_budget.conf import conf
from ai_budget.models import CallLog, SpendWindow, SubjectTotal, UserQuota, UserTotal
from ai_budget.periods import Period
from ai_budget.policy.limits import Budget, Quota, Rules, caller_scopes, limits_in_force
from ai_budget.review.balances import balances_now
from ai_budget.review.measures import CALLER_MEASURES, RELEASED
from ai_budget.review.spans import Span
from ai_budget.review.spenders import CallerFigures
from ai_budget.review.sums import Reading, reading
from ai_budget.values import SITE, BalanceKey, Balances, Charge, Limit, Measure

DAYS = 30
"""How many days are shown one by one, today included."""

MONTHS = 12
"""How many months are shown, this one included."""

NOTHING = CallerFigures()

_EVER = datetime(9999, 12, 30, tzinfo=UTC)
"""A store's clock may be ahead of ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """A user, by primary key, or a subject."""

    user_id: Any = None
    subject: str = ""

    def charge(self, feature: str = SITE) -> Charge:
        """Return a charge of this caller, which tells the scopes that it counts in."""
        return Charge(feature=feature, user_id=self.user_id, subject=self.subject)

    @property
    def scope(self) -> str:
        """The scope of what it does in all features together."""
        return caller_scopes(self.charge())[0][0]

    @property
    def rows(self) -> Mapping[str, Any]:
        """What selects its rows, in every table that is kept by callers."""
        return {"user_id": self.user_id} if self.user_id is not None else {"subject": self.subject}

    @property
    def totals(self) -> type[UserTotal | SubjectTotal]:
        """The table of its sums."""
        return SubjectTotal if self.user_id is None else UserTotal


def user_by_key(text: str) -> tuple[Any, Any]:
    """Return the primary key that a text stands for, and the user, who is None where gone.

    Raises ``LookupError`` for a text that is no key of a user of this site.
    """
    model = get_user_model()
    try:
        # As a form does: what a column cannot hold, some databases refuse to be asked for.
        key = model._meta.pk.clean(text, None)
    except ValidationError:
        key = None
    if key is None or "\0" in text:
        raise LookupError(f"{text[:64]!r} is no key of a user")
    return key, model._base_manager.filter(pk=key).first()


def has_called(caller: Caller, *, using: str | None = None) -> bool:
    """Whether there is any call of this caller, or a sum of calls that were purged."""
    tables: tuple[Any, ...] = (CallLog, caller.totals)
    alias = using or conf.LEDGER_DATABASE
    return any(table.objects.using(alias).filter(**caller.rows).exists() for table in tables)


# Spend -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DaySpend:
    """One day; ``refused`` calls were not made."""

    day: date
    figures: CallerFigures
    refused: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CallerSpend:
    """The last days one by one, the last months, and what the days' calls were for.

    ``by_feature`` and ``by_model`` are the dearest first. Of days before ``purged_day`` only sums
    are left, so these two begin there; None where all calls of the days are kept.
    """

    days: tuple[DaySpend, ...]
    months: tuple[tuple[date, CallerFigures], ...]
    by_feature: tuple[tuple[str, CallerFigures], ...]
    by_model: tuple[tuple[str, CallerFigures], ...]
    purged_day: date | None = None

    @property
    def total(self) -> CallerFigures:
        """What the days add up to."""
        return reduce(add, (day.figures for day in self.days), NOTHING)

    @property
    def refused(self) -> int:
        return sum(day.refused for day in self.days)


def spend_of(caller: Caller, *, using: str | None = None) -> CallerSpend:
    """Return what a caller spent in the last days and months, exact to the last call."""
    with reading(using) as sums:
        today = periods.day(sums.now, sums.zone)
        days = [today.first_day - timedelta(days=ago) for ago in reversed(range(DAYS))]
        months = [today.first_day.replace(day=1)]
        while len(months) < MONTHS:
            months.append(periods.previous_month(months[-1]))
        by_day = _sums(caller, Period.DAY, days[0], sums.alias)
        by_month = _sums(caller, Period.MONTH, months[-1], sums.alias)
        for day, figures in _changes(caller, sums).items():
            by_day[day] = by_day.get(day, NOTHING) + figures
            month = day.replace(day=1)
            by_month[month] = by_month.get(month, NOTHING) + figures
        made = _made(caller, Span(since=periods.midnight(days[0], sums.zone), until=_EVER), sums)
        refused = _refused(caller, days, sums.alias)
        purged_day = sums.state.purged_day
    return CallerSpend(
        days=tuple(
            DaySpend(day=day, figures=by_day.get(day, NOTHING), refused=refused.get(day, 0))
            for day in days
        ),
        months=tuple((month, by_month.get(month, NOTHING)) for month in months),
        by_feature=_dearest_first((feature, its) for (feature, _), its in made.items()),
        by_model=_dearest_first((model, its) for (_, model), its in made.items()),
        purged_day=purged_day if purged_day is not None and purged_day > days[0] else None,
    )


def _sums(caller: Caller, period: Period, first: date, alias: str) -> dict[date, CallerFigures]:
    """Return what has been added up of a caller's windows, from that day on."""
    rows = caller.totals.objects.using(alias).filter(
        **caller.rows, period=period, first_day__gte=first
    )
    return {row.first_day: _figures(row) for row in rows}


def _figures(row: UserTotal | SubjectTotal) -> CallerFigures:
    return CallerFigures(
        attempts=row.attempts,
        calls=row.calls,
        spend_nanousd=row.cost_nanousd,
        saved_nanousd=row.saved_nanousd,
    )


def _changes(caller: Caller, sums: Reading) -> dict[date, CallerFigures]:
    """Return what has not been added up of a caller's days yet."""
    name = caller.subject if caller.user_id is None else caller.user_id
    changes = sums.caller_changes(caller.totals)
    return {day: figures for (day, whose), figures in changes.items() if whose == name}


def _made(caller: Caller, span: Span, sums: Reading) -> dict[tuple[str, str], CallerFigures]:
    """Return what a caller's calls add up to by feature and model, by the index of callers."""
    measures = {f"sum_{name}": measure for name, measure in CALLER_MEASURES.items()}
    calls = sums.calls_of(span).filter(**caller.rows).exclude(RELEASED).order_by()
    rows = calls.values("feature_id", "model").annotate(**measures)
    return {
        (feature, model): CallerFigures(
            attempts=int(attempts),
            calls=int(calls),
            spend_nanousd=int(cost),
            saved_nanousd=int(saved),
        )
        for feature, model, attempts, calls, cost, saved in rows.values_list(
            "feature_id", "model", *measures
        )
    }


def _refused(caller: Caller, days: Iterable[date], alias: str) -> dict[date, int]:
    keys = [SpendWindow.key_for(caller.scope, Period.DAY, day) for day in days]
    windows = SpendWindow.objects.using(alias).filter(pk__in=keys, refused__gt=0)
    return dict(windows.values_list("first_day", "refused"))


def _dearest_first(
    found: Iterable[tuple[str, CallerFigures]],
) -> tuple[tuple[str, CallerFigures], ...]:
    by_name: dict[str, CallerFigures] = {}
    for name, figures in found:
        by_name[name] = by_name.get(name, NOTHING) + figures

    def dearness(item: tuple[str, CallerFigures]) -> tuple[int, int, str]:
        name, figures = item
        return -figures.spend_nanousd, -figures.calls, name

    return tuple(sorted(by_name.items(), key=dearness))


# Limits ------------------------------------------------------------------------------------------


class Whose(StrEnum):
    """Whose quota it is that a limit comes from."""

    OWN = "own"
    GROUP = "group"
    EVERYONE = "everyone"


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitInForce:
    """One limit of a caller, in all features together ("*") or in one, and what is taken of it.

    ``name`` is that of the quota's field that decides it, and ``quota`` the row: None where no row
    says anything, and one that is unlimited where ``amount`` is None. ``period`` is None for what
    is counted by the minute, of which no balance is kept.
    """

    feature: str
    name: str
    measure: Measure
    amount: int | None
    quota: UserQuota | None
    period: Period | None = None
    balance: Balances = field(default_factory=Balances)
    resets_at: datetime | None = None

    @property
    def whose(self) -> Whose | None:
        """Whose quota decides it; None where nobody's does."""
        if self.quota is None:
            return None
        if self.quota.user_id is not None:
            return Whose.OWN
        return Whose.EVERYONE if self.quota.group_id is None else Whose.GROUP

    @property
    def used(self) -> int:
        """What is spent, or how many calls were made."""
        return self.balance.calls if self.is_calls else self.balance.spent_nanousd

    @property
    def held(self) -> int:
        """What calls in flight hold; they are among the calls that were made."""
        return 0 if self.is_calls else self.balance.held_nanousd

    @property
    def left(self) -> int | None:
        """What is left for the next call; None without a limit."""
        return None if self.amount is None else max(0, self.amount - self.used - self.held)

    @property
    def is_calls(self) -> bool:
        return self.measure is Measure.CALLS


def quotas_of(caller: Caller, *, user: Any = None, using: str | None = None) -> list[UserQuota]:
    """Return every quota that concerns a caller, in whichever feature.

    ``user`` is the caller's, for the groups; a subject and a user who is gone are in none.
    """
    among = Q(user=None, group=None)
    if user is not None:
        among |= Q(user=user.pk)
        # A site's own users may have no groups, or groups of its own.
        groups: Any = getattr(user, "groups", None)
        if getattr(groups, "model", None) is Group:
            among |= Q(group__in=list(groups.values_list("pk", flat=True)))
    rows = UserQuota.objects.using(using or conf.LEDGER_DATABASE).filter(among)
    return list(rows.select_related("group", "feature").order_by("key"))


def limits_of(
    caller: Caller, quotas: Sequence[UserQuota], *, using: str | None = None
) -> tuple[LimitInForce, ...]:
    """Return the limits of a caller in all features together, and then those in single ones.

    All that a quota can limit is there for all features together; of a feature only what a quota
    says something about. Where the ledger does not answer, the balances are those that
    ``ai_budget_tick`` copied last.
    """
    at = periods.now()
    windows = {period: periods.window(period, at, conf.TIME_ZONE) for period in Period}

    def key(limit: LimitInForce, period: Period) -> BalanceKey:
        return BalanceKey(_scope(caller, limit.feature), period, windows[period].first_day)

    limits = in_force(caller, quotas, at=at)
    keys = {key(limit, limit.period) for limit in limits if limit.period is not None}
    balances = balances_now(keys, using=using)
    return tuple(
        limit
        if limit.period is None
        else replace(
            limit,
            balance=balances.get(key(limit, limit.period), Balances()),
            resets_at=windows[limit.period].end,
        )
        for limit in limits
    )


def in_force(
    caller: Caller, quotas: Sequence[UserQuota], *, at: datetime
) -> tuple[LimitInForce, ...]:
    """Return what quotas limit, without what is taken of it, and which of them decides."""
    names = sorted({quota.feature.name for quota in quotas if quota.feature is not None})
    return tuple(
        limit for name in (SITE, *names) for limit in _in_feature(caller, name, quotas, at=at)
    )


def _in_feature(
    caller: Caller, feature: str, quotas: Sequence[UserQuota], *, at: datetime
) -> Iterator[LimitInForce]:
    whole = feature == SITE
    rows = [
        row
        for row in quotas
        if (row.feature is None if whole else row.feature and row.feature.name == feature)
    ]
    rules = Rules(feature=Budget(name=feature), quotas=tuple(map(_quota, rows)))
    scope = _scope(caller, feature)
    limits = limits_in_force(caller.charge(feature), rules, at=at, zone=conf.TIME_ZONE)
    amounts = {
        (it.measure, it.window.period if isinstance(it, Limit) else None): it.amount
        for it in limits
        if it.scope == scope
    }
    for name, (measure, period) in LIMITING.items():
        quota = _deciding(rows, name)
        if whole or quota is not None:
            yield LimitInForce(
                feature=feature,
                name=name,
                measure=measure,
                period=period,
                amount=amounts.get((measure, period)),
                quota=quota,
            )


LIMITING: Mapping[str, tuple[Measure, Period | None]] = {
    "daily_calls": (Measure.CALLS, Period.DAY),
    "daily_limit_usd": (Measure.NANOUSD, Period.DAY),
    "monthly_limit_usd": (Measure.NANOUSD, Period.MONTH),
    "requests_per_minute": (Measure.REQUESTS, None),
    "tokens_per_minute": (Measure.TOKENS, None),
}
"""The fields of a quota that limit something, and what."""


def _deciding(rows: Iterable[UserQuota], name: str) -> UserQuota | None:
    """Return the row that decides a field: the most specific that says anything about it."""
    ordered = sorted(rows, key=lambda row: _quota(row).generality)
    speaking = (row for row in ordered if row.unlimited or getattr(row, name) is not None)
    return next(speaking, None)


def _quota(row: UserQuota) -> Quota:
    return Quota(
        for_user=row.user_id is not None,
        group=None if row.group_id is None else (row.priority, row.group_id),
        for_feature=row.feature_id is not None,
        unlimited=row.unlimited,
        daily_calls=row.daily_calls,
        daily_limit=_nanousd(row.daily_limit_usd),
        monthly_limit=_nanousd(row.monthly_limit_usd),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
    )


def _nanousd(usd: Decimal | None) -> int | None:
    return None if usd is None else money.parse_usd(usd)


def _scope(caller: Caller, feature: str) -> str:
    scopes = caller_scopes(caller.charge(feature))
    return next(scope for scope, in_one in scopes if in_one == (feature != SITE))


# Calls -------------------------------------------------------------------------------------------


def last_calls(caller: Caller, *, most: int, using: str | None = None) -> list[CallLog]:
    """Return the newest attempts and cached answers of a caller, by the index of callers."""
    calls = CallLog.objects.using(using or conf.LEDGER_DATABASE).filter(**caller.rows)
    return list(calls.order_by("-reserved_at", "-id")[:most])
