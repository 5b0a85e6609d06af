"""Where the money went: reads over the log of calls and the balances, nothing else.

Amounts are integer nano-dollars. A call belongs to the range in which it was reserved. *Calls*
are what quotas count: the counted attempts that were paid for or are still in flight, and the
answers from the cache. *Spend* is the cost of settled and estimated attempts; what calls in
flight hold stands apart as held. Released attempts cost nothing and are counted as attempts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from django.contrib.auth import get_user_model
from django.db.models import Count, F, Q, QuerySet, Sum
from django.utils.translation import gettext as _

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.models import CallLog, FeatureBudget, LimitOverride, SpendWindow
from ai_budget.periods import Period
from ai_budget.review.limits import Allowance, allowances, base_limit, raised_by
from ai_budget.values import SITE, BalanceKey, Balances


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The calls of a report: from ``since`` up to but not including ``until``.

    ``feature`` names a feature or a category, and is "*" for all of them.
    """

    since: datetime
    until: datetime
    feature: str = SITE

    def __post_init__(self) -> None:
        if self.since >= self.until:
            raise ValueError("a span begins before it ends")


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """Everything in the span, against the budget of what the span is about."""

    spend_nanousd: int = 0
    held_nanousd: int = 0
    calls: int = 0
    attempts: int = 0
    cached: int = 0
    looked_up: int = 0
    saved_nanousd: int = 0
    refused: int = 0
    active_users: int = 0
    spend_by_users_nanousd: int = 0
    budget_nanousd: int | None = None
    plan_nanousd: int | None = None

    @property
    def hit_rate(self) -> Decimal | None:
        """The percentage of calls that the cache answered, of those that were looked up in it."""
        return percent(self.cached, self.looked_up)

    @property
    def budget_used(self) -> Decimal | None:
        """Spend as a percentage of the budget."""
        return percent(self.spend_nanousd, self.budget_nanousd)

    @property
    def plan_used(self) -> Decimal | None:
        """Spend as a percentage of the plan."""
        return percent(self.spend_nanousd, self.plan_nanousd)

    @property
    def cost_per_active_user_nanousd(self) -> int | None:
        """What users spent, shared among those who made any call."""
        return average(self.spend_by_users_nanousd, self.active_users)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caching:
    """How often a feature's answers were looked for in the response cache, and found."""

    feature: str
    looked_up: int = 0
    cached: int = 0
    saved_nanousd: int = 0

    @property
    def hit_rate(self) -> Decimal | None:
        """The percentage that was found."""
        return percent(self.cached, self.looked_up)

    @property
    def is_worthless(self) -> bool:
        """Whether too little is found, after enough calls to say so."""
        enough = self.looked_up >= ENOUGH_LOOKED_UP
        return enough and self.cached * 100 < self.looked_up * WORTH_CACHING_PERCENT


ENOUGH_LOOKED_UP = 500
"""Calls after which a hit rate tells something."""

