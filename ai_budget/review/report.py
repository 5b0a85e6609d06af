"""The monthly cost review: every section of it, read at one moment.

Amounts are integer nano-dollars. A call belongs to the range in which it was reserved. *Calls*
are what quotas count: the counted attempts that were paid for or are still in flight, and the
answers from the cache. *Spend* is the cost of settled and estimated attempts; what calls in
flight hold stands apart as held. Released attempts cost nothing and are counted as attempts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime

from ai_budget import periods
from ai_budget.review import attention
from ai_budget.review.alerts import spikes_in
from ai_budget.review.attention import Concern
from ai_budget.review.caching import Caching
from ai_budget.review.comparison import Comparison, comparison_of, is_month, span_before
from ai_budget.review.forecast import Forecast, forecasts
from ai_budget.review.limits import Allowance, Budgets
from ai_budget.review.pace import BudgetPace, by_budget, weekly_pace
from ai_budget.review.refusals import Refusals, by_refusal, refused_in
from ai_budget.review.spans import Span
from ai_budget.review.spending import (
    CategorySpend,
    Downgrade,
    FeatureSpend,
    Grouped,
    ModelSpend,
    Saving,
    SubjectSpend,
    Total,
    UserSpend,
    added,
    categories_of,
    downgrades_of,
    features_of,
    models_of,
    savings_of,
    subjects_of,
    total_of,
    users_of,
)
from ai_budget.review.sums import Reading, reading

_COLUMNS = (
    "feature",
    "category",
    "provider",
    "model",
    "requested_model",
    "kind",
    "saved_reason",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Every section. ``since`` and ``until`` are in the zone whose days limits count in.

    ``days`` are the nano-dollars that were spent by day and feature. A forecast is there for the
    running month alone, once it has begun well.
    """

    since: datetime
    until: datetime
    time_zone: str
    at: datetime
    span: Span
    total: Total
    comparison: Comparison
    features: tuple[FeatureSpend, ...]
    users: tuple[UserSpend, ...]
    subjects: tuple[SubjectSpend, ...]
    models: tuple[ModelSpend, ...]
    refusals: tuple[Refusals, ...]
    downgrades: tuple[Downgrade, ...]
    savings: tuple[Saving, ...] = ()
    categories: tuple[CategorySpend, ...] = ()
    days: Mapping[tuple[date, str], int] = field(default_factory=dict)
    weeks: tuple[BudgetPace, ...] = ()
    forecast: Forecast | None = None
    forecasts: tuple[Forecast, ...] = ()
    attention: tuple[Concern, ...] = ()

    @property
    def feature(self) -> str:
        """The feature or category that it is about; "*" for all."""
        return self.span.feature

    @property
    def not_worth_caching(self) -> tuple[Caching, ...]:
        """The features whose response cache finds too little."""
        found = (feature.caching for feature in self.features)
        return tuple(caching for caching in found if caching.is_worthless)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was called and nothing refused."""
        return not (self.total.attempts or self.total.cached or self.total.refused)


def cost_report(span: Span, *, top: int = 10, using: str | None = None) -> Report:
    """Return every section, with the ``top`` most expensive users and subjects."""
    with reading(using) as at_once:
        return report_of(at_once, span, top=top)


def report_of(reading: Reading, span: Span, *, top: int = 10) -> Report:
    """Return every section as it is read at one moment. See ``cost_report``."""
    now, zone, alias = reading.now, reading.zone, reading.alias
    budgets = Budgets.read(span.since, span.until, using=alias)
    allowed = {} if span.is_narrow else budgets.over(span.since, span.until)
    grouped = Grouped(columns=_COLUMNS, figures=reading.by(span, *_COLUMNS))
    refusals = by_refusal(span, using=alias)
    spent = reading.spend(span, "day", "feature", "category")
    active_users, spend_by_users = reading.active_users(span)
    total = total_of(
        added(grouped.figures.values()),
        refused=refused_in(span, refusals, using=alias),
        active_users=active_users,
        spend_by_users_nanousd=spend_by_users,
        allowance=allowed.get(span.feature, Allowance()),
    )
    features = features_of(grouped, refusals=refusals, allowed=allowed)
    categories = categories_of(
        grouped, refusals=refusals, parents=_parents(budgets), allowed=allowed
    )
    expected = _forecasts(reading, span, grouped, allowed)
    return Report(
        since=span.since.astimezone(zone),
        until=span.until.astimezone(zone),
        time_zone=str(zone),
        span=span,
        at=now,
        total=total,
        categories=categories,
        features=features,
        days=_by_day(spent),
        weeks=() if span.is_narrow else weekly_pace(span, spent=spent, budgets=budgets, now=now),
        users=users_of(reading.users(span, top=top)),
        subjects=subjects_of(reading.subjects(span, top=top)),
        models=models_of(grouped),
        refusals=refusals,
        downgrades=downgrades_of(grouped),
        savings=savings_of(grouped),
        comparison=_comparison(reading, span, grouped, total),
        forecast=next((it for it in expected if it.name == span.feature), None),
        forecasts=tuple(it for it in expected if it.name != span.feature),
        attention=tuple(_concerns(reading, span, grouped, total, categories, features, expected)),
    )


def _by_day(spent: Mapping[tuple[date, str, str], int]) -> dict[tuple[date, str], int]:
    days: dict[tuple[date, str], int] = {}
    for (day, feature, _category), cost in spent.items():
        days[day, feature] = days.get((day, feature), 0) + cost
    return days


def _parents(budgets: Budgets) -> dict[str, str]:
    return {
        name: budget.parent.name
        for name, budget in budgets.rows.items()
        if budget.parent is not None
    }


def _comparison(reading: Reading, span: Span, grouped: Grouped, total: Total) -> Comparison:
    before = span_before(span, now=reading.now, zone=reading.zone)
    features = grouped.by("feature").items()
    return comparison_of(
        span,
        now=reading.now,
        zone=reading.zone,
        spent={name: figures.spend_nanousd for (name,), figures in features},
        spent_before={name: cost for (name,), cost in reading.spend(before, "feature").items()},
        calls=total.calls,
        calls_before=reading.calls_made(before),
    )


def _forecasts(
    reading: Reading, span: Span, grouped: Grouped, allowed: Mapping[str, Allowance]
) -> tuple[Forecast, ...]:
    if not is_month(span, reading.zone):
        return ()
    month = periods.month(span.since, reading.zone)
    spent = {
        (feature, category): figures.spend_nanousd
        for (feature, category), figures in grouped.by("feature", "category").items()
    }
    return forecasts(by_budget(spent, about=span.feature), month, now=reading.now, allowed=allowed)


def _concerns(
    reading: Reading,
    span: Span,
    grouped: Grouped,
    total: Total,
    categories: Sequence[CategorySpend],
    features: Sequence[FeatureSpend],
    expected: Sequence[Forecast],
) -> Iterator[Concern]:
    """Yield what needs attention, the most urgent first; of the present only in its own span."""
    over = attention.over_plan(
        [
            (span.feature, total),
            *((it.category, it) for it in categories),
            *((it.feature, it) for it in features),
        ]
    )
    yield from over
    yield from attention.forecast_over(expected, known={it.feature for it in over})
    running = span.since <= reading.now < span.until and not span.is_narrow
    if running:
        yield from _spikes(reading, span, {it.feature for it in features})
    yield from attention.unpriced(grouped, at=reading.now, using=reading.alias)
    if running:
        late = attention.stale(reading, span)
        behind = attention.behind(reading)
        yield from (it for it in (late, behind) if it is not None)
    yield from attention.answer_lengths(grouped)
    yield from attention.worthless_caches([it.caching for it in features])


def _spikes(reading: Reading, span: Span, names: set[str]) -> Iterator[attention.Spike]:
    for due in spikes_in(reading):
        if due.budget in names and due.since is not None:
            yield attention.Spike(
                feature=due.budget,
                since=due.since.astimezone(reading.zone),
                spend_nanousd=due.spent_nanousd,
                usual_nanousd=due.of_nanousd or 0,
            )
