"""Where a caller or a feature stands: what is spent, held and left in the windows of now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.guard.rules import read_quotas, read_rules, read_site
from ai_budget.ledger import base as ledgers
from ai_budget.periods import Period, Window
from ai_budget.policy.limits import Budget, Rules, caller_scopes, limits_in_force
from ai_budget.values import SITE, Balances, Bucket, Charge, Limit, Measure


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowStanding:
    """What is spent and held in one day or month, and what its limits leave.

    Amounts of money are dollars. ``limit`` and ``left`` are None where there is no limit, as
    ``calls_limit`` and ``calls_left`` are.
    """

    window: Window
    balance: Balances
    limit_nanousd: int | None = None
    calls_limit: int | None = None

    @property
    def spent(self) -> Decimal:
        return money.to_usd(self.balance.spent_nanousd)

    @property
    def held(self) -> Decimal:
        """What calls in flight may still cost."""
        return money.to_usd(self.balance.held_nanousd)

    @property
    def limit(self) -> Decimal | None:
        return None if self.limit_nanousd is None else money.to_usd(self.limit_nanousd)

    @property
    def left(self) -> Decimal | None:
        """What the next call may cost; never less than nothing."""
        left = self.left_nanousd
        return None if left is None else money.to_usd(left)

    @property
    def left_nanousd(self) -> int | None:
        if self.limit_nanousd is None:
            return None
        return max(0, self.limit_nanousd - self.balance.taken_nanousd)

    @property
    def calls(self) -> int:
        return self.balance.calls

    @property
    def calls_left(self) -> int | None:
        return None if self.calls_limit is None else max(0, self.calls_limit - self.calls)

    @property
    def resets_at(self) -> datetime:
        """When the window ends and the next one begins."""
        return self.window.end


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where a caller or a feature stands now: its day, its month, and the tighter of the two.

    ``spent``, ``held``, ``left``, ``limit`` and ``resets_at`` are those of the tightest window:
    of the limits that there are, the one with the least left, and the day without any.
    ``calls`` and ``calls_left`` are the day's, for calls are limited by the day.
    """

    scope: str
    day: WindowStanding
    month: WindowStanding

    @property
    def tightest(self) -> WindowStanding:
        limited = [one for one in (self.day, self.month) if one.left_nanousd is not None]
        return min(limited, key=lambda one: one.left_nanousd or 0, default=self.day)

    @property
    def spent(self) -> Decimal:
        return self.tightest.spent

    @property
    def held(self) -> Decimal:
        """What calls in flight may still cost."""
        return self.tightest.held

    @property
    def limit(self) -> Decimal | None:
        return self.tightest.limit

    @property
    def left(self) -> Decimal | None:
        """What the next call may cost; None without a limit."""
        return self.tightest.left

    @property
    def calls(self) -> int:
        return self.day.calls

    @property
    def calls_left(self) -> int | None:
        return self.day.calls_left

    @property
    def resets_at(self) -> datetime:
        return self.tightest.resets_at


def standing_of_feature(charge: Charge) -> Standing:
    """Return where a feature stands; a category with all its features together.

    Raises ``FeatureDisabled`` for a name that no call could be made for.
    """
    at = ledgers.current().now()
    alone = Charge(feature=charge.feature)
    rules = read_rules(alone, at=at)
    whole = rules.category_name == charge.feature
    scope = f"{'category' if whole else 'feature'}:{charge.feature}"
    return _standing(scope, limits_in_force(alone, rules, at=at, zone=conf.TIME_ZONE))


def standing_of_site() -> Standing:
    """Return where the whole site stands."""
    at = ledgers.current().now()
    rules = Rules(feature=Budget(name=SITE), site=read_site(at=at))
    limits = limits_in_force(Charge(feature=SITE), rules, at=at, zone=conf.TIME_ZONE)
    return _standing(SITE, limits)


def standing_of_caller(charge: Charge, *, in_feature: bool) -> Standing:
    """Return where a user or a subject stands, in all features together or in the charge's.

    Raises ``FeatureDisabled`` for a name that no call could be made for.
    """
    at = ledgers.current().now()
    rules = (
        read_rules(charge, at=at)
        if in_feature
        else Rules(feature=Budget(name=charge.feature), quotas=read_quotas(charge))
    )
    scope = next(name for name, of_one in caller_scopes(charge) if of_one == in_feature)
    return _standing(scope, limits_in_force(charge, rules, at=at, zone=conf.TIME_ZONE))


def _standing(scope: str, limits: Iterable[Limit | Bucket]) -> Standing:
    own = [limit for limit in limits if isinstance(limit, Limit) and limit.scope == scope]
    balances = ledgers.current().balances(limit.key for limit in own)
    nothing = Balances()

    def of(period: Period) -> WindowStanding:
        found = {limit.measure: limit for limit in own if limit.window.period is period}
        dollars, calls = found[Measure.NANOUSD], found.get(Measure.CALLS)
        return WindowStanding(
            window=dollars.window,
            balance=balances.get(dollars.key, nothing),
            limit_nanousd=dollars.amount,
            calls_limit=None if calls is None else calls.amount,
        )

    return Standing(scope=scope, day=of(Period.DAY), month=of(Period.MONTH))