WORTH_CACHING_PERCENT = 20
"""The hit rate below which the response cache of a feature is not worth having."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpend:
    """One feature; ``total_nanousd`` is what all features of the span spent."""

    feature: str
    total_nanousd: int
    spend_nanousd: int = 0
    held_nanousd: int = 0
    calls: int = 0
    cached: int = 0
    looked_up: int = 0
    saved_nanousd: int = 0
    refused: int = 0
    budget_nanousd: int | None = None
    plan_nanousd: int | None = None

    @property
    def caching(self) -> Caching:
        """What its response cache did."""
        return Caching(feature=self.feature, looked_up=self.looked_up, cached=self.cached)

    @property
    def share(self) -> Decimal | None:
        """The percentage of all spend."""
        return percent(self.spend_nanousd, self.total_nanousd)

    @property
    def hit_rate(self) -> Decimal | None:
        """The percentage of calls that the cache answered, of those that were looked up in it."""
        return percent(self.cached, self.looked_up)

    @property
    def budget_used(self) -> Decimal | None:
        """Spend as a percentage of the budget."""
        return percent(self.spend_nanousd, self.budget_nanousd)

    @property
    def plan_used(self) -> Decimal | None:
        """Spend as a percentage of the plan."""
        return percent(self.spend_nanousd, self.plan_nanousd)


@dataclass(frozen=True, kw_only=True, slots=True)
class UserSpend:
    """One user. Deleting the account deletes none of its calls."""

    user_id: Any
    label: str
    deleted: bool
    calls: int
    spend_nanousd: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectSpend:
    """One caller without an account: a tenant, an API client, a visitor."""

    subject: str
    calls: int
    spend_nanousd: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpend:
    """One model; ``paid_calls`` leaves out the cache's answers and calls in flight."""

    model: str
    total_nanousd: int
    calls: int
    paid_calls: int
    output_tokens: int
    spend_nanousd: int

    @property
    def share(self) -> Decimal | None:
        """The percentage of all spend."""
        return percent(self.spend_nanousd, self.total_nanousd)

    @property
    def average_output_tokens(self) -> int | None:
        """Output tokens of a paid call, its repeats included."""
        return average(self.output_tokens, self.paid_calls)

    @property
    def average_cost_nanousd(self) -> int | None:
        """Cost of a paid call, its repeats included."""
        return average(self.spend_nanousd, self.paid_calls)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusals:
    """How often a feature was refused, whichever limit did it."""

    feature: str
    refused: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Downgrade:
    """Calls that another model answered than the one they asked for."""

    feature: str
    requested_model: str
    model: str
    calls: int
    spend_nanousd: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """What a lever, or several on the same calls, took off the bill; negative where it added."""

    lever: str
    calls: int
    saved_nanousd: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Every section. ``since`` and ``until`` are in the zone whose days limits count in."""

    since: datetime
    until: datetime
    time_zone: str
    feature: str
    total: Total
    features: tuple[FeatureSpend, ...]
    users: tuple[UserSpend, ...]
    subjects: tuple[SubjectSpend, ...]
    models: tuple[ModelSpend, ...]
    refusals: tuple[Refusals, ...]
    downgrades: tuple[Downgrade, ...]
    savings: tuple[Saving, ...] = ()

    @property
    def not_worth_caching(self) -> tuple[Caching, ...]:
        """The features whose response cache finds too little."""
        found = (feature.caching for feature in self.features)
        return tuple(caching for caching in found if caching.is_worthless)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was called and nothing refused."""
        return not (self.total.attempts or self.total.cached or self.total.refused)


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitUse:
    """What one limit has spent and holds; ``raised`` says that an override is in force."""

    spent_nanousd: int = 0
    held_nanousd: int = 0
    limit_nanousd: int | None = None
    raised: bool = False

    @property
    def taken_nanousd(self) -> int:
        """What is not there for another call."""
        return self.spent_nanousd + self.held_nanousd

    @property
    def used(self) -> Decimal | None:
        """What is taken, as a percentage of the limit."""
        return percent(self.taken_nanousd, self.limit_nanousd)


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetUse:
    """A budget's limits in the day and the month that contain the present."""

    today: LimitUse
    month: LimitUse


# The report --------------------------------------------------------------------------------------


def cost_report(span: Span, *, top: int = 10, using: str | None = None) -> Report:
    """Return every section, with the ``top`` most expensive users and subjects."""
    zone = conf.TIME_ZONE
    refusals = by_refusal(span, using=using)
    allowed = allowances(span.since, span.until, using=using)
    return Report(
        since=span.since.astimezone(zone),
        until=span.until.astimezone(zone),
        time_zone=str(zone),
        feature=span.feature,
        total=total(span, refusals=refusals, allowed=allowed, using=using),
        features=by_feature(span, refusals=refusals, allowed=allowed, using=using),
        users=by_user(span, top=top, using=using),
        subjects=by_subject(span, top=top, using=using),
        models=by_model(span, using=using),
        refusals=refusals,
        downgrades=by_downgrade(span, using=using),
        savings=by_saving(span, using=using),
    )


def total(
    span: Span,
    *,
    refusals: Sequence[Refusals],
    allowed: Mapping[str, Allowance],
    using: str | None = None,
) -> Total:
    """Return the sums of the whole span, in one query."""
    own = allowed.get(span.feature, Allowance())
    sums = _attempts(span, using).aggregate(
        spend_nanousd=_spend(),
        held_nanousd=Sum("reserved_nanousd", filter=_HELD, default=0),
        calls=_counted(),
        cached=_cached(),
        missed=_missed(),
        saved_nanousd=Sum("saved_nanousd", default=0),
        attempts=Count("id", filter=~_CACHED),
        active_users=Count("user_id", filter=~_RELEASED, distinct=True),
        spend_by_users_nanousd=Sum(
            "cost_nanousd", filter=_PAID & Q(user_id__isnull=False), default=0
        ),
    )
    sums["calls"] += sums["cached"]
    sums["looked_up"] = sums.pop("missed") + sums["cached"]
    return Total(
        refused=sum(row.refused for row in refusals),
        budget_nanousd=own.budget_nanousd,
        plan_nanousd=own.plan_nanousd,
        **sums,
    )


