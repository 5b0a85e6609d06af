"""What the spend page shows, section by section: figures become words, links and charts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import accumulate
from typing import Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

from django.utils import formats
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from ai_budget import money, periods
from ai_budget.admin.amounts import EMPTY, count, exact_usd
from ai_budget.admin.filters import ANY
from ai_budget.admin.spend_address import STACKS, Asked
from ai_budget.review import charts
from ai_budget.review.arithmetic import change, percent
from ai_budget.review.attention import Concern, Stale
from ai_budget.review.comparison import Comparison
from ai_budget.review.present import Present, Standing
from ai_budget.review.report import Report
from ai_budget.review.spans import Span
from ai_budget.review.spending import CategorySpend, FeatureSpend, ModelSpend
from ai_budget.review.wording import lever_label, sentence
from ai_budget.values import SITE, Status

_TREND_DAYS = 14
"""A range of fewer days has its trend drawn over so many."""

_MOST_BARS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure with its name: where it leads, what it says to who points at it, and a note."""

    text: str | SafeString
    label: str = ""
    url: str = ""
    title: str = ""
    note: str | SafeString = ""
    drawn: str | SafeString = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table; figures stand at its end, words at its beginning.

    What is counted by budget is not known of one model, user or tag.
    """

    title: str
    is_figure: bool = True
    is_by_budget: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of figures; the first of each row names it."""

    key: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Figure]]
    empty: str = ""
    note: str = ""

    @property
    def body(self) -> SafeString:
        """The rows as HTML. In a template a quarter's days would take a tenth of a second."""
        kinds = ["ai-budget-figure" if it.is_figure else "ai-budget-words" for it in self.columns]
        tags = ['th scope="row"', *["td"] * (len(kinds) - 1)]
        openings = [f'<{tag} class="{kind}"' for tag, kind in zip(tags, kinds, strict=True)]
        rows = (
            format_html_join("", "{}", ((_cell(*it),) for it in zip(openings, row, strict=True)))
            for row in self.rows
        )
        return format_html_join("\n", "<tr>{}</tr>", ((row,) for row in rows))


def _cell(opening: str, it: Figure) -> SafeString:
    """Return a cell, of no more pieces than it has: there may be a thousand."""
    title = ' title="{}"' if it.title else ""
    text = '<a href="{}">{}</a>' if it.url else "{}{}"
    note = '<span class="ai-budget-note">{}</span>' if it.note else "{}"
    closing = "</td>" if opening.startswith("<td") else "</th>"
    titles = (it.title,) if it.title else ()
    shape = f"{opening}{title}>{{}}{text}{note}{closing}"
    return format_html(shape, *titles, it.drawn, it.url, it.text, it.note)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart, what its colours are, and the same figures as a table."""

    title: str
    drawn: SafeString
    legend: Sequence[Figure]
    table: Table
    choices: Sequence[tuple[str, str, bool]] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Addresses of the calls behind a figure; empty for who may not see calls."""

    asked: Asked
    calls_url: str = ""
    user_url: Callable[[Any], str]
    subject_url: Callable[[str], str]

    def calls(self, since: datetime, until: datetime, **more: Any) -> str:
        """Return where the calls are that are asked for, in a range of their own."""
        if not self.calls_url:
            return ""
        asked = {
            "since": _moment(since, self.asked.zone),
            "until": _moment(until, self.asked.zone),
            **self._filters(),
            **more,
        }
        return f"{self.calls_url}?{urlencode(asked)}"

    def in_range(self, **more: Any) -> str:
        """Return where the calls of the range are."""
        return self.calls(self.asked.since, self.asked.until, **more)

    def day(self, day: date) -> str:
        """Return where the calls of a day are."""
        since, until = (
            periods.midnight(it, self.asked.zone) for it in (day, day + timedelta(days=1))
        )
        return self.calls(since, until)

    def in_flight(self) -> str:
        """Return where the calls in flight are, whenever they began."""
        if not self.calls_url:
            return ""
        open_now = {"reserved": "all", "status__exact": Status.RESERVED.value}
        return f"{self.calls_url}?{urlencode({**self._filters(), **open_now})}"

    def _filters(self) -> dict[str, Any]:
        it = self.asked
        asked = {
            "feature": "" if it.feature == SITE else it.feature,
            "model": it.model,
            "user": "" if it.user_id is None else it.user_id,
            "tag": it.tag,
        }
        return {name: value for name, value in asked.items() if value}


