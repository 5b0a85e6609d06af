"""A cost report as one HTML file that needs nothing else, to send and to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import accumulate
from pathlib import Path

from django.template.loader import render_to_string
from django.utils.safestring import SafeString
from django.utils.translation import get_language, get_language_bidi
from django.utils.translation import gettext as _

import ai_budget
from ai_budget.review import charts
from ai_budget.review.charts import Line
from ai_budget.review.render.sections import nothing, sections, summary, title_of
from ai_budget.review.report import Report
from ai_budget.review.wording import sentence, usd

_MOST_BARS = 92
_STYLES = Path(*ai_budget.__path__, "static", "ai_budget", "charts.css")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chart:
    """A chart with its title, and what its colours are: each a sign, a name and an amount."""

    title: str
    drawn: SafeString
    legend: Sequence[tuple[SafeString, str, str]]


def to_html(report: Report) -> str:
    """Return the report as a page with its charts and styles inside."""
    context = {
        "language": get_language() or "en",
        "direction": "rtl" if get_language_bidi() else "ltr",
        "title": title_of(report),
        "nothing": nothing(report) if report.is_empty else "",
        "summary": summary(report),
        "concerns": [sentence(it) for it in report.attention],
        "charts": list(_charts(report)),
        "sections": list(sections(report)),
        # Our own file, and no data: quotes in it are not to be escaped.
        "styles": SafeString(_STYLES.read_text(encoding="utf-8")),
    }
    return render_to_string("ai_budget/report.html", context)


def _charts(report: Report) -> Iterator[_Chart]:
    first = report.since.date()
    last = (report.until - timedelta(microseconds=1)).date()
    today = min(report.at.astimezone(report.since.tzinfo).date(), last)
    days = _days(first, last)
    if not report.total.spend_nanousd or len(days) > _MOST_BARS or today < first:
        return
    begun = _days(first, today)
    series = charts.stack(report.days, begun)
    yield _Chart(
        title=_("Spend by day"),
        drawn=charts.stacked_bars(begun, series, name="days", title=_("Spend by day and feature")),
        legend=[(charts.swatch(it.css_class), it.label, usd(it.total_nanousd)) for it in series],
    )
    if len(days) < 2:
        return
    drawn = list(_lines(report, len(begun), len(days), begun))
    yield _Chart(
        title=_("How it adds up"),
        drawn=charts.lines(days, drawn, name="sum", title=_("Spend so far, day by day")),
        legend=[
            (charts.stroke(it.css_class), it.label, usd(_last(it.amounts)))
            for it in reversed(drawn)
        ],
    )


def _lines(report: Report, passed: int, whole: int, begun: Sequence[date]) -> Iterator[Line]:
    """Yield plan and limit, where those do not press the rest to the ground; then the spend."""
    total, expected = report.total, report.forecast
    end = total.spend_nanousd if expected is None else expected.forecast_nanousd
    for label, kind, amount in (
        (_("Plan"), "plan", total.plan_nanousd),
        (_("Limit"), "limit", total.budget_nanousd),
    ):
        if amount is not None and amount <= 2 * end:
            yield _line(label, kind, [amount] * whole)
    by_day = dict.fromkeys(begun, 0)
    for (day, _feature), cost in report.days.items():
        by_day[day] = by_day.get(day, 0) + cost
    spent = list(accumulate(by_day[day] for day in begun))
    if expected is not None:
        left = whole - passed
        ahead = [spent[-1] + (end - spent[-1]) * step // max(left, 1) for step in range(left + 1)]
        yield _line(_("Forecast"), "forecast", [*[None] * (passed - 1), *ahead])
    yield _line(_("Spend"), "now", [*spent, *[None] * (whole - passed)])


def _line(label: str, kind: str, amounts: Sequence[int | None]) -> Line:
    return Line(label=label, css_class=f"ai-budget-line-{kind}", amounts=tuple(amounts))


def _last(amounts: Sequence[int | None]) -> int | None:
    known = [amount for amount in amounts if amount is not None]
    return known[-1] if known else None


def _days(first: date, last: date) -> list[date]:
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]