def by_feature(
    span: Span,
    *,
    refusals: Sequence[Refusals],
    allowed: Mapping[str, Allowance],
    using: str | None = None,
) -> tuple[FeatureSpend, ...]:
    """Return features that were called or refused, the most expensive first."""
    rows = {
        str(row["feature_id"]): row
        for row in _calls(span, using)
        .values("feature_id")
        .annotate(
            spend=_spend(),
            held=Sum("reserved_nanousd", filter=_HELD, default=0),
            made=_counted(),
            cached=_cached(),
            missed=_missed(),
            saved=Sum("saved_nanousd", default=0),
        )
        .order_by()
    }
    refused = {refusal.feature: refusal.refused for refusal in refusals}
    spent_in_all = sum(row["spend"] for row in rows.values())
    features = []
    for name in rows.keys() | refused.keys():
        row: Mapping[str, Any] = rows.get(name) or _NOTHING
        own = allowed.get(name, Allowance())
        features.append(
            FeatureSpend(
                feature=name,
                total_nanousd=spent_in_all,
                spend_nanousd=row["spend"],
                held_nanousd=row["held"],
                calls=row["made"] + row["cached"],
                cached=row["cached"],
                looked_up=row["missed"] + row["cached"],
                saved_nanousd=row["saved"],
                refused=refused.get(name, 0),
                budget_nanousd=own.budget_nanousd,
                plan_nanousd=own.plan_nanousd,
            )
        )
    return tuple(sorted(features, key=lambda it: (-it.spend_nanousd, -it.calls, it.feature)))


def by_user(span: Span, *, top: int, using: str | None = None) -> tuple[UserSpend, ...]:
    """Return the ``top`` most expensive users.

    Names come from the default database in one more query: the table of calls has no
    constraint on users, and the ledger's connection may not see theirs.
    """
    rows = _dearest(_calls(span, using).filter(user_id__isnull=False), "user_id")[:top]
    found = list(rows)
    names = usernames(row["user_id"] for row in found)
    return tuple(
        UserSpend(
            user_id=row["user_id"],
            label=names.get(row["user_id"]) or deleted_user(row["user_id"]),
            deleted=row["user_id"] not in names,
            calls=row["made"] + row["cached"],
            spend_nanousd=row["spend"],
        )
        for row in found
    )


def by_subject(span: Span, *, top: int, using: str | None = None) -> tuple[SubjectSpend, ...]:
    """Return the ``top`` most expensive subjects."""
    rows = _dearest(_calls(span, using).exclude(subject=""), "subject")[:top]
    return tuple(
        SubjectSpend(
            subject=row["subject"],
            calls=row["made"] + row["cached"],
            spend_nanousd=row["spend"],
        )
        for row in rows
    )


def by_model(span: Span, *, using: str | None = None) -> tuple[ModelSpend, ...]:
    """Return the models that answered, the most expensive first."""
    rows = list(
        _dearest(_calls(span, using), "model").annotate(
            paid=Sum("counted", filter=_PAID, default=0),
            output=Sum("output_tokens", filter=_PAID, default=0),
        )
    )
    spent_in_all = sum(row["spend"] for row in rows)
    return tuple(
        ModelSpend(
            model=row["model"],
            total_nanousd=spent_in_all,
            calls=row["made"] + row["cached"],
            paid_calls=row["paid"],
            output_tokens=row["output"],
            spend_nanousd=row["spend"],
        )
        for row in rows
    )


def by_downgrade(span: Span, *, using: str | None = None) -> tuple[Downgrade, ...]:
    """Return what was asked for and what answered in its place, by feature."""
    rows = _dearest(
        _calls(span, using).exclude(model=F("requested_model")),
        "feature_id",
        "requested_model",
        "model",
    )
    return tuple(
        Downgrade(
            feature=row["feature_id"],
            requested_model=row["requested_model"],
            model=row["model"],
            calls=row["made"] + row["cached"],
            spend_nanousd=row["spend"],
        )
        for row in rows
    )


