"""What the desk's features may spend, and what each reader may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from ai_budget import money
from ai_budget.models import DowngradeRung, FeatureBudget, UserQuota
from ai_budget.values import SITE
from example_project.desk.seed.people import Person

CATEGORY = "reading-room"
READER_DAILY_USD = Decimal("0.30")
READER_MONTHLY_USD = Decimal(6)
# One short call fits once its prompt has been counted, and beside what it cost no other one does;
# see `desk.views.tiny` and the test that holds this number to it.
TINY_DAILY_USD = Decimal("0.0007")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One feature's budget. ``rungs`` are (percent, model)."""

    name: str
    category: str = ""
    daily_usd: str
    monthly_usd: str
    plan_usd: str | None = None
    plan_share: int | None = None
    model: str
    max_tokens: int
    rungs: tuple[tuple[int, str], ...] = ()
    cache_scope: str = "off"
    owner: str = ""

    @property
    def daily_nanousd(self) -> int:
        return money.parse_usd(self.daily_usd)

    @property
    def monthly_nanousd(self) -> int:
        return money.parse_usd(self.monthly_usd)


CHAT = Plan(
    name="chat",
    category=CATEGORY,
    daily_usd="1.20",
    monthly_usd="18",
    plan_share=60,
    model="claude-sonnet-5-5",
    max_tokens=1_000,
    rungs=((75, "claude-haiku-5-5"),),
    owner="chat@desk.example",
)
SUMMARIES = Plan(
    name="summaries",
    category=CATEGORY,
    daily_usd="0.90",
    monthly_usd="12",
    plan_share=40,
    model="claude-sonnet-5-5",
    max_tokens=600,
    owner="summaries@desk.example",
)
CLASSIFICATION = Plan(
    name="classification",
    daily_usd="0.10",
    monthly_usd="1",
    plan_usd="0.80",
    model="claude-haiku-5-5",
    max_tokens=64,
    # The same book is often returned twice.
    cache_scope="shared",
    owner="catalogue@desk.example",
)
TINY = Plan(
    name="tiny",
    daily_usd=str(TINY_DAILY_USD),
    monthly_usd="0.10",
    model="claude-sonnet-5-5",
    max_tokens=40,
)
NIGHTLY = Plan(
    name="nightly",
    daily_usd="0.05",
    monthly_usd="0.50",
    plan_usd="0.20",
    model="claude-haiku-5-5",
    max_tokens=10,
    owner="catalogue@desk.example",
)
PLANS = (CHAT, SUMMARIES, CLASSIFICATION, TINY, NIGHTLY)


def create_budgets(people: Sequence[Person]) -> None:
    """Create the site's budget, a category, the features, and the readers' quotas."""
    FeatureBudget.objects.get_or_create(
        name=SITE,
        defaults={
            "daily_limit_usd": Decimal(5),
            "monthly_limit_usd": Decimal(60),
            "monthly_plan_usd": Decimal(25),
            "owner_email": "desk@desk.example",
        },
    )
    category = FeatureBudget.objects.create(
        name=CATEGORY, monthly_limit_usd=Decimal(30), monthly_plan_usd=Decimal(22)
    )
    for plan in PLANS:
        _create(plan, category if plan.category else None)
    UserQuota.objects.get_or_create(
        user=None,
        group=None,
        feature=None,
        defaults={
            "daily_limit_usd": READER_DAILY_USD,
            "monthly_limit_usd": READER_MONTHLY_USD,
            "daily_calls": 300,
        },
    )
    # The busiest reader has asked for more, and got it.
    UserQuota.objects.get_or_create(
        user_id=people[0].user_id,
        feature=None,
        defaults={"daily_limit_usd": Decimal("0.50"), "monthly_limit_usd": Decimal(10)},
    )


def _create(plan: Plan, category: FeatureBudget | None) -> None:
    budget, created = FeatureBudget.objects.get_or_create(
        name=plan.name,
        defaults={
            "parent": category,
            "daily_limit_usd": Decimal(plan.daily_usd),
            "monthly_limit_usd": Decimal(plan.monthly_usd),
            "monthly_plan_usd": None if plan.plan_usd is None else Decimal(plan.plan_usd),
            "plan_share": plan.plan_share,
            "model": plan.model,
            "max_tokens": plan.max_tokens,
            "cache_scope": plan.cache_scope,
            "owner_email": plan.owner,
        },
    )
    if created:
        for percent, model in plan.rungs:
            DowngradeRung.objects.create(budget=budget, at_percent=percent, model=model)