@lru_cache(maxsize=512)
def _moment(at: datetime, zone: ZoneInfo) -> str:
    """Return a moment for an address: the day that begins with it, where one does."""
    day = at.astimezone(zone).date()
    if periods.midnight(day, zone) == at:
        return day.isoformat()
    return at.astimezone(UTC).isoformat()


# The present -------------------------------------------------------------------------------------


def cards(present: Present, links: Links) -> list[Figure]:
    """Return what is spent just now: of the day, the week and the month, and what is to come."""
    return [
        _standing(_("Today"), present.today, links),
        _standing(_("This week"), present.week, links),
        _standing(_("This month"), present.month, links),
        _forecast(present, links),
        Figure(
            label=_("Held"),
            text=money.format_usd(present.held_nanousd),
            title=exact_usd(present.held_nanousd),
            url=links.in_flight(),
            note=ngettext(
                "%(number)s call in flight", "%(number)s calls in flight", present.in_flight
            )
            % {"number": count(present.in_flight)},
        ),
    ]


def _standing(label: str, standing: Standing, links: Links) -> Figure:
    return Figure(
        label=label,
        text=money.format_usd(standing.spend_nanousd),
        title=exact_usd(standing.spend_nanousd),
        url=links.calls(standing.since, standing.until),
        drawn=_bar(
            standing.spend_nanousd,
            budget=standing.budget_nanousd,
            plan=standing.plan_nanousd,
        ),
        note=format_html(
            "{}{}",
            _against_lines(standing.spend_nanousd, standing.budget_nanousd, standing.plan_nanousd),
            _before(standing, links),
        ),
    )


def _before(standing: Standing, links: Links) -> SafeString:
    words = {
        "day": _("%(amount)s by this time yesterday"),
        "week": _("%(amount)s by this time last week"),
        "month": _("%(amount)s by this day last month"),
    }[standing.period]
    amount = money.format_usd(standing.before_nanousd)
    url = links.calls(standing.before_since, standing.before_until)
    return _than(standing.change, words % {"amount": amount}, url)


def _forecast(present: Present, links: Links) -> Figure:
    label = _("Forecast for the month")
    it = present.forecast
    if it is None or it.forecast_nanousd is None:
        return Figure(label=label, text=EMPTY, note=_("There is one after three days of a month."))
    return Figure(
        label=label,
        text=money.format_usd(it.forecast_nanousd),
        title=exact_usd(it.forecast_nanousd),
        drawn=_bar(it.forecast_nanousd, budget=it.budget_nanousd, plan=it.plan_nanousd),
        note=_against_lines(it.forecast_nanousd, it.budget_nanousd, it.plan_nanousd),
    )


def _against_lines(amount: int, budget: int | None, plan: int | None) -> SafeString:
    lines = ((line,) for line in _against(amount, budget, plan))
    return format_html_join("", "<span>{}</span>", lines)


def _against(amount: int, budget: int | None, plan: int | None) -> Iterator[str]:
    """Yield what an amount is of the limit and of the plan, in words."""
    for words, whole in (
        (_("%(percent)s of the limit %(amount)s"), budget),
        (_("%(percent)s of the plan %(amount)s"), plan),
    ):
        if whole is not None:
            share = percent(amount, whole)
            yield words % {"percent": share_text(share), "amount": money.format_usd(whole)}


def _bar(
    spent: int, *, held: int = 0, budget: int | None = None, plan: int | None = None
) -> SafeString:
    words = ", ".join(_against(spent, budget, plan))
    return charts.budget_bar(spent, held=held, limit=budget, plan=plan, title=words)


