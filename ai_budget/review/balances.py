"""What budgets have taken of their limits in the day and the month that contain the present.

Asked of the ledger, so never inside ``sums.reading``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from django.db import connections

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import LedgerUnavailable
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.mirror import mirrored
from ai_budget.models import FeatureBudget, LimitOverride
from ai_budget.periods import Period
from ai_budget.review.arithmetic import percent
from ai_budget.review.limits import base_limit, raised_by
from ai_budget.values import SITE, BalanceKey, Balances


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


def balances_today_and_month(
    budgets: Collection[FeatureBudget], *, using: str | None = None
) -> dict[str, BudgetUse]:
    """Return what each budget has taken of its daily and monthly limit, by its name.

    One query for the balances and one for the overrides, however many budgets.
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
    live = balances_now(keys, using=alias)
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


def balances_now(
    keys: Collection[BalanceKey], *, using: str | None = None
) -> Mapping[BalanceKey, Balances]:
    """Return what is spent and held now; keys that were never counted in may be left out.

    Where the ledger does not answer it is what ``ai_budget_tick`` copied last: a feature can be
    paused, or a user blocked, just then.
    """
    try:
        return ledgers.current().balances(keys)
    except LedgerUnavailable:
        return mirrored(connections[using or conf.LEDGER_DATABASE], keys)


def _scopes(budget: FeatureBudget) -> list[str]:
    if budget.is_site:
        return [SITE]
    return [f"feature:{budget.name}", f"category:{budget.name}"]


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
