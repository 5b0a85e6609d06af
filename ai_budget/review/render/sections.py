"""What a report says to people, in words and figures: the same for every way to draw it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ai_budget import periods
from ai_budget.review.caching import ENOUGH_LOOKED_UP, WORTH_CACHING_PERCENT
from ai_budget.review.comparison import Comparison
from ai_budget.review.pace import Pace, Week
from ai_budget.review.report import Report
from ai_budget.review.spending import OVER_PLAN_PERCENT, CategorySpend, FeatureSpend
from ai_budget.review.wording import (
    against_label,
    budget_label,
    lever_label,
    number,
    pace_label,
    percentage,
    small_usd,
    usd,
)
from ai_budget.values import SITE

MOST_WEEKS = 5
"""Weeks beside each other. Of a longer span they are the latest."""

OVER = "!"
"""What marks a figure that is over the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A table: its first columns hold names, the others figures, set to the end.

    ``flagged`` are the rows that are to be seen first, ``note`` says what the figures mean.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    flagged: Collection[int] = ()
    note: str = ""


def title_of(report: Report) -> str:
    """Return what the report is, and of when."""
    words = _("AI spend %(when)s%(about)s")
    return words % {"when": when(report), "about": about(report)}


def nothing(report: Report) -> str:
    """Return what is said of a span without calls."""
    words = _("There were no calls %(when)s%(about)s.")
    return words % {"when": when(report), "about": about(report)}


def about(report: Report) -> str:
    """Return what the report leaves out, if anything."""
    span = report.span
    kept = [
        *([] if span.feature == SITE else [span.feature]),
        *([span.model] if span.model else []),
        *([] if span.user_id is None else [_("user %(id)s") % {"id": span.user_id}]),
        *([] if span.tag is None else ["=".join(span.tag)]),
    ]
    return _(", %(names)s only") % {"names": ", ".join(kept)} if kept else ""


def when(report: Report) -> str:
    """Return the days of a report."""
    since, until, zone = report.since, report.until, report.time_zone
    if _is_a_month(since, until):
        return _("in %(month)s (%(zone)s)") % {"month": f"{since:%Y-%m}", "zone": zone}
    last = _last_day(until)
    if last == f"{since.date()}":
        return _("on %(day)s (%(zone)s)") % {"day": last, "zone": zone}
    words = _("from %(first)s to %(last)s (%(zone)s)")
    return words % {"first": since.date(), "last": last, "zone": zone}


def summary(report: Report) -> list[tuple[str, str]]:
    """Return the figures of the whole span, each with its name."""
    total = report.total
    rows = [(_("Spend"), usd(total.spend_nanousd))]
    if total.estimated_nanousd:
        rows.append(
            (_("Estimated"), _("%(spent)s of it") % {"spent": usd(total.estimated_nanousd)})
        )
    if not report.span.is_narrow:
        limit = total.budget_nanousd
        rows.append(
            (_("Budget"), _("no limit") if limit is None else _of(limit, total.budget_used))
        )
    if total.plan_nanousd is not None:
        rows.append((_("Plan"), _of(total.plan_nanousd, total.plan_used)))
    rows.append((_("Before"), _before(report.comparison)))
    if report.forecast is not None:
        rows.append((_("Forecast"), usd(report.forecast.forecast_nanousd)))
    if total.held_nanousd or total.in_flight:
        words = ngettext(
            "%(held)s held by %(calls)s call", "%(held)s held by %(calls)s calls", total.in_flight
        )
        figures = {"held": usd(total.held_nanousd), "calls": number(total.in_flight)}
        rows.append((_("In flight"), words % figures))
    if total.saved_nanousd:
        rows.append((_("Saved"), usd(total.saved_nanousd)))
    words = _("%(calls)s, of which %(cached)s from the cache")
    figures = {"calls": number(total.calls), "cached": number(total.cached)}
    rows.append((_("Calls"), words % figures))
    rows.append((_("Attempts"), number(total.attempts)))
    if total.refused is not None:
        rows.append((_("Refused"), number(total.refused)))
    each = total.cost_per_active_user_nanousd
    users = number(total.active_users)
    if each is not None:
        users = _("%(users)s, %(each)s each") % {"users": users, "each": small_usd(each)}
    rows.append((_("Active users"), users))
    return rows


