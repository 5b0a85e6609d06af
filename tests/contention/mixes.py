"""Mixes of limits as a site may have them, chosen by a seed: each on a month of its own, so that
one database serves them all."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from ai_budget.policy.limits import Budget, Quota, Rules, limits_in_force
from ai_budget.values import SITE, Amounts, Bucket, Charge, Limit, Measure
from tests.contention.calls import ENDINGS, Wish, taken
from tests.ledger.given import ZONE

CHARGES = (
    Charge(feature="chat"),
    Charge(feature="chat", user_id=7),
    Charge(feature="mail", user_id=7, subject="acme"),
    Charge(feature="mail", user_id=8),
    Charge(feature="search", subject="acme"),
)
BUCKET_SCOPES = (SITE, "feature:chat", "category:support", "user:7", "subject:acme")


def month(number: int) -> datetime:
    """Noon of a day in a month that no other number has."""
    return datetime(2026 + number // 12, 1 + number % 12, 1 + number % 28, 12, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Limits in force at a moment; ``chat`` and ``mail`` are in the category "support"."""

    at: datetime
    daily: dict[str, int | None]
    monthly: dict[str, int | None]
    quotas: tuple[Quota, ...]
    buckets: tuple[Bucket, ...]

    def limits(self, charge: Charge) -> tuple[Limit | Bucket, ...]:
        category = self.category(charge)
        rules = Rules(
            feature=self._budget(charge.feature),
            category=self._budget(category) if category else None,
            site=self._budget(SITE),
            quotas=self.quotas,
        )
        counted = limits_in_force(charge, rules, at=self.at, zone=ZONE)
        scopes = {limit.scope for limit in counted}
        return (*counted, *(bucket for bucket in self.buckets if bucket.scope in scopes))

    def category(self, charge: Charge) -> str:
        return "support" if charge.feature in {"chat", "mail"} else ""

    def wish(self, charge: Charge, amounts: Amounts, **ending: object) -> Wish:
        return Wish(
            charge=charge,
            category=self.category(charge),
            limits=self.limits(charge),
            amounts=amounts,
            at=self.at,
            **ending,  # type: ignore[arg-type]
        )

    def _budget(self, name: str) -> Budget:
        return Budget(
            name=name, daily_limit=self.daily.get(name), monthly_limit=self.monthly.get(name)
        )


def random_mix(chance: random.Random, at: datetime, *, most: int, calls: int, tokens: int) -> Mix:
    """Limits of all kinds, each somewhere up to what would hold everything."""

    def some(top: int) -> int | None:
        return chance.randint(0, top) if chance.random() < 0.4 else None

    names = ("chat", "mail", "search", "support", SITE)
    return Mix(
        at=at,
        daily={name: some(most) for name in names},
        monthly={name: some(2 * most) for name in names},
        quotas=tuple(
            Quota(
                for_feature=for_feature,
                daily_limit=some(most),
                monthly_limit=some(2 * most),
                daily_calls=some(calls),
            )
            for for_feature in (False, True)
        ),
        buckets=tuple(
            Bucket(scope=scope, measure=measure, amount=amount, seconds=_seconds(at))
            for scope in BUCKET_SCOPES
            for measure, top in ((Measure.REQUESTS, calls), (Measure.TOKENS, tokens))
            if (amount := some(top)) is not None
        ),
    )


def _seconds(at: datetime) -> int:
    """How long a month's buckets take to refill: no two months share a bucket."""
    return 60 + 12 * (at.year - 2026) + at.month


def random_wishes(seed: int, count: int, *, at: datetime, endings: bool) -> list[Wish]:
    """Calls of several callers over a random mix; some end, if they may."""
    chance = random.Random(seed)
    mix = random_mix(chance, at, most=5 * count, calls=count, tokens=20 * count)
    callers = chance.sample(CHARGES, chance.randint(1, len(CHARGES)))
    wishes = []
    for _ in range(count):
        amounts = Amounts(
            nanousd=chance.randint(0, 9),
            calls=chance.choice([1, 1, 1, 0]),
            tokens=chance.randint(0, 40),
        )
        wishes.append(
            mix.wish(
                chance.choice(callers),
                amounts,
                ending=chance.choice(ENDINGS) if endings else "abandon",
                cost=chance.randint(0, amounts.nanousd),
                tokens=chance.randint(0, amounts.tokens),
            )
        )
    return wishes


def tight_wish(seed: int, fits: int, of: int) -> Wish:
    """A call of which exactly so many fit into the tightest of the limits of a random mix.

    The others hold more, or as much; the tightest has a rest that holds no whole call.
    """
    chance = random.Random(seed)
    amounts = Amounts(
        nanousd=chance.randint(2, 9), calls=1, tokens=chance.choice([0, chance.randint(2, 40)])
    )
    loose = random_mix(chance, month(seed), most=0, calls=0, tokens=0)
    charge = chance.choice(CHARGES)
    wish = loose.wish(charge, amounts)
    limits = [
        limit if limit.amount is None else replace(limit, amount=_holding(limit, wish, chance, of))
        for limit in wish.limits
    ]
    tightest = chance.randrange(len(limits))
    limit = limits[tightest]
    size = taken(limit, amounts) or 1
    limits[tightest] = replace(limit, amount=fits * size + chance.randrange(size))
    limits = [_at_least(limit, fits, amounts) for limit in limits]
    if not taken(limit, amounts):
        # It was a limit of tokens, and the call has none.
        limits.append(Bucket(scope=SITE, measure=Measure.REQUESTS, amount=fits, seconds=1))
    return replace(wish, limits=tuple(limits))


def _holding(limit: Limit | Bucket, wish: Wish, chance: random.Random, of: int) -> int:
    return taken(limit, wish.amounts) * chance.randint(1, of)


def _at_least(limit: Limit | Bucket, fits: int, amounts: Amounts) -> Limit | Bucket:
    if limit.amount is None:
        return limit
    return replace(limit, amount=max(limit.amount, fits * taken(limit, amounts)))


def simple_limits(
    charge: Charge, at: datetime, *, feature: int | None = None, site: int | None = None
) -> tuple[Limit | Bucket, ...]:
    """All that a charge counts in, with these daily limits."""
    rules = Rules(
        feature=Budget(name=charge.feature, daily_limit=feature),
        site=Budget(name=SITE, daily_limit=site),
    )
    return tuple(limits_in_force(charge, rules, at=at, zone=ZONE))
