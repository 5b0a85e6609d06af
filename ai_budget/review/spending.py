"""What was spent, told apart by category, feature, model and lever: pure functions of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from operator import attrgetter
from typing import Any

from ai_budget.review.arithmetic import average, percent
from ai_budget.review.caching import Caching
from ai_budget.review.limits import Allowance
from ai_budget.review.names import deleted_user, usernames
from ai_budget.review.refusals import Refusals
from ai_budget.review.spenders import CallerFigures
from ai_budget.review.sums import Figures

OVER_PLAN_PERCENT = 120
"""From this share of its plan on, what a budget spent is worth a look."""

LEVERS = ("response cache", "prompt cache", "batch", "routing", "downgrade")
"""What takes something off the bill, in the order in which they are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spend:
    """What is spent and saved against what was allowed."""

    spend_nanousd: int = 0
    held_nanousd: int = 0
    saved_nanousd: int = 0
    calls: int = 0
    cached: int = 0
    looked_up: int = 0
    in_flight: int = 0
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
    def is_over_plan(self) -> bool:
        """Whether much more was spent than planned."""
        if self.plan_nanousd is None:
            return False
        return self.spend_nanousd * 100 > self.plan_nanousd * OVER_PLAN_PERCENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Total(Spend):
    """Everything in the span, against the budget of what the span is about.

    ``refused`` is None where nobody counts how often calls of just this span were refused.
    """

    settled_nanousd: int = 0
    estimated_nanousd: int = 0
    attempts: int = 0
    refused: int | None = 0
    active_users: int = 0
    spend_by_users_nanousd: int = 0

    @property
    def cost_per_active_user_nanousd(self) -> int | None:
        """What users spent, shared among those who made any call."""
        return average(self.spend_by_users_nanousd, self.active_users)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part(Spend):
    """A part of all spend, which is ``total_nanousd``."""

    total_nanousd: int
    refused: int = 0
    downgraded: int = 0

    @property
    def share(self) -> Decimal | None:
        """The percentage of all spend."""
        return percent(self.spend_nanousd, self.total_nanousd)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpend(_Part):
    """One feature."""

    feature: str

    @property
    def caching(self) -> Caching:
        """What its response cache did."""
        return Caching(feature=self.feature, looked_up=self.looked_up, cached=self.cached)