def by_saving(span: Span, *, using: str | None = None) -> tuple[Saving, ...]:
    """Return what each lever saved, the greatest first. Levers of one call stand together."""
    rows = (
        _calls(span, using)
        .exclude(saved_reason="")
        .values("saved_reason")
        .annotate(saved=Sum("saved_nanousd"), calls=Count("id", filter=~_HELPERS))
        .order_by("-saved", "saved_reason")
    )
    return tuple(
        Saving(lever=row["saved_reason"], calls=row["calls"], saved_nanousd=row["saved"])
        for row in rows
    )


def caching_of(feature: str, *, since: datetime, using: str | None = None) -> Caching:
    """Return what the response cache of a feature, or of its category, did since then."""
    span = Span(since=since, until=periods.now() + timedelta(days=1), feature=feature)
    sums = _calls(span, using).aggregate(
        missed=_missed(),
        cached=_cached(),
        saved_nanousd=Sum("saved_nanousd", filter=_CACHED, default=0),
    )
    return Caching(
        feature=feature,
        looked_up=sums["missed"] + sums["cached"],
        cached=sums["cached"],
        saved_nanousd=sums["saved_nanousd"],
    )


def by_refusal(span: Span, *, using: str | None = None) -> tuple[Refusals, ...]:
    """Return how often each feature was refused on the days that the span touches."""
    zone = conf.TIME_ZONE
    first = periods.day(span.since, zone).first_day
    last = periods.day(span.until - timedelta(microseconds=1), zone).first_day
    days = SpendWindow.objects.using(using or conf.LEDGER_DATABASE).filter(
        period=Period.DAY, first_day__gte=first, first_day__lte=last, refused__gt=0
    )
    if span.feature == SITE:
        days = days.filter(scope__startswith=_FEATURE)
    else:
        days = days.filter(scope__in=[_FEATURE + name for name in _members(span.feature, using)])
    rows = days.values("scope").annotate(sum_=Sum("refused")).order_by("-sum_", "scope")
    return tuple(
        Refusals(feature=row["scope"].removeprefix(_FEATURE), refused=row["sum_"]) for row in rows
    )


# The present -------------------------------------------------------------------------------------


def balances_today_and_month(
    budgets: Collection[FeatureBudget], *, using: str | None = None
) -> dict[str, BudgetUse]:
    """Return what each budget has taken of its daily and monthly limit, by its name.

    One query for the balances and one for the overrides, however many budgets. Where the
    ledger does not answer, the balances are those that ``ai_budget_tick`` copied last: a
    feature can be paused just then.
    """
    alias = using or conf.LEDGER_DATABASE
    at, zone = periods.now(), conf.TIME_ZONE
    today, month = periods.day(at, zone), periods.month(at, zone)
    keys = [
        BalanceKey(scope, window.period, window.first_day)
        for budget in budgets
        for scope in _scopes(budget)
        for window in (today, month)
    ]
    try:
        live = ledgers.current().balances(keys)
    except LedgerUnavailable:
        live = _copied(keys, alias)
    balances = {(key.scope, key.period): balance for key, balance in live.items()}
    overrides = list(
        LimitOverride.objects.using(alias).filter(
            budget__in=[budget.pk for budget in budgets], until__gt=at
        )
    )
    return {
        budget.name: BudgetUse(
            today=_use(budget, Period.DAY, balances, overrides),
            month=_use(budget, Period.MONTH, balances, overrides),
        )
        for budget in budgets
    }


# Names -------------------------------------------------------------------------------------------


def usernames(user_ids: Iterable[Any]) -> dict[Any, str]:
    """Return the names of those users that exist, in one query."""
    model = get_user_model()
    users = model._base_manager.only(model.USERNAME_FIELD).in_bulk(set(user_ids))
    return {key: user.get_username() for key, user in users.items()}


def deleted_user(user_id: Any) -> str:
    """Return what stands for a user whose row is gone."""
    return _("user %(id)s (deleted)") % {"id": user_id}


# Arithmetic --------------------------------------------------------------------------------------


