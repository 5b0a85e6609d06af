"""Reads the rules in force for a charge: always from the database, so that a change in admin
is effective on the next call in every worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import FilteredRelation, Q, QuerySet

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.exceptions import FeatureDisabled
from ai_budget.ledger.database import retry
from ai_budget.models import FeatureBudget, UserQuota
from ai_budget.models.budgets import NAME_PATTERN
from ai_budget.policy.limits import Budget, Quota, Rules, Rung
from ai_budget.values import SITE, Charge


def read_rules(charge: Charge, *, at: datetime) -> Rules:
    """Return the budgets and quotas that a charge counts against at that moment.

    An unknown feature gets a budget with the defaults, or raises ``FeatureDisabled``, as the
    setting ``UNKNOWN_FEATURE`` says. Raises ``LedgerUnavailable`` where they cannot be read.
    """
    return retry(connections[conf.LEDGER_DATABASE], lambda: _read(charge, at))


def _read(charge: Charge, at: datetime) -> Rules:
    name = charge.feature
    if name == SITE:
        raise FeatureDisabled("Calls are made for a feature; * is the budget of all of them.")
    budgets = _budgets(name, at)
    if name not in budgets:
        _create(name)
        budgets = _budgets(name, at)
    if name not in budgets:
        # A collation may find one that is written differently, and calls are kept by name.
        raise FeatureDisabled(f"{name!r} is too like the name of another feature.")
    feature, feature_id, category_name = budgets[name]
    category = budgets[category_name][0] if category_name in budgets else None
    if category_name == name:
        # Calls made for a category itself count with those of its features.
        category = replace(feature)
    site = budgets[SITE][0] if SITE in budgets else _site_of_settings()
    quotas = _quotas(charge, feature_id)
    return Rules(feature=feature, category=category, site=site, quotas=quotas)


def _create(feature: str) -> None:
    if not re.match(NAME_PATTERN, feature) or feature == SITE or len(feature) > 64:
        raise FeatureDisabled(
            f"{feature[:80]!r} cannot be a feature's name: use at most 64 letters, digits, "
            "hyphens, underscores and dots."
        )
    if conf.UNKNOWN_FEATURE == "refuse":
        raise FeatureDisabled(
            f"There is no budget for the feature {feature!r}. Add one in admin, or set "
            'AI_BUDGET["UNKNOWN_FEATURE"] to "create".'
        )
    FeatureBudget.objects.using(conf.LEDGER_DATABASE).get_or_create(name=feature)


def _budgets(feature: str, at: datetime) -> dict[str, tuple[Budget, int, str | None]]:
    """Return the feature, its category and the site by name, each with its id and category.

    A feature that others have for their category is its own.
    """
    connection = connections[conf.LEDGER_DATABASE]
    rows: dict[str, list[Any]] = {}
    for row in _phrased(connection, "budgets", _budgets_query).run(feature, at=at):
        rows.setdefault(row[1], []).append(row)
    return {
        name: (_budget(found), found[0][0], found[0][9] or (name if found[0][14] else None))
        for name, found in rows.items()
    }


def _budgets_query() -> QuerySet[Any]:
    """One row for each pair of a budget's rungs and its overrides in force."""
    return (
        FeatureBudget.objects.annotate(
            raised=FilteredRelation("overrides", condition=Q(overrides__until__gt=_MOMENT))
        )
        .filter(Q(name__in=[_TEXTS[0], SITE]) | Q(children__name=_TEXTS[0]))
        .values_list(
            "id",
            "name",
            "enabled",
            "enforce",
            "daily_limit_usd",
            "monthly_limit_usd",
            "model",
            "max_tokens",
            "allow_unbounded",
            "parent__name",
            "rungs__at_percent",
            "rungs__model",
            "raised__period",
            "raised__amount_usd",
            "children__name",
        )
        .order_by()
    )