@dataclass(frozen=True, kw_only=True, slots=True)
class CategorySpend(_Part):
    """The features of one category; an empty one is of all that have none."""

    category: str


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
    prompt_tokens: int = 0
    cache_read_tokens: int = 0

    @property
    def share(self) -> Decimal | None:
        """The percentage of all spend."""
        return percent(self.spend_nanousd, self.total_nanousd)

    @property
    def average_prompt_tokens(self) -> int | None:
        """Prompt tokens of a paid call, its repeats included, from the cache or not."""
        return average(self.prompt_tokens, self.paid_calls)

    @property
    def average_output_tokens(self) -> int | None:
        """Output tokens of a paid call, its repeats included."""
        return average(self.output_tokens, self.paid_calls)

    @property
    def average_cost_nanousd(self) -> int | None:
        """Cost of a paid call, its repeats included."""
        return average(self.spend_nanousd, self.paid_calls)

    @property
    def cost_per_1000_output_nanousd(self) -> int | None:
        """All that was paid for, by a thousand of the tokens that came out."""
        return average(self.spend_nanousd * 1_000, self.output_tokens)

    @property
    def cache_read_share(self) -> Decimal | None:
        """The percentage of prompt tokens that were read from the API's prompt cache."""
        return percent(self.cache_read_tokens, self.prompt_tokens)


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

    levers: tuple[str, ...]
    calls: int
    saved_nanousd: int

    @property
    def lever(self) -> str:
        """The levers as one name, the same whichever came first."""
        return ", ".join(self.levers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouped:
    """Figures by some columns, to be added up by fewer of them."""

    columns: tuple[str, ...]
    figures: Mapping[tuple[Any, ...], Figures]

    def by(self, *columns: str) -> dict[tuple[Any, ...], Figures]:
        """Return the figures by these columns."""
        places = [self.columns.index(name) for name in columns]
        groups: dict[tuple[Any, ...], list[Figures]] = {}
        for key, figures in self.figures.items():
            groups.setdefault(tuple(key[place] for place in places), []).append(figures)
        return {key: added(group) for key, group in groups.items()}


def added(group: Iterable[Figures]) -> Figures:
    """Return the sum of many figures."""
    rows = [_values(figures) for figures in group]
    sums = map(sum, zip(*rows, strict=True))
    return Figures(**dict(zip(_NAMES, sums, strict=True))) if rows else Figures()


_NAMES = tuple(field.name for field in fields(Figures))
_values: Callable[[Figures], tuple[int, ...]] = attrgetter(*_NAMES)


# Sections ----------------------------------------------------------------------------------------


def total_of(
    figures: Figures,
    *,
    refused: int | None,
    active_users: int,
    spend_by_users_nanousd: int,
    allowance: Allowance,
) -> Total:
    """Return everything in a span."""
    return Total(
        settled_nanousd=figures.settled_nanousd,
        estimated_nanousd=figures.estimated_nanousd,
        attempts=figures.attempts,
        refused=refused,
        active_users=active_users,
        spend_by_users_nanousd=spend_by_users_nanousd,
        **_spend(figures, allowance),
    )


def features_of(
    grouped: Grouped, *, refusals: Sequence[Refusals], allowed: Mapping[str, Allowance]
) -> tuple[FeatureSpend, ...]:
    """Return features that were called or refused, the most expensive first."""
    found = {name: figures for (name,), figures in grouped.by("feature").items() if _says(figures)}
    refused = {refusal.feature: refusal.refused for refusal in refusals}
    downgraded = _downgraded(grouped, "feature")
    spent_in_all = sum(figures.spend_nanousd for figures in found.values())
    features = (
        FeatureSpend(
            feature=name,
            total_nanousd=spent_in_all,
            refused=refused.get(name, 0),
            downgraded=downgraded.get(name, 0),
            **_spend(found.get(name, Figures()), allowed.get(name, Allowance())),
        )
        for name in found.keys() | refused.keys()
    )
    return tuple(sorted(features, key=lambda it: (-it.spend_nanousd, -it.calls, it.feature)))


def categories_of(
    grouped: Grouped,
    *,
    refusals: Sequence[Refusals],
    parents: Mapping[str, str],
    allowed: Mapping[str, Allowance],
) -> tuple[CategorySpend, ...]:
    """Return categories by the calls that counted in them, the most expensive first.

    ``parents`` are the features' categories now, by which refusals are told apart. Where no call
    counted in a category there are none.
    """
    columns = grouped.by("category").items()
    found = {name: figures for (name,), figures in columns if _says(figures)}
    if not any(found):
        return ()
    refused: dict[str, int] = {}
    for row in refusals:
        category = parents.get(row.feature, "")
        refused[category] = refused.get(category, 0) + row.refused
    downgraded = _downgraded(grouped, "category")
    spent_in_all = sum(figures.spend_nanousd for figures in found.values())
    categories = (
        CategorySpend(
            category=name,
            total_nanousd=spent_in_all,
            refused=refused.get(name, 0),
            downgraded=downgraded.get(name, 0),
            **_spend(figures, allowed.get(name, Allowance()) if name else Allowance()),
        )
        for name, figures in found.items()
    )
    return tuple(sorted(categories, key=lambda it: (-it.spend_nanousd, -it.calls, it.category)))


def models_of(grouped: Grouped) -> tuple[ModelSpend, ...]:
    """Return the models that answered, the most expensive first."""
    found = {name: figures for (name,), figures in grouped.by("model").items() if _says(figures)}
    spent_in_all = sum(figures.spend_nanousd for figures in found.values())
    models = (
        ModelSpend(
            model=name,
            total_nanousd=spent_in_all,
            calls=it.calls,
            paid_calls=it.paid_calls,
            prompt_tokens=it.prompt_tokens,
            cache_read_tokens=it.cache_read_tokens,
            output_tokens=it.output_tokens,
            spend_nanousd=it.spend_nanousd,
        )
        for name, it in found.items()
    )
    return tuple(sorted(models, key=lambda it: (-it.spend_nanousd, -it.calls, it.model)))


def downgrades_of(grouped: Grouped) -> tuple[Downgrade, ...]:
    """Return what was asked for and what answered in its place, by feature."""
    downgrades = (
        Downgrade(
            feature=feature,
            requested_model=asked,
            model=model,
            calls=figures.calls,
            spend_nanousd=figures.spend_nanousd,
        )
        for (feature, asked, model), figures in grouped.by(
            "feature", "requested_model", "model"
        ).items()
        if asked != model and _says(figures)
    )
    return tuple(
        sorted(
            downgrades,
            key=lambda it: (
                -it.spend_nanousd,
                -it.calls,
                it.feature,
                it.requested_model,
                it.model,
            ),
        )
    )


def savings_of(grouped: Grouped) -> tuple[Saving, ...]:
    """Return what each lever saved, the greatest first. Levers of one call stand together."""
    groups: dict[tuple[str, ...], list[Figures]] = {}
    for (reason,), figures in grouped.by("saved_reason").items():
        if reason and _says(figures):
            groups.setdefault(levers_of(reason), []).append(figures)
    savings = []
    for levers, group in groups.items():
        sums = added(group)
        savings.append(Saving(levers=levers, calls=sums.answers, saved_nanousd=sums.saved_nanousd))
    return tuple(sorted(savings, key=lambda it: (-it.saved_nanousd, it.lever)))


def levers_of(reason: str) -> tuple[str, ...]:
    """Return the levers that a call names, in one order: it names them in the order it met them."""
    named = set(filter(None, reason.split(", ")))
    known = [lever for lever in LEVERS if lever in named]
    return (*known, *sorted(named.difference(LEVERS)))


def users_of(rows: Sequence[tuple[Any, CallerFigures]]) -> tuple[UserSpend, ...]:
    """Return users with their names, in the order that they come in."""
    names = usernames(user_id for user_id, _ in rows)
    return tuple(
        UserSpend(
            user_id=user_id,
            label=names.get(user_id) or deleted_user(user_id),
            deleted=user_id not in names,
            calls=figures.calls,
            spend_nanousd=figures.spend_nanousd,
        )
        for user_id, figures in rows
    )


def subjects_of(rows: Sequence[tuple[str, CallerFigures]]) -> tuple[SubjectSpend, ...]:
    """Return subjects, in the order that they come in."""
    return tuple(
        SubjectSpend(subject=name, calls=figures.calls, spend_nanousd=figures.spend_nanousd)
        for name, figures in rows
    )


def _spend(figures: Figures, allowance: Allowance) -> dict[str, Any]:
    return {
        "spend_nanousd": figures.spend_nanousd,
        "held_nanousd": figures.held_nanousd,
        "saved_nanousd": figures.saved_nanousd,
        "calls": figures.calls,
        "cached": figures.cached,
        "looked_up": figures.looked_up,
        "in_flight": figures.in_flight,
        "budget_nanousd": allowance.budget_nanousd,
        "plan_nanousd": allowance.plan_nanousd,
    }


def _says(figures: Figures) -> bool:
    """Whether there is more than attempts that were released."""
    return replace(figures, attempts=0) != Figures()


def _downgraded(grouped: Grouped, column: str) -> dict[str, int]:
    calls: dict[str, int] = {}
    for (name, asked, model), figures in grouped.by(column, "requested_model", "model").items():
        if asked != model:
            calls[name] = calls.get(name, 0) + figures.calls
    return calls
