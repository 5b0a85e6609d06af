"""What somebody should look at: values that say so in figures, and nothing in words.

``wording.sentence`` puts them into words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import ClassVar

from django.db.models import Count, Min, Q, Sum

from ai_budget.exceptions import UnpricedModel
from ai_budget.models import CallLog, ModelRate
from ai_budget.pricing.rates import DEAREST, resolve
from ai_budget.review.arithmetic import average, percent
from ai_budget.review.caching import Caching
from ai_budget.review.forecast import Forecast
from ai_budget.review.pace import Against
from ai_budget.review.spans import Span
from ai_budget.review.spending import Grouped, Spend
from ai_budget.review.sums import Figures, Reading
from ai_budget.values import SITE, Kind

ENOUGH_ANSWERS = 100
"""Settled answers after which their lengths tell something."""

CUT_PERCENT = 5
"""From this share of answers cut off on, ``max_tokens`` is too low."""

ROOMY_MULTIPLE = 4
"""How many times the average answer ``max_tokens`` has to be, to be too high."""

STALE_AFTER = timedelta(minutes=10)
"""How long after its deadline a reservation should have been booked by the tick."""

BEHIND_QUARTERS = 8
"""Quarter-hours that wait to be added up, from which on nobody seems to do it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Concern:
    """Something to look at; ``feature`` is any budget's name, and both are empty for none."""

    kind: ClassVar[str] = ""

    feature: str = ""
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OverPlan(Concern):
    """A budget spent much more than was planned."""

    kind: ClassVar[str] = "over_plan"

    spend_nanousd: int
    plan_nanousd: int

    @property
    def used(self) -> Decimal | None:
        """Spend as a percentage of the plan."""
        return percent(self.spend_nanousd, self.plan_nanousd)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastOver(Concern):
    """A budget will pass its plan or its limit by the end of the month."""

    kind: ClassVar[str] = "forecast_over"

    against: Against
    forecast_nanousd: int
    allowed_nanousd: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike(Concern):
    """An hour is far dearer than the same hours of the last two weeks."""

    kind: ClassVar[str] = "spike"

    since: datetime
    spend_nanousd: int
    usual_nanousd: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorthlessCache(Concern):
    """The response cache of a feature finds too little."""

    kind: ClassVar[str] = "worthless_cache"

    looked_up: int
    cached: int

    @property
    def hit_rate(self) -> Decimal | None:
        """The percentage that was found."""
        return percent(self.cached, self.looked_up)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomyAnswers(Concern):
    """No answer comes near ``max_tokens``, so each call holds more money than it needs to."""

    kind: ClassVar[str] = "roomy_answers"

    answers: int
    average_output_tokens: int
    average_max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CutAnswers(Concern):
    """Answers end in the middle for want of ``max_tokens``."""

    kind: ClassVar[str] = "cut_answers"

    answers: int
    cut: int
    average_max_tokens: int

    @property
    def share(self) -> Decimal | None:
        """The percentage of answers that were cut."""
        return percent(self.cut, self.answers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpriced(Concern):
    """Nobody knows the price of a model that is in use."""

    kind: ClassVar[str] = "unpriced"

    provider: str
    calls: int
    spend_nanousd: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stale(Concern):
    """Calls whose worker never came back still hold money long after their deadline."""

    kind: ClassVar[str] = "stale"

    calls: int
    held_nanousd: int
    since: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Behind(Concern):
    """Nobody brings the totals up to date: figures are right, and ever slower to read."""

    kind: ClassVar[str] = "behind"

    quarter_hours: int


def over_plan(spends: Iterable[tuple[str, Spend]]) -> list[OverPlan]:
    """Return the budgets that spent much more than they planned, each once."""
    found: dict[str, OverPlan] = {}
    for name, it in spends:
        if it.is_over_plan and it.plan_nanousd is not None:
            over = OverPlan(
                feature=name, spend_nanousd=it.spend_nanousd, plan_nanousd=it.plan_nanousd
            )
            found.setdefault(name, over)
    return list(found.values())


def forecast_over(
    forecasts: Sequence[Forecast], *, known: Collection[str] = ()
) -> Iterator[ForecastOver]:
    """Yield budgets that will pass their limit, or their plan where that is not ``known`` yet."""
    for it in forecasts:
        if it.is_over_budget and it.budget_nanousd is not None:
            yield ForecastOver(
                feature=it.name,
                against=Against.LIMIT,
                forecast_nanousd=it.forecast_nanousd,
                allowed_nanousd=it.budget_nanousd,
            )
        if it.is_over_plan and it.plan_nanousd is not None and it.name not in known:
            yield ForecastOver(
                feature=it.name,
                against=Against.PLAN,
                forecast_nanousd=it.forecast_nanousd,
                allowed_nanousd=it.plan_nanousd,
            )


def worthless_caches(cachings: Sequence[Caching]) -> list[WorthlessCache]:
    """Return the features whose response cache finds too little."""
    return [
        WorthlessCache(feature=it.feature, looked_up=it.looked_up, cached=it.cached)
        for it in cachings
        if it.is_worthless
    ]


def answer_lengths(grouped: Grouped) -> list[RoomyAnswers | CutAnswers]:
    """Return where ``max_tokens`` fits its answers badly, by feature and model."""
    groups = grouped.by("feature", "model", "kind").items()
    found: dict[tuple[str, str], Figures] = {}
    for (feature, model, kind), figures in groups:
        if kind not in _HELPERS:
            key = (feature, model)
            found[key] = found.get(key, Figures()) + figures
    judged = (_length(feature, model, it) for (feature, model), it in sorted(found.items()))
    return [it for it in judged if it is not None]


_HELPERS = (Kind.ROUTER, Kind.SUMMARY)


def _length(feature: str, model: str, figures: Figures) -> RoomyAnswers | CutAnswers | None:
    answers = figures.settled_attempts
    if answers < ENOUGH_ANSWERS:
        return None
    allowed = average(figures.max_tokens, answers) or 0
    if figures.cut * 100 >= answers * CUT_PERCENT:
        return CutAnswers(
            feature=feature,
            model=model,
            answers=answers,
            cut=figures.cut,
            average_max_tokens=allowed,
        )
    used = figures.output_tokens
    if figures.cut or figures.roomy < answers or used * ROOMY_MULTIPLE > figures.max_tokens:
        return None
    return RoomyAnswers(
        feature=feature,
        model=model,
        answers=answers,
        average_output_tokens=average(used, answers) or 0,
        average_max_tokens=allowed,
    )


def unpriced(grouped: Grouped, *, at: datetime, using: str) -> list[Unpriced]:
    """Return the models that were paid for and have no price at a moment.

    Which region answered is not told apart in sums: a price in any of them is one.
    """
    rates = ModelRate.objects.using(using).exclude(region="").order_by()
    regions = list(rates.values_list("provider", "region").distinct())
    found = []
    for (provider, model), figures in sorted(grouped.by("provider", "model").items()):
        places = ["", *(region for seller, region in regions if seller == provider)]
        if figures.paid_attempts and not any(_has_price(model, provider, it, at) for it in places):
            found.append(
                Unpriced(
                    model=model,
                    provider=provider,
                    calls=figures.paid_calls,
                    spend_nanousd=figures.spend_nanousd,
                )
            )
    return found


def stale(reading: Reading, span: Span) -> Stale | None:
    """Return the reservations of what a span is about that are long past their deadline."""
    late = CallLog.objects.using(reading.alias).filter(
        status=CallLog.Status.RESERVED, deadline__lt=reading.now - STALE_AFTER
    )
    if span.feature != SITE:
        late = late.filter(Q(feature_id=span.feature) | Q(category=span.feature))
    sums = late.order_by().aggregate(
        calls=Count("pk"), held=Sum("reserved_nanousd", default=0), since=Min("deadline")
    )
    if not sums["calls"]:
        return None
    return Stale(
        feature="" if span.feature == SITE else span.feature,
        calls=sums["calls"],
        held_nanousd=int(sums["held"]),
        since=sums["since"].astimezone(reading.zone),
    )


def behind(reading: Reading) -> Behind | None:
    """Return that too much waits to be added up, if it does."""
    waiting = reading.behind
    return Behind(quarter_hours=waiting) if waiting >= BEHIND_QUARTERS else None


def _has_price(model: str, provider: str, region: str, at: datetime) -> bool:
    try:
        return resolve(model, at=at, provider=provider, region=region).source != DEAREST
    except UnpricedModel:
        return False
