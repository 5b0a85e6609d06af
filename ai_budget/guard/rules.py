"""Reads the rules in force for a charge: always from the database, so that a change in admin
is effective on the next call in every worker."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any

from django.db.models import Q

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.exceptions import FeatureDisabled
from ai_budget.models import FeatureBudget, UserQuota
from ai_budget.models.budgets import NAME_PATTERN
from ai_budget.policy.limits import Budget, Quota, Rules, Rung
from ai_budget.values import SITE, Charge


def read_rules(charge: Charge, *, at: datetime) -> Rules:
    """Return the budgets and quotas that a charge counts against at that moment.

    An unknown feature gets a budget with the defaults, or raises ``FeatureDisabled``, as the
    setting ``UNKNOWN_FEATURE`` says.
    """
    rows = _budget_rows(charge.feature, at)
    if charge.feature not in rows:
        _create(charge.feature)
        rows = _budget_rows(charge.feature, at)
    feature, parent = rows[charge.feature]
    category = next((budget for budget, _ in rows.values() if budget.name == parent), None)
    site = rows[SITE][0] if SITE in rows else _site_of_settings()
    return Rules(feature=feature, category=category, site=site, quotas=_quotas(charge))


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


def _budget_rows(feature: str, at: datetime) -> dict[str, tuple[Budget, str | None]]:
    """Return the feature, its category and the site by name, each with its parent's name."""
    budgets = (
        FeatureBudget.objects.using(conf.LEDGER_DATABASE)
        .filter(Q(name__in=[feature, SITE]) | Q(children__name=feature))
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
            "overrides__period",
            "overrides__amount_usd",
            "overrides__until",
        )
        .order_by()
    )
    found: dict[str, list[tuple[Any, ...]]] = {}
    for row in budgets:
        found.setdefault(row[1], []).append(row)
    return {name: (_budget(rows, at), rows[0][9]) for name, rows in found.items()}


def _budget(rows: list[tuple[Any, ...]], at: datetime) -> Budget:
    """Fold the rows of one budget, repeated for each of its rungs and overrides."""
    first = rows[0]
    rungs = {(row[10], row[11]) for row in rows if row[10] is not None}
    raised = {(row[12], row[13]) for row in rows if row[14] is not None and row[14] > at}
    daily, monthly = first[4], first[5]
    if first[1] == SITE:
        daily = _setting(conf.DAILY_LIMIT_USD) if daily is None else daily
        monthly = _setting(conf.MONTHLY_LIMIT_USD) if monthly is None else monthly
    return Budget(
        name=first[1],
        enabled=bool(first[2]),
        enforce=bool(first[3]),
        daily_limit=_raised(daily, (amount for period, amount in raised if period == "day")),
        monthly_limit=_raised(monthly, (amount for period, amount in raised if period == "month")),
        model=first[6],
        max_tokens=first[7],
        allow_unbounded=bool(first[8]),
        rungs=tuple(Rung(at_percent=percent, model=model) for percent, model in sorted(rungs)),
    )


def _raised(limit: Decimal | None, overrides: Iterable[Decimal]) -> int | None:
    """Return a limit in nano-dollars, raised by the highest override in force."""
    if limit is None:
        return None
    return money.parse_usd(max([limit, *overrides]))


def _site_of_settings() -> Budget:
    """Return the site's budget where nobody has made a row for it."""
    return Budget(
        name=SITE,
        daily_limit=_raised(_setting(conf.DAILY_LIMIT_USD), ()),
        monthly_limit=_raised(_setting(conf.MONTHLY_LIMIT_USD), ()),
    )


def _setting(limit: Decimal | int | str | None) -> Decimal | None:
    return None if limit is None else money.to_usd(money.parse_usd(limit))


def _quotas(charge: Charge) -> tuple[Quota, ...]:
    if charge.user_id is None and not charge.subject:
        return ()
    whom = Q(user__isnull=True, group__isnull=True)
    if charge.user_id is not None:
        whom |= Q(user=charge.user_id)
    rows = (
        UserQuota.objects.using(conf.LEDGER_DATABASE)
        .filter(whom, Q(feature__isnull=True) | Q(feature__name=charge.feature))
        .values_list(
            "user_id",
            "feature_id",
            "unlimited",
            "daily_calls",
            "daily_limit_usd",
            "monthly_limit_usd",
        )
        .order_by()
    )
    return tuple(
        Quota(
            for_user=user is not None,
            for_feature=feature is not None,
            unlimited=bool(unlimited),
            daily_calls=calls,
            daily_limit=None if daily is None else money.parse_usd(daily),
            monthly_limit=None if monthly is None else money.parse_usd(monthly),
        )
        for user, feature, unlimited, calls, daily, monthly in rows
    )