def month(amounts: Mapping[tuple[date], int], present: Present, links: Links) -> Chart:
    """Return how this month's spend adds up, beside last month's and what is planned."""
    asked = links.asked
    first = asked.today.replace(day=1)
    days = _days_from(first, periods.next_month(first) - timedelta(days=1))
    before = _days_from(periods.previous_month(first), first - timedelta(days=1))
    spent = list(accumulate(amounts.get((day,), 0) for day in days))
    past = list(accumulate(amounts.get((day,), 0) for day in before))
    known = [sum_ if day <= asked.today else None for day, sum_ in zip(days, spent, strict=True)]
    drawn = [_line(_("Last month"), "before", [*past, *[None] * 3][: len(days)])]
    drawn += _levels(present, len(days))
    if present.forecast is not None:
        drawn.append(_forecast_line(known, present.forecast.forecast_nanousd))
    drawn.append(_line(_("This month"), "now", known))
    title = _("This month, day by day")
    return Chart(
        title=_("This month"),
        drawn=charts.lines(days, drawn, name="ai-budget-month", title=title),
        legend=[
            Figure(label=it.label, text="", drawn=charts.stroke(it.css_class))
            for it in reversed(drawn)
        ],
        table=Table(
            key="month",
            title=title,
            columns=[
                Column(title=_("Day"), is_figure=False),
                Column(title=_("Spend")),
                Column(title=_("Spend so far")),
                Column(title=_("Last month by then")),
            ],
            rows=[
                [
                    Figure(text=formats.date_format(day, "SHORT_DATE_FORMAT")),
                    _dollars(amounts.get((day,), 0), url=links.day(day)),
                    _dollars(sum_),
                    _dollars(past[min(index, len(past) - 1)]),
                ]
                for index, (day, sum_) in enumerate(zip(days, spent, strict=True))
                if day <= asked.today
            ],
        ),
    )


def month_days(asked: Asked) -> Span:
    """Return this month and the one before."""
    first = asked.today.replace(day=1)
    bounds = periods.previous_month(first), periods.next_month(first)
    since, until = (periods.midnight(day, asked.zone) for day in bounds)
    return asked.within(since, until)


def _days_from(first: date, last: date) -> list[date]:
    return [first + timedelta(days=offset) for offset in range((last - first).days + 1)]


def _line(label: str, kind: str, amounts: Sequence[int | None]) -> charts.Line:
    return charts.Line(label=label, css_class=f"ai-budget-line-{kind}", amounts=tuple(amounts))


def _levels(present: Present, length: int) -> list[charts.Line]:
    """Return what is planned and allowed, where that does not press the rest to the ground."""
    month = present.month
    expected = present.forecast.forecast_nanousd if present.forecast else month.spend_nanousd
    levels = (
        (_("Plan"), "plan", month.plan_nanousd),
        (_("Limit"), "limit", month.budget_nanousd),
    )
    return [
        _line(label, kind, [amount] * length)
        for label, kind, amount in levels
        if amount is not None and amount <= 2 * expected
    ]