def sections(report: Report) -> Iterator[Section]:
    """Yield the tables of a report that have any rows, in the order of a review."""
    for section in _sections(report):
        if section.rows:
            yield section


def _sections(report: Report) -> Iterator[Section]:
    yield _parts(
        _("By category"),
        _("Category"),
        [(it.category or _("(in no category)"), it) for it in report.categories],
    )
    yield _parts(_("By feature"), _("Feature"), [(it.feature, it) for it in report.features])
    yield _weekly(report)
    yield _changes(report.comparison)
    yield _forecasts(report)
    yield Section(
        title=_("Most expensive users"),
        headings=[_("User"), _("Calls"), _("Spend")],
        rows=[[it.label, number(it.calls), usd(it.spend_nanousd)] for it in report.users],
    )
    yield Section(
        title=_("Most expensive subjects"),
        headings=[_("Subject"), _("Calls"), _("Spend")],
        rows=[[it.subject, number(it.calls), usd(it.spend_nanousd)] for it in report.subjects],
    )
    yield _models(report)
    yield Section(
        title=_("Refusals"),
        headings=[_("Feature"), _("Refused")],
        rows=[[it.feature, number(it.refused)] for it in report.refusals],
    )
    yield Section(
        title=_("Downgrades"),
        headings=[_("Feature"), _("Asked for"), _("Answered by"), _("Calls"), _("Spend")],
        rows=[
            [it.feature, it.requested_model, it.model, number(it.calls), usd(it.spend_nanousd)]
            for it in report.downgrades
        ],
        names=3,
    )
    yield Section(
        title=_("Savings"),
        headings=[_("Lever"), _("Calls"), _("Saved")],
        rows=[
            [lever_label(it.lever), number(it.calls), usd(it.saved_nanousd)]
            for it in report.savings
        ],
    )
    yield Section(
        title=_("Not worth caching: under %(percent)s %% found in %(calls)s calls or more")
        % {"percent": WORTH_CACHING_PERCENT, "calls": ENOUGH_LOOKED_UP},
        headings=[_("Feature"), _("Looked up"), _("Found"), _("Hit rate")],
        rows=[
            [it.feature, number(it.looked_up), number(it.cached), percentage(it.hit_rate)]
            for it in report.not_worth_caching
        ],
    )


def _parts(
    title: str, heading: str, parts: Sequence[tuple[str, FeatureSpend | CategorySpend]]
) -> Section:
    headings = [
        heading,
        _("Spend"),
        _("Share"),
        _("Calls"),
        _("Cached"),
        _("Budget used"),
        _("Refused"),
    ]
    rows = [
        [
            name,
            usd(it.spend_nanousd),
            percentage(it.share),
            number(it.calls),
            percentage(it.hit_rate),
            percentage(it.budget_used),
            number(it.refused),
        ]
        for name, it in parts
    ]
    flagged = [index for index, (_name, it) in enumerate(parts) if it.is_over_plan]
    if any(it.plan_nanousd is not None for _name, it in parts):
        headings.insert(-1, _("Plan used"))
        for row, (_name, it) in zip(rows, parts, strict=True):
            mark = f"{OVER} " if it.is_over_plan else ""
            row.insert(-1, mark + percentage(it.plan_used))
    note = _("%(mark)s more than %(percent)s %% of the plan") % {
        "mark": OVER,
        "percent": OVER_PLAN_PERCENT,
    }
    return Section(
        title=title, headings=headings, rows=rows, flagged=flagged, note=note if flagged else ""
    )


def _weekly(report: Report) -> Section:
    latest = report.weeks[0].weeks[-MOST_WEEKS:] if report.weeks else ()
    return Section(
        title=_("Weekly pace"),
        headings=[_("Budget"), _("Against"), *map(_days_of, latest)],
        rows=[
            [
                budget_label(it.name),
                against_label(it.against),
                *(_pace(week) for week in it.weeks[-MOST_WEEKS:]),
            ]
            for it in report.weeks
        ],
        names=2,
        note=_(
            "Spend as a share of what the plan or limit has for those days; of a running week, "
            "for what has passed of it."
        ),
    )


