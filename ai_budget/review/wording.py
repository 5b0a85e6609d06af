"""What the figures of a review say, in words and in the reader's language. Plain text."""

from __future__ import annotations

from decimal import Decimal
from functools import singledispatch

from django.utils import formats
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from ai_budget import money
from ai_budget.review.attention import (
    Behind,
    Concern,
    CutAnswers,
    ForecastOver,
    OverPlan,
    RoomyAnswers,
    Spike,
    Stale,
    Unpriced,
    WorthlessCache,
)
from ai_budget.review.caching import WORTH_CACHING_PERCENT
from ai_budget.review.pace import Against, Pace
from ai_budget.values import SITE

_LEVERS = {
    "response cache": gettext_lazy("response cache"),
    "prompt cache": gettext_lazy("prompt cache"),
    "batch": gettext_lazy("batch"),
    "routing": gettext_lazy("routing"),
    "downgrade": gettext_lazy("downgrade"),
}
_PACES = {
    Pace.ON_TRACK: gettext_lazy("on track"),
    Pace.OVER: gettext_lazy("trending over"),
    Pace.UNDER: gettext_lazy("trending under"),
}
_AGAINST = {Against.PLAN: gettext_lazy("plan"), Against.LIMIT: gettext_lazy("limit")}


def lever_label(lever: str) -> str:
    """Return what a lever, or several joined by commas, is called."""
    names = (str(_LEVERS.get(name, name)) for name in lever.split(", "))
    return ", ".join(names)


def pace_label(pace: Pace) -> str:
    """Return how a week's pace is called."""
    return str(_PACES[pace])


def against_label(against: Against) -> str:
    """Return what a budget is compared with."""
    return str(_AGAINST[against])


def budget_label(name: str) -> str:
    """Return how a budget is called where it stands among others."""
    return _("the whole site") if name == SITE else name


@singledispatch
def sentence(concern: Concern) -> str:
    """Return what a concern says, with its figures and with what to do, in one or two sentences."""
    raise TypeError(f"nobody has put a {type(concern).__name__} into words")


@sentence.register
def _over_plan(it: OverPlan) -> str:
    words = _("%(budget)s spent %(spent)s, %(used)s of its plan of %(plan)s.")
    if it.used is None:
        words = _("%(budget)s spent %(spent)s, and its plan is nothing.")
    return words % {
        "budget": budget_label(it.feature),
        "spent": usd(it.spend_nanousd),
        "used": percentage(it.used),
        "plan": usd(it.plan_nanousd),
    }


@sentence.register
def _forecast_over(it: ForecastOver) -> str:
    words = _("%(budget)s is heading for %(forecast)s this month, above its limit of %(amount)s.")
    if it.against is Against.PLAN:
        words = _(
            "%(budget)s is heading for %(forecast)s this month, above its plan of %(amount)s."
        )
    return words % {
        "budget": budget_label(it.feature),
        "forecast": usd(it.forecast_nanousd),
        "amount": usd(it.allowed_nanousd),
    }


@sentence.register
def _spike(it: Spike) -> str:
    words = _("%(feature)s spent %(spent)s in the hour from %(time)s on; usual is %(usual)s.")
    return words % {
        "feature": it.feature,
        "spent": usd(it.spend_nanousd),
        "time": formats.date_format(it.since, "DATETIME_FORMAT"),
        "usual": usd(it.usual_nanousd),
    }


@sentence.register
def _worthless_cache(it: WorthlessCache) -> str:
    words = _(
        "The response cache of %(feature)s answered %(rate)s of %(calls)s calls, less than "
        "%(least)s %%: switch it off, or let it find more (a longer lifetime, prompts that are "
        "alike, a shared cache)."
    )
    return words % {
        "feature": it.feature,
        "rate": percentage(it.hit_rate),
        "calls": number(it.looked_up),
        "least": WORTH_CACHING_PERCENT,
    }


@sentence.register
def _roomy_answers(it: RoomyAnswers) -> str:
    words = _(
        "Answers of %(model)s in %(feature)s take %(used)s tokens on average, and may take "
        "%(allowed)s: with a lower max_tokens each call would hold less money."
    )
    return words % {
        "model": it.model,
        "feature": it.feature,
        "used": number(it.average_output_tokens),
        "allowed": number(it.average_max_tokens),
    }


@sentence.register
def _cut_answers(it: CutAnswers) -> str:
    words = _(
        "%(share)s of the answers of %(model)s in %(feature)s were cut off at their max_tokens, "
        "%(allowed)s on average: they are paid for, and end in the middle."
    )
    return words % {
        "share": percentage(it.share),
        "model": it.model,
        "feature": it.feature,
        "allowed": number(it.average_max_tokens),
    }


@sentence.register
def _unpriced(it: Unpriced) -> str:
    words = ngettext(
        "No price is known for %(model)s of %(provider)s (%(calls)s call, %(spent)s): add a model "
        "rate, or update genai-prices.",
        "No price is known for %(model)s of %(provider)s (%(calls)s calls, %(spent)s): add a "
        "model rate, or update genai-prices.",
        it.calls,
    )
    return words % {
        "model": it.model,
        "provider": it.provider,
        "calls": number(it.calls),
        "spent": usd(it.spend_nanousd),
    }


@sentence.register
def _stale(it: Stale) -> str:
    words = ngettext(
        "%(calls)s call that never came back holds %(held)s since %(time)s: ai_budget_tick books "
        "it, and does not seem to run.",
        "%(calls)s calls that never came back hold %(held)s, the first since %(time)s: "
        "ai_budget_tick books them, and does not seem to run.",
        it.calls,
    )
    return words % {
        "calls": number(it.calls),
        "held": usd(it.held_nanousd),
        "time": formats.date_format(it.since, "DATETIME_FORMAT"),
    }


@sentence.register
def _behind(it: Behind) -> str:
    words = ngettext(
        "%(count)s quarter-hour waits to be added up: ai_budget_tick does it, and does not seem "
        "to run. Figures are right, and slower to read.",
        "%(count)s quarter-hours wait to be added up: ai_budget_tick does it, and does not seem "
        "to run. Figures are right, and slower to read.",
        it.quarter_hours,
    )
    return words % {"count": number(it.quarter_hours)}


# Figures -----------------------------------------------------------------------------------------

NONE = "-"
"""What stands where there is no figure."""


def usd(nanousd: int | None) -> str:
    """Return dollars and cents."""
    return NONE if nanousd is None else money.format_usd(nanousd)


def small_usd(nanousd: int | None) -> str:
    """Return dollars, of less than one with more decimals."""
    if nanousd is None:
        return NONE
    return money.format_usd(nanousd, decimals=2 if nanousd >= money.NANO_PER_USD else 4)


def percentage(value: Decimal | None) -> str:
    """Return a percentage."""
    return NONE if value is None else f"{value} %"


def number(value: int | None) -> str:
    """Return a whole number."""
    return NONE if value is None else f"{value:,}"
