"""Which limits an attempt counts against, from the budgets and quotas that are in force."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import Any
from zoneinfo import ZoneInfo

from ai_budget import periods
from ai_budget.exceptions import FeatureDisabled
from ai_budget.periods import Period
from ai_budget.scopes import OF_CALLERS
from ai_budget.values import SITE, BalanceKey, Bucket, Charge, Limit, Measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """From this share of a limit on, this model answers."""

    at_percent: int
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A budget as it is in force: its limits in nano-dollars, overrides included.

    ``is_new`` says that it has no row yet.
    """

    name: str
    enabled: bool = True
    enforce: bool = True
    daily_limit: int | None = None
    monthly_limit: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    model: str = ""
    max_tokens: int | None = None
    allow_unbounded: bool = False
    cache_scope: str = "off"
    cache_ttl: int = 3_600
    cache_counts: bool = False
    cache_version: int = 0
    prompt_cache: str = "off"
    rungs: tuple[Rung, ...] = ()
    is_new: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """One row of what a user may use; None inherits, unless the row is unlimited.

    ``group`` is the rank of a group that the user is in, its priority and id: the lowest wins.
    A row for neither is everyone's default.
    """

    for_user: bool = False
    group: tuple[int, int] | None = None
    for_feature: bool = False
    unlimited: bool = False
    daily_calls: int | None = None
    daily_limit: int | None = None
    monthly_limit: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def generality(self) -> tuple[int, int, int]:
        """The order in which rows are asked: the user's own, the groups', everyone's."""
        if self.for_user:
            return (0, 0, 0)
        return (2, 0, 0) if self.group is None else (1, *self.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """All that is in force for one charge."""

    feature: Budget
    category: Budget | None = None
    site: Budget = field(default_factory=lambda: Budget(name=SITE))
    quotas: tuple[Quota, ...] = ()

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The feature's own budget first, the site's last."""
        category = () if self.category is None else (self.category,)
        return (self.feature, *category, self.site)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The ladder: the feature's own, else its category's, else the site's."""
        return () if self.ladder is None else self.ladder.rungs

    @property
    def ladder(self) -> Budget | None:
        """The budget whose ladder it is."""
        return next((budget for budget in self.budgets if budget.rungs), None)

    @property
    def category_name(self) -> str:
        return "" if self.category is None else self.category.name


def ensure_enabled(rules: Rules) -> None:
    """Raise ``FeatureDisabled`` where the feature, its category or the site is paused."""
    for budget in rules.budgets:
        if not budget.enabled:
            whole = " (the whole site)" if budget.name == SITE else ""
            raise FeatureDisabled(f"The budget {budget.name!r}{whole} is paused.")


def only_counting(limit: Limit) -> Limit:
    """Return a limit for what costs nothing: calls have to fit, money is not looked at."""
    return limit if limit.measure is Measure.CALLS else replace(limit, amount=None)


def own_limit(given: int | None, name: str, *, of_settings: int | None) -> int | None:
    """Return a budget's own limit without overrides; the settings stand in for the site's."""
    return of_settings if given is None and name == SITE else given


def raised(limit: int | None, overrides: Iterable[int]) -> int | None:
    """Return a limit, raised to the highest override; what has no limit cannot be raised."""
    return None if limit is None else max([limit, *overrides])


def limits_in_force(
    charge: Charge, rules: Rules, *, at: datetime, zone: ZoneInfo
) -> list[Limit | Bucket]:
    """Return every window that an attempt counts in, with the most each may hold, and buckets.

    Windows without a limit are counted too, so that a limit set later in the day knows what
    was spent before it.
    """
    day, month = periods.day(at, zone), periods.month(at, zone)
    limits: list[Limit | Bucket] = []
    for budget in rules.budgets:
        scope = _scope(budget, rules)
        for window, amount in ((day, budget.daily_limit), (month, budget.monthly_limit)):
            limits.append(Limit(scope=scope, window=window, amount=amount, enforce=budget.enforce))
        for measure, name in _PER_MINUTE:
            rate = getattr(budget, name)
            if rate is not None:
                bucket = Bucket(scope=scope, measure=measure, amount=rate, enforce=budget.enforce)
                limits.append(bucket)
    for scope, for_feature in caller_scopes(charge):
        rows = _most_specific_first(rules.quotas, scope, for_feature=for_feature)
        for window, name in ((day, "daily_limit"), (month, "monthly_limit")):
            limits.append(Limit(scope=scope, window=window, amount=_first(rows, name)))
        calls = _first(rows, "daily_calls")
        if calls is not None:
            limits.append(Limit(scope=scope, window=day, measure=Measure.CALLS, amount=calls))
        for measure, name in _PER_MINUTE:
            rate = _first(rows, name)
            if rate is not None:
                limits.append(Bucket(scope=scope, measure=measure, amount=rate))
    return limits


_PER_MINUTE = (
    (Measure.REQUESTS, "requests_per_minute"),
    (Measure.TOKENS, "tokens_per_minute"),
)


def balance_keys(charge: Charge, category: str, day: date) -> list[BalanceKey]:
    """Return the balances that a call of that day counts in, as ``limits_in_force`` does."""
    scopes = [f"feature:{charge.feature}", SITE]
    if category:
        scopes.append(f"category:{category}")
    scopes += [scope for scope, _ in caller_scopes(charge)]
    return [
        BalanceKey(scope, period, first)
        for scope in scopes
        for period, first in ((Period.DAY, day), (Period.MONTH, day.replace(day=1)))
    ]


def caller_scopes(charge: Charge) -> list[tuple[str, bool]]:
    """Return the scopes of the caller's quotas, and whether each is for one feature."""
    callers = []
    if charge.user_id is not None:
        callers.append(f"user:{charge.user_id}")
    if charge.subject:
        callers.append(f"subject:{charge.subject}")
    # A comma of the caller's own must not pass for the one before a feature.
    names = [caller.replace(",", ",,") for caller in callers]
    return [
        scope
        for name in names
        for scope in ((name, False), (f"{name},feature:{charge.feature}", True))
    ]


def refused_keys(charge: Charge, day: date, *, scope: str = "") -> list[BalanceKey]:
    """Return the days to count a refusal in: the feature's, the caller's, and the limit's own.

    ``scope`` is that of the limit. What a caller may use in one feature is not counted apart.
    """
    callers = caller_scopes(charge)
    in_feature = {name for name, for_feature in callers if for_feature}
    scopes = {f"feature:{charge.feature}", *(name for name, _ in callers), scope}
    return [BalanceKey(name, Period.DAY, day) for name in sorted(scopes - in_feature) if name]


def ladder_limits(rules: Rules, limits: Iterable[Limit | Bucket]) -> list[Limit]:
    """Return the limits of money that the ladder follows: of feature, category and site.

    Those of a budget in shadow mode are followed by its own ladder, which is only recorded,
    and by no other.
    """
    own = "" if rules.ladder is None else _scope(rules.ladder, rules)
    return [
        limit
        for limit in limits
        if isinstance(limit, Limit)
        and limit.measure is Measure.NANOUSD
        and limit.amount is not None
        and not limit.scope.startswith(OF_CALLERS)
        and (limit.enforce or limit.scope == own)
    ]


def _scope(budget: Budget, rules: Rules) -> str:
    if budget is rules.site:
        return SITE
    kind = "feature" if budget is rules.feature else "category"
    return f"{kind}:{budget.name}"


def _most_specific_first(quotas: Sequence[Quota], scope: str, *, for_feature: bool) -> list[Quota]:
    of_user = scope.startswith("user:")
    rows = [
        quota
        for quota in quotas
        if quota.for_feature == for_feature
        and (of_user or not (quota.for_user or quota.group is not None))
    ]
    return sorted(rows, key=lambda quota: quota.generality)


def _first(rows: Sequence[Quota], name: str) -> int | None:
    """Return the first value that a row gives; an unlimited row ends the search."""
    for row in rows:
        value: Any = getattr(row, name)
        if value is not None:
            return int(value)
        if row.unlimited:
            return None
    return None