def _forecast_line(known: Sequence[int | None], end: int) -> charts.Line:
    """Return the way from what is spent to what is expected of the whole month."""
    passed = [amount for amount in known if amount is not None]
    last, left = passed[-1], len(known) - len(passed)
    ahead = [last + (end - last) * step // max(left, 1) for step in range(left + 1)]
    return _line(_("Forecast"), "forecast", [*[None] * (len(passed) - 1), *ahead])


# The range ---------------------------------------------------------------------------------------


def totals(report: Report, links: Links) -> list[Figure]:
    """Return what the range comes to."""
    total = report.total
    spent_before, called_before = _compared(report.comparison, links)
    figures = [
        _dollars(total.spend_nanousd, label=_("Spend"), url=links.in_range(), note=spent_before),
        Figure(label=_("Calls"), text=count(total.calls), url=links.in_range(), note=called_before),
        Figure(
            label=_("Cache hit rate"),
            text=share_text(total.hit_rate),
            url=links.in_range(status__exact=Status.CACHED.value) if total.cached else "",
            note=_("%(cached)s of %(looked_up)s looked up")
            % {"cached": count(total.cached), "looked_up": count(total.looked_up)},
        ),
        _dollars(total.saved_nanousd, label=_("Saved")),
    ]
    if total.refused is not None:
        figures.append(Figure(label=_("Refused"), text=count(total.refused)))
    figures.append(Figure(label=_("Active users"), text=count(total.active_users)))
    each = total.cost_per_active_user_nanousd
    label = _("Cost per active user")
    if each is None:
        figures.append(Figure(label=label, text=EMPTY))
    else:
        figures.append(_dollars(each, label=label, decimals=4))
    return figures


def _compared(before: Comparison | None, links: Links) -> tuple[str | SafeString, ...]:
    """Return what spend and calls are beside those of the span before."""
    if before is None:
        return "", ""
    url = links.calls(before.since, before.until)
    amount = {"amount": money.format_usd(before.total.before_nanousd)}
    calls = {"calls": count(before.calls_before)}
    return (
        _than(before.total.change, _("%(amount)s before") % amount, url),
        _than(change(before.calls, before.calls_before), _("%(calls)s before") % calls, url),
    )


# The days ----------------------------------------------------------------------------------------


def days(amounts: Mapping[tuple[date, str], int], links: Links) -> Chart:
    """Return spend by day and feature or model, as a chart and as a table.

    Of a long range each bar is of a week or a month.
    """
    asked = links.asked
    starts, step = _bars(asked.days)
    series = charts.stack(_in_steps(amounts, starts), starts)
    title = {
        "day": _("Spend by day"),
        "week": _("Spend by week"),
        "month": _("Spend by month"),
    }[step]
    return Chart(
        title=title,
        drawn=charts.stacked_bars(starts, series, name="ai-budget-days", title=title),
        legend=[_legend(it, series, links) for it in series],
        table=_days_table(starts, series, title, links),
        choices=[
            (_("By feature"), asked.query(stack=STACKS[0]), asked.stack == STACKS[0]),
            (_("By model"), asked.query(stack=STACKS[1]), asked.stack == STACKS[1]),
        ],
    )


def _bars(days: Sequence[date]) -> tuple[list[date], str]:
    """Return the first days of the bars, and how long a bar is."""
    if len(days) <= _MOST_BARS:
        return list(days), "day"
    weeks = sorted({day - timedelta(days=day.weekday()) for day in days})
    if len(weeks) <= _MOST_BARS:
        return [days[0], *weeks[1:]], "week"
    months = sorted({day.replace(day=1) for day in days})
    return [days[0], *months[1:]], "month"


def _in_steps(
    amounts: Mapping[tuple[date, str], int], starts: Sequence[date]
) -> Mapping[tuple[date, str], int]:
    sums: dict[tuple[date, str], int] = {}
    for (day, name), amount in amounts.items():
        start = starts[max(bisect_right(starts, day) - 1, 0)]
        sums[start, name] = sums.get((start, name), 0) + amount
    return sums


def _legend(series: charts.Series, shown: Sequence[charts.Series], links: Links) -> Figure:
    whole = sum(it.total_nanousd for it in shown)
    asked, own = links.asked, bool(series.hue)
    return Figure(
        label=series.label,
        text=money.format_usd(series.total_nanousd),
        title=exact_usd(series.total_nanousd),
        note=share_text(percent(series.total_nanousd, whole)),
        url=asked.query(**{asked.stack: series.label}) if own else "",
        drawn=charts.swatch(series.css_class),
    )


def _days_table(
    starts: Sequence[date], series: Sequence[charts.Series], title: str, links: Links
) -> Table:
    asked = links.asked
    ends = [*starts[1:], min(asked.last, asked.today) + timedelta(days=1)]
    rows = []
    for index, (first, after) in enumerate(zip(starts, ends, strict=True)):
        since, until = (periods.midnight(day, asked.zone) for day in (first, after))
        total = sum(it.amounts[index] for it in series)
        row = [
            Figure(text=formats.date_format(first, "SHORT_DATE_FORMAT")),
            _dollars(total, url=links.calls(since, until) if total else ""),
        ]
        for it in series:
            own = {asked.stack: it.label} if it.hue else None
            url = "" if own is None else links.calls(since, until, **own)
            row.append(_dollars(it.amounts[index], url=url if it.amounts[index] else ""))
        rows.append(row)
    return Table(
        key="days",
        title=title,
        columns=[
            Column(
                title=_("First day") if len(starts) != len(asked.days) else _("Day"),
                is_figure=False,
            ),
            Column(title=_("Spend")),
            *(Column(title=it.label) for it in series),
        ],
        rows=rows,
    )


# What it was spent on ----------------------------------------------------------------------------


def categories(report: Report, links: Links) -> Table:
    """Return the categories, and what has none."""
    rows = [(it, it.category or _("in no category"), it.category) for it in report.categories]
    table = Table(
        key="categories",
        title=_("Categories"),
        columns=_columns(_("Category"), trend=False),
        rows=[
            _part(it, label, name, links, asks={"feature": name} if name else {})
            for it, label, name in rows
        ],
    )
    return _known(table, links.asked)


def features(report: Report, trends: Mapping[str, Sequence[int]], links: Links) -> Table:
    """Return the features, the dearest first, each with how its spend went."""
    table = Table(
        key="features",
        title=_("Features"),
        columns=_columns(_("Feature"), trend=True),
        rows=[
            _part(
                it,
                it.feature,
                it.feature,
                links,
                asks={"feature": it.feature},
                trend=_trend(it.feature, trends.get(it.feature, ())),
            )
            for it in report.features
        ],
        empty=_("No feature was called or refused."),
    )
    return _known(table, links.asked)


def _columns(name: str, *, trend: bool) -> list[Column]:
    return [
        Column(title=name, is_figure=False),
        Column(title=_("Spend")),
        Column(title=_("Share")),
        Column(title=_("Of the budget"), is_figure=False, is_by_budget=True),
        *([Column(title=_("Trend"), is_figure=False)] if trend else []),
        Column(title=_("Calls")),
        Column(title=_("Hit rate")),
        Column(title=_("Downgraded")),
        Column(title=_("Refused"), is_by_budget=True),
    ]


def _known(table: Table, asked: Asked) -> Table:
    """Return the columns of a table that are known of what is asked for."""
    narrow = asked.span.is_narrow
    kept = [it for it, column in enumerate(table.columns) if not (narrow and column.is_by_budget)]
    return replace(
        table,
        columns=[table.columns[it] for it in kept],
        rows=[[row[it] for it in kept] for row in table.rows],
    )


def _part(
    it: FeatureSpend | CategorySpend,
    label: str,
    name: str,
    links: Links,
    *,
    asks: Mapping[str, str],
    trend: Figure | None = None,
) -> list[Figure]:
    def calls(**more: str) -> str:
        return links.in_range(**asks, **more) if name else ""

    return [
        Figure(text=label, url=links.asked.query(feature=name) if name else ""),
        _dollars(it.spend_nanousd, url=calls()),
        _share(it.spend_nanousd, it.total_nanousd),
        Figure(
            text="",
            drawn=_bar(
                it.spend_nanousd,
                held=it.held_nanousd,
                budget=it.budget_nanousd,
                plan=it.plan_nanousd,
            ),
            note=_against_lines(it.spend_nanousd, it.budget_nanousd, it.plan_nanousd),
        ),
        *([trend] if trend else []),
        Figure(text=count(it.calls), url=calls()),
        Figure(
            text=share_text(it.hit_rate),
            url=calls(status__exact=Status.CACHED.value) if it.cached else "",
        ),
        Figure(text=count(it.downgraded), url=calls(downgraded=ANY) if it.downgraded else ""),
        Figure(text=count(it.refused)),
    ]


def _trend(name: str, amounts: Sequence[int]) -> Figure:
    if not any(amounts):
        return Figure(text=EMPTY)
    words = _("%(name)s: from %(least)s to %(most)s a day, %(last)s on the last") % {
        "name": name,
        "least": money.format_usd(min(amounts)),
        "most": money.format_usd(max(amounts)),
        "last": money.format_usd(amounts[-1]),
    }
    return Figure(text="", drawn=charts.sparkline(amounts, title=words))


def trends(amounts: Mapping[tuple[date, str], int], days: Sequence[date]) -> dict[str, list[int]]:
    """Return what each feature spent, day by day."""
    names = {name for _day, name in amounts}
    return {name: [amounts.get((day, name), 0) for day in days] for name in names}


def trend_days(asked: Asked) -> list[date]:
    """Return the days of the trends: those of the range, and some before a short one."""
    last = asked.days[-1]
    count_ = max(len(asked.days), _TREND_DAYS)
    return [last - timedelta(days=ago) for ago in reversed(range(count_))]


# Who spent it ------------------------------------------------------------------------------------


def users(report: Report, links: Links) -> Table:
    """Return the users who spent most."""
    return Table(
        key="users",
        title=_("Most expensive users"),
        columns=[
            Column(title=_("User"), is_figure=False),
            Column(title=_("Spend")),
            Column(title=_("Share")),
            Column(title=_("Calls")),
        ],
        rows=[
            [
                Figure(text=it.label, url=links.user_url(it.user_id)),
                _dollars(it.spend_nanousd, url=links.in_range(user=it.user_id), decimals=4),
                _share(it.spend_nanousd, report.total.spend_nanousd),
                Figure(text=count(it.calls), url=links.in_range(user=it.user_id)),
            ]
            for it in report.users
        ],
        empty=_("No user made a call."),
    )


def subjects(report: Report, links: Links) -> Table:
    """Return the callers without an account who spent most."""
    return Table(
        key="subjects",
        title=_("Most expensive subjects"),
        columns=[
            Column(title=_("Subject"), is_figure=False),
            Column(title=_("Spend")),
            Column(title=_("Share")),
            Column(title=_("Calls")),
        ],
        rows=[
            [
                Figure(text=it.subject, url=links.subject_url(it.subject)),
                _dollars(it.spend_nanousd, url=links.in_range(subject=it.subject), decimals=4),
                _share(it.spend_nanousd, report.total.spend_nanousd),
                Figure(text=count(it.calls), url=links.in_range(subject=it.subject)),
            ]
            for it in report.subjects
        ],
    )


def models(report: Report, links: Links) -> Table:
    """Return the models that answered, with what an answer is like."""
    return Table(
        key="models",
        title=_("Models"),
        columns=[
            Column(title=_("Model"), is_figure=False),
            Column(title=_("Spend")),
            Column(title=_("Share")),
            Column(title=_("Calls")),
            Column(title=_("Cost per call")),
            Column(title=_("Tokens in")),
            Column(title=_("Tokens out")),
            Column(title=_("Per 1,000 out")),
        ],
        rows=[_model(it, links) for it in report.models],
        empty=_("No model answered."),
        note=_("Cost and tokens are the average of the calls that were paid for."),
    )


def _model(it: ModelSpend, links: Links) -> list[Figure]:
    return [
        Figure(text=it.model, url=links.asked.query(model=it.model)),
        _dollars(it.spend_nanousd, url=links.in_range(model=it.model)),
        _share(it.spend_nanousd, it.total_nanousd),
        Figure(text=count(it.calls), url=links.in_range(model=it.model)),
        _average_dollars(it.average_cost_nanousd),
        _average(it.average_prompt_tokens),
        _average(it.average_output_tokens),
        _average_dollars(it.cost_per_1000_output_nanousd),
    ]


# What was not spent ------------------------------------------------------------------------------


def savings(report: Report, links: Links) -> Table:
    """Return what each lever took off the bill."""
    whole = sum(max(it.saved_nanousd, 0) for it in report.savings)
    return Table(
        key="savings",
        title=_("Savings"),
        columns=[
            Column(title=_("Lever"), is_figure=False),
            Column(title=_("Saved")),
            Column(title=_("Share")),
            Column(title=_("Calls")),
        ],
        rows=[
            [
                Figure(text=lever_label(it.lever)),
                _dollars(it.saved_nanousd, url=links.in_range(saved_by=it.lever)),
                _share(it.saved_nanousd, whole),
                Figure(text=count(it.calls), url=links.in_range(saved_by=it.lever)),
            ]
            for it in report.savings
        ],
        empty=_("No lever saved anything."),
    )


def downgrades(report: Report, links: Links) -> Table:
    """Return what was asked for and what answered in its place."""
    rows = []
    for it in report.downgrades:
        url = links.in_range(feature=it.feature, model=it.model, downgraded=it.requested_model)
        rows.append(
            [
                Figure(text=it.feature, url=links.asked.query(feature=it.feature)),
                Figure(text=it.requested_model),
                Figure(text=it.model),
                Figure(text=count(it.calls), url=url),
                _dollars(it.spend_nanousd, url=url),
            ]
        )
    return Table(
        key="downgrades",
        title=_("Downgrades"),
        columns=[
            Column(title=_("Feature"), is_figure=False),
            Column(title=_("Asked for"), is_figure=False),
            Column(title=_("Answered"), is_figure=False),
            Column(title=_("Calls")),
            Column(title=_("Spend")),
        ],
        rows=rows,
        empty=_("Every call was answered by the model that it asked for."),
    )


# What to look at ---------------------------------------------------------------------------------


def attention(report: Report, links: Links) -> list[Figure]:
    """Return what needs attention, each with where to look."""
    return [
        Figure(text=sentence(it), url=_where(it, links), label=it.kind) for it in report.attention
    ]


def _where(concern: Concern, links: Links) -> str:
    if isinstance(concern, Stale):
        return links.in_flight()
    about = {"feature": concern.feature, "model": concern.model}
    about = {name: value for name, value in about.items() if value}
    return links.asked.query(**about) if about else ""


# Words -------------------------------------------------------------------------------------------


def share_text(share: Decimal | None) -> str:
    """Return a percentage as the reader writes it."""
    if share is None:
        return EMPTY
    return _("%(number)s %%") % {"number": formats.number_format(share, 1)}


def range_in_words(asked: Asked) -> str:
    """Return the days of the range."""
    first, last = (formats.date_format(day) for day in (asked.first, asked.last))
    return first if first == last else f"{first} – {last}"


def _dollars(
    nanousd: int, *, label: str = "", url: str = "", note: Any = "", decimals: int = 2
) -> Figure:
    return Figure(
        label=label,
        text=money.format_usd(nanousd, decimals=decimals),
        title=exact_usd(nanousd),
        url=url,
        note=note,
    )


def _average_dollars(nanousd: int | None) -> Figure:
    return Figure(text=EMPTY) if nanousd is None else _dollars(nanousd, decimals=6)


def _average(number: int | None) -> Figure:
    return Figure(text=EMPTY if number is None else count(number))


def _share(part: int, whole: int) -> Figure:
    share = format_html(
        '<span class="ai-budget-percent">{}</span>', share_text(percent(part, whole))
    )
    return Figure(text=share, drawn=charts.share_bar(part, whole))


def _than(change: Decimal | None, before: str, url: str) -> SafeString:
    """Return a change in words, beside what it is measured by."""
    return format_html(
        '<span class="ai-budget-change">{}{}</span>',
        format_html("<b>{}</b> ", _moved(change)) if change is not None else "",
        format_html('<a href="{}">{}</a>', url, before) if url else before,
    )


def _moved(change: Decimal) -> str:
    if not change:
        return _("as much as")
    words = _("%(percent)s more than") if change > 0 else _("%(percent)s less than")
    return words % {"percent": share_text(abs(change))}