def percent(part: int, whole: int | None) -> Decimal | None:
    """Return a share in percent with one decimal, or None where there is nothing to share."""
    if not whole:
        return None
    return (Decimal(part) * 100 / whole).quantize(Decimal("0.1"), rounding=ROUND_HALF_UP)


def average(amount: int, among: int) -> int | None:
    """Return an average rounded half up, to be shown and never billed; None of nothing."""
    if not among:
        return None
    return (2 * amount + among) // (2 * among)


# The pieces of a query ---------------------------------------------------------------------------

_PAID = Q(status__in=[CallLog.Status.SETTLED, CallLog.Status.ESTIMATED])
_HELD = Q(status=CallLog.Status.RESERVED)
_HELPERS = Q(kind__in=[CallLog.Kind.ROUTER, CallLog.Kind.SUMMARY])
_CACHED = Q(status=CallLog.Status.CACHED) & ~_HELPERS
_RELEASED = Q(status=CallLog.Status.RELEASED)
_FEATURE = "feature:"
_NOTHING: Mapping[str, int] = {
    "spend": 0,
    "held": 0,
    "made": 0,
    "cached": 0,
    "missed": 0,
    "saved": 0,
}


def _attempts(span: Span, using: str | None) -> QuerySet[CallLog]:
    rows = CallLog.objects.using(using or conf.LEDGER_DATABASE).filter(
        reserved_at__gte=span.since, reserved_at__lt=span.until
    )
    if span.feature == SITE:
        return rows
    return rows.filter(Q(feature_id=span.feature) | Q(category=span.feature))


def _calls(span: Span, using: str | None) -> QuerySet[CallLog]:
    return _attempts(span, using).exclude(_RELEASED)


def _dearest(rows: QuerySet[CallLog], *columns: str) -> QuerySet[CallLog, dict[str, Any]]:
    grouped: QuerySet[CallLog, dict[str, Any]] = rows.values(*columns)
    return grouped.annotate(spend=_spend(), made=_counted(), cached=_cached()).order_by(
        "-spend", "-made", *columns
    )


def _spend() -> Sum:
    return Sum("cost_nanousd", filter=_PAID, default=0)


def _counted() -> Sum:
    return Sum("counted", filter=_PAID | _HELD, default=0)


def _cached() -> Count:
    return Count("id", filter=_CACHED)


def _missed() -> Sum:
    """Calls whose answers were looked for in the cache, and not found."""
    return Sum("counted", filter=Q(cache_checked=True) & (_PAID | _HELD), default=0)


def _members(name: str, using: str | None) -> list[str]:
    """Return a feature's name, or a category's with those of its features."""
    children = FeatureBudget.objects.using(using or conf.LEDGER_DATABASE).filter(parent__name=name)
    return [name, *children.values_list("name", flat=True)]


def _scopes(budget: FeatureBudget) -> list[str]:
    if budget.is_site:
        return [SITE]
    return [_FEATURE + budget.name, f"category:{budget.name}"]


def _copied(keys: Iterable[BalanceKey], alias: str) -> dict[BalanceKey, Balances]:
    """Return the balances as the database has them."""
    by_row = {SpendWindow.key_for(key.scope, key.period, key.first_day): key for key in keys}
    return {
        by_row[row.pk]: Balances(
            spent_nanousd=row.spent_nanousd,
            held_nanousd=row.held_nanousd,
            calls=row.calls,
            refused=row.refused,
        )
        for row in SpendWindow.objects.using(alias).filter(pk__in=by_row)
    }


def _use(
    budget: FeatureBudget,
    period: Period,
    balances: Mapping[tuple[str, Period], Balances],
    overrides: Sequence[LimitOverride],
) -> LimitUse:
    # A name that is both a category and a feature has two balances under the same limit: the
    # fuller one is what refuses next.
    found = [balances[key] for scope in _scopes(budget) if (key := (scope, period)) in balances]
    balance = max(found, key=lambda it: it.taken_nanousd, default=Balances())
    base = base_limit(budget, period)
    own = [it for it in overrides if it.budget_id == budget.pk and it.period == period]
    limit = raised_by(base, own)
    return LimitUse(
        spent_nanousd=balance.spent_nanousd,
        held_nanousd=balance.held_nanousd,
        limit_nanousd=limit,
        raised=limit != base,
    )