def _pace(week: Week) -> str:
    if week.used is None:
        return pace_label(week.pace)
    words = {
        Pace.ON_TRACK: _("on track %(used)s"),
        Pace.OVER: _("over %(used)s"),
        Pace.UNDER: _("under %(used)s"),
    }
    return words[week.pace] % {"used": f"{round(week.used)} %"}


def _days_of(week: Week) -> str:
    last = week.until - timedelta(days=1)
    return f"{week.since:%m-%d}" if last == week.since else f"{week.since:%m-%d}/{last:%d}"


def _changes(comparison: Comparison) -> Section:
    return Section(
        title=_("Beside %(before)s") % {"before": _stretch(comparison)},
        headings=[_("Feature"), _("Spend"), _("Before"), _("Difference"), _("Change")],
        rows=[
            [
                it.name,
                usd(it.spend_nanousd),
                usd(it.before_nanousd),
                usd(it.difference_nanousd),
                _signed(it.change),
            ]
            for it in comparison.features
        ],
    )


def _forecasts(report: Report) -> Section:
    expected = [*([] if report.forecast is None else [report.forecast]), *report.forecasts]
    return Section(
        title=_("Forecast for the month"),
        headings=[_("Budget"), _("Spent"), _("Forecast"), _("Of limit"), _("Of plan")],
        rows=[
            [
                budget_label(it.name),
                usd(it.spent_nanousd),
                usd(it.forecast_nanousd),
                (f"{OVER} " if it.is_over_budget else "") + percentage(it.budget_used),
                (f"{OVER} " if it.is_over_plan else "") + percentage(it.plan_used),
            ]
            for it in expected
        ],
        flagged=[
            index for index, it in enumerate(expected) if it.is_over_budget or it.is_over_plan
        ],
    )


def _models(report: Report) -> Section:
    return Section(
        title=_("By model"),
        headings=[
            _("Model"),
            _("Calls"),
            _("Avg prompt"),
            _("Avg output"),
            _("Avg cost"),
            _("1k output"),
            _("Reads"),
            _("Spend"),
            _("Share"),
        ],
        rows=[
            [
                it.model,
                number(it.calls),
                number(it.average_prompt_tokens),
                number(it.average_output_tokens),
                small_usd(it.average_cost_nanousd),
                small_usd(it.cost_per_1000_output_nanousd),
                percentage(it.cache_read_share),
                usd(it.spend_nanousd),
                percentage(it.share),
            ]
            for it in report.models
        ],
        note=_(
            "Averages of paid calls. 1k output: all that was paid, by thousand tokens that came "
            "out. Reads: prompt tokens that the API's prompt cache had."
        ),
    )


def _of(amount: int, used: Decimal | None) -> str:
    if used is None:
        return usd(amount)
    return _("%(amount)s, %(used)s used") % {"amount": usd(amount), "used": percentage(used)}


def _before(comparison: Comparison) -> str:
    figures = {
        "spent": usd(comparison.total.before_nanousd),
        "stretch": _stretch(comparison),
        "change": _signed(comparison.total.change),
    }
    if comparison.total.change is None:
        return _("%(spent)s (%(stretch)s)") % figures
    return _("%(spent)s (%(stretch)s), so %(change)s") % figures


def _stretch(comparison: Comparison) -> str:
    """Return the days that a span is compared with, and whether they are only as many as passed."""
    since, until = comparison.since, comparison.until
    if _is_a_month(since, until):
        return f"{since:%Y-%m}"
    days = {"first": since.date(), "last": _last_day(until)}
    if comparison.same_days:
        return _("the same days before: %(first)s to %(last)s") % days
    return _("%(first)s to %(last)s") % days


def _signed(change: Decimal | None) -> str:
    return percentage(change) if change is None or change < 0 else f"+{percentage(change)}"


def _is_a_month(since: datetime, until: datetime) -> bool:
    whole = since.date().day == 1 and periods.next_month(since.date()) == until.date()
    return whole and until.time() == datetime.min.time()


def _last_day(until: datetime) -> str:
    return f"{(until - timedelta(microseconds=1)).date()}"