def _budget(rows: list[Any]) -> Budget:
    """Fold the rows of one budget, repeated for each of its rungs and overrides."""
    _, name, enabled, enforce, daily, monthly, model, max_tokens, unbounded, *_rest = rows[0]
    if name == SITE:
        daily = _setting(conf.DAILY_LIMIT_USD) if daily is None else daily
        monthly = _setting(conf.MONTHLY_LIMIT_USD) if monthly is None else monthly
    rungs = {(row[10], row[11]) for row in rows if row[10] is not None}
    raised = {(row[12], row[13]) for row in rows if row[12] is not None}
    return Budget(
        name=name,
        enabled=bool(enabled),
        enforce=bool(enforce),
        daily_limit=_raised(daily, (amount for period, amount in raised if period == "day")),
        monthly_limit=_raised(monthly, (amount for period, amount in raised if period == "month")),
        model=model,
        max_tokens=max_tokens,
        allow_unbounded=bool(unbounded),
        rungs=tuple(Rung(at_percent=percent, model=model) for percent, model in sorted(rungs)),
    )


def _raised(limit: int | None, overrides: Iterable[int]) -> int | None:
    """Return a limit, raised by the highest override in force."""
    return None if limit is None else max([limit, *overrides])


def _site_of_settings() -> Budget:
    """Return the site's budget where nobody has made a row for it."""
    return Budget(
        name=SITE,
        daily_limit=_setting(conf.DAILY_LIMIT_USD),
        monthly_limit=_setting(conf.MONTHLY_LIMIT_USD),
    )


@lru_cache(maxsize=64, typed=True)
def _setting(limit: Decimal | int | str | None) -> int | None:
    return None if limit is None else money.parse_usd(limit)


def _quotas(charge: Charge, feature_id: int) -> tuple[Quota, ...]:
    if charge.user_id is None and not charge.subject:
        return ()
    everyone = "everyone"
    whose = everyone if charge.user_id is None else f"user:{charge.user_id}"
    keys = [everyone, f"{everyone},feature:{feature_id}", whose, f"{whose},feature:{feature_id}"]
    connection = connections[conf.LEDGER_DATABASE]
    return tuple(
        Quota(
            for_user=key.startswith("user:"),
            for_feature=",feature:" in key,
            unlimited=bool(unlimited),
            daily_calls=calls,
            daily_limit=daily,
            monthly_limit=monthly,
        )
        for key, unlimited, calls, daily, monthly in _phrased(
            connection, "quotas", _quotas_query
        ).run(*keys)
    )


def _quotas_query() -> QuerySet[Any]:
    return (
        UserQuota.objects.filter(key__in=_TEXTS)
        .values_list("key", "unlimited", "daily_calls", "daily_limit_usd", "monthly_limit_usd")
        .order_by()
    )


# Queries that the ORM phrases once, because it takes longer than the database to answer

_TEXTS = [f"ai_budget:{number}" for number in range(4)]
_MOMENT = datetime(1970, 1, 1, tzinfo=UTC)


class _Phrased:
    """A query with places for texts and a moment; amounts come out as nano-dollars."""

    def __init__(self, connection: BaseDatabaseWrapper, queryset: QuerySet[Any]) -> None:
        self._connection = connection
        compiler = queryset.using(connection.alias).query.get_compiler(connection=connection)
        self._sql, self._params = compiler.as_sql()
        self._moment = connection.ops.adapt_datetimefield_value(_MOMENT)

    def run(self, *texts: str, at: datetime = _MOMENT) -> list[Any]:
        """Return the rows for these texts at this moment."""
        given: dict[Any, Any] = dict(zip(_TEXTS, texts, strict=False))
        given[self._moment] = self._connection.ops.adapt_datetimefield_value(at)
        with self._connection.cursor() as cursor:
            cursor.execute(self._sql, [given.get(param, param) for param in self._params])
            return list(cursor.fetchall())


def _phrased(
    connection: BaseDatabaseWrapper, name: str, query: Callable[[], QuerySet[Any]]
) -> _Phrased:
    """Return a query as it was phrased for this connection."""
    kept: dict[str, _Phrased] | None = getattr(connection, "_ai_budget_queries", None)
    if kept is None:
        kept = {}
        connection._ai_budget_queries = kept  # type: ignore[attr-defined]
    if name not in kept:
        kept[name] = _Phrased(connection, query())
    return kept[name]
