"""What an alert says, in the language of whoever reads it: made of its own columns, and no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.utils.functional import Promise
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from ai_budget import money
from ai_budget.conf import conf
from ai_budget.periods import Period
from ai_budget.scopes import SITE

if TYPE_CHECKING:
    from ai_budget.models.alerts import Alert

PLAN, LIMIT = "plan", "limit"
"""What a forecast is compared with."""

_TITLES: Mapping[tuple[str, str], Promise] = {
    ("plan", "month"): gettext_lazy("%(threshold)s %% of the monthly plan is spent"),
    ("limit", "day"): gettext_lazy("%(threshold)s %% of the daily limit is spent"),
    ("limit", "month"): gettext_lazy("%(threshold)s %% of the monthly limit is spent"),
    ("off", "day"): gettext_lazy("the daily limit is used up"),
    ("off", "month"): gettext_lazy("the monthly limit is used up"),
    ("forecast", PLAN): gettext_lazy("on its way past the monthly plan"),
    ("forecast", LIMIT): gettext_lazy("on its way past the monthly limit"),
    ("ladder", "day"): gettext_lazy("%(rung)s %% of the daily limit: %(model)s answers"),
    ("ladder", "month"): gettext_lazy("%(rung)s %% of the monthly limit: %(model)s answers"),
    ("spike", "day"): gettext_lazy("far more is spent than at this hour of other days"),
    ("unpriced", "month"): gettext_lazy("no price is known for %(model)s"),
    ("bound", "day"): gettext_lazy("calls cost more than was held for them"),
    ("batch", "day"): gettext_lazy("batch %(about)s has items without an answer"),
    ("uncertain", "day"): gettext_lazy("submission %(about)s of a batch waits for a decision"),
    ("stuck", "day"): gettext_lazy("submission %(about)s of a batch fails again and again"),
    ("aside", "day"): gettext_lazy("%(about)s could not be worked on, and was set aside"),
}

_FIGURES: Mapping[tuple[str, str], Promise] = {
    ("plan", "month"): gettext_lazy(
        "%(spent)s of the plan of %(of)s for this month is spent (%(percent)s %%)."
    ),
    ("limit", "day"): gettext_lazy(
        "%(spent)s of today's limit of %(of)s is spent (%(percent)s %%)."
    ),
    ("limit", "month"): gettext_lazy(
        "%(spent)s of this month's limit of %(of)s is spent (%(percent)s %%)."
    ),
    ("off", "day"): gettext_lazy(
        "%(spent)s of today's limit of %(of)s is spent or held (%(percent)s %%)."
    ),
    ("off", "month"): gettext_lazy(
        "%(spent)s of this month's limit of %(of)s is spent or held (%(percent)s %%)."
    ),
    ("forecast", PLAN): gettext_lazy(
        "%(spent)s is spent. At this pace the month ends at %(forecast)s: %(percent)s %% of the "
        "plan of %(of)s."
    ),
    ("forecast", LIMIT): gettext_lazy(
        "%(spent)s is spent. At this pace the month would end at %(forecast)s: %(percent)s %% of "
        "the limit of %(of)s."
    ),
    ("ladder", "day"): gettext_lazy(
        "%(spent)s of today's limit of %(of)s is spent or held (%(percent)s %%)."
    ),
    ("ladder", "month"): gettext_lazy(
        "%(spent)s of this month's limit of %(of)s is spent or held (%(percent)s %%)."
    ),
    ("spike", "day"): gettext_lazy(
        "%(spent)s in the hour from %(since)s, for %(count)s calls. Usual at this hour of the "
        "last two weeks: %(of)s."
    ),
    ("unpriced", "month"): gettext_lazy(
        "%(count)s calls were let through and booked at the dearest known price: %(spent)s."
    ),
    ("bound", "day"): gettext_lazy(
        "%(count)s calls cost %(spent)s, and %(of)s was held for them. The true cost is booked; "
        "a limit may have been passed by the difference."
    ),
    ("batch", "day"): gettext_lazy("%(count)s of its items are over without an answer."),
    ("uncertain", "day"): gettext_lazy(
        "It was sent, and nobody heard whether the API took it. %(spent)s stays held for its "
        "batch until somebody decides."
    ),
    ("aside", "day"): gettext_lazy(
        "The periodic work went on without it, and tries it again each time: the log says what "
        "kind of error it meets. %(count)s were set aside in this run."
    ),
    ("stuck", "day"): gettext_lazy(
        "It was tried %(count)s times in a row, and is tried again. %(spent)s stays held for its "
        "batch."
    ),
}


def title(alert: Alert) -> str:
    """Return what came to pass, in one line that begins with the budget."""
    name = _("The whole site") if alert.budget == SITE else alert.budget
    return f"{name}: {str(_TITLES[_about(alert)]) % _figures(alert)}"


def text(alert: Alert) -> str:
    """Return the figures, what it has for effect, and when that ends."""
    return " ".join([str(_FIGURES[_about(alert)]) % _figures(alert), *_effects(alert)])


def _about(alert: Alert) -> tuple[str, str]:
    if alert.kind == "forecast":
        return alert.kind, LIMIT if alert.about.startswith(LIMIT) else PLAN
    return str(alert.kind), str(Period(alert.period))


def _figures(alert: Alert) -> dict[str, Any]:
    return {
        "threshold": alert.threshold,
        "about": alert.about,
        "spent": money.format_usd(alert.spent_nanousd),
        "of": money.format_usd(alert.of_nanousd or 0),
        "forecast": money.format_usd(alert.forecast_nanousd or 0),
        "percent": "–" if alert.percent is None else alert.percent,
        "count": alert.count,
        "model": alert.model,
        "rung": alert.rung,
        "since": _moment(alert.since),
        "until": _moment(alert.until),
    }


def _effects(alert: Alert) -> Iterator[str]:
    figures = _figures(alert)
    match str(alert.kind), str(alert.effect):
        case "plan" | "forecast", "alerts":
            yield _("This alerts, and nothing more: a plan refuses nothing.")
        case "limit" | "forecast", "refuses":
            yield _("At the limit calls are refused, until %(until)s.") % figures
        case "limit" | "forecast", "shadow":
            yield (
                _(
                    "Shadow mode: at the limit nothing is refused. Else calls would be refused "
                    "until %(until)s."
                )
                % figures
            )
        case "off", "refuses":
            yield _("Calls that do not fit are refused, until %(until)s.") % figures
        case "off", "shadow":
            yield (
                _("Shadow mode: nothing is refused. Else calls would be refused until %(until)s.")
                % figures
            )
        case "ladder", "downgrades":
            yield _("%(model)s answers instead of a dearer model, until %(until)s.") % figures
        case "ladder", "shadow":
            yield (
                _(
                    "Shadow mode: the models asked for answer. Else %(model)s would, until "
                    "%(until)s."
                )
                % figures
            )
        case _:
            yield _("This alerts, and nothing more.")
    if alert.kind == "limit" and alert.rung is not None:
        yield _("From %(rung)s %% on, %(model)s answers.") % figures
    if alert.kind == "off" and alert.count:
        yield _("Refused today: %(count)s.") % figures


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone(conf.TIME_ZONE):%Y-%m-%d %H:%M %Z}"
