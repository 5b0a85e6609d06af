"""Charts as SVG: pure functions of figures.

Shapes are presentation attributes and colours are classes, whose rules are in ``charts.css``: a
strict content security policy blocks ``style=``. Widths are percentages, so a chart is as wide as
the page while its words keep their size. Every chart has a title, and says in words what it shows;
the page sets the figures beside it as a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from django.utils import formats
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import pgettext

from ai_budget import money

HUES = 8
"""Colours that can be told apart. What is beyond them stands together as one series."""

_HEIGHT = 220
_ROOM_ABOVE = 8
_ROOM_BELOW = 22
_MOST_LABELS = 7
_MOST_TICKS = 5
_MOST_POINTS = 31
_COMPACT_FROM = 100_000 * money.NANO_PER_USD


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One colour of a chart: nano-dollars by day. ``hue`` is 0 for all that has no own colour."""

    label: str
    hue: int
    amounts: tuple[int, ...]

    @property
    def total_nanousd(self) -> int:
        """What all days come to."""
        return sum(self.amounts)

    @property
    def css_class(self) -> str:
        """The class that gives it its colour, in the chart and in its legend."""
        return f"ai-budget-hue-{self.hue}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart: nano-dollars by day, None where nothing is known of it."""

    label: str
    css_class: str
    amounts: tuple[int | None, ...]


def stack(amounts: Mapping[tuple[date, str], int], days: Sequence[date]) -> tuple[Series, ...]:
    """Return the dearest names as series, the dearest first, and all others as the last one."""
    totals: dict[str, int] = {}
    for (_day, name), amount in amounts.items():
        totals[name] = totals.get(name, 0) + amount
    names = sorted((name for name in totals if totals[name]), key=lambda it: (-totals[it], it))
    # One name alone is not worth being hidden behind another word.
    shown = names if len(names) <= HUES else names[: HUES - 1]
    rest = names[len(shown) :]
    series = [
        Series(label=name, hue=hue, amounts=tuple(amounts.get((day, name), 0) for day in days))
        for hue, name in enumerate(shown, start=1)
    ]
    if rest:
        others = tuple(sum(amounts.get((day, name), 0) for name in rest) for day in days)
        label = _("%(number)s others") % {"number": len(rest)}
        series.append(Series(label=label, hue=0, amounts=others))
    return tuple(series)


def stacked_bars(
    days: Sequence[date], series: Sequence[Series], *, name: str, title: str
) -> SafeString:
    """Return a bar for each day, in which the series stand on one another, the first at the foot.

    ``name`` begins the ids of its parts, so it is another one for each chart of a page. A day may
    stand for more than itself, such as for the week that begins with it.
    """
    totals = [sum(column) for column in zip(*(it.amounts for it in series), strict=True)]
    totals = totals or [0] * len(days)
    scale = _Scale.up_to(max(totals, default=0))
    count = max(len(days), 1)
    return format_html(
        '<svg class="ai-budget-chart" role="img" aria-labelledby="{name}-title {name}-words" '
        'width="100%" height="{height}" direction="ltr">'
        '<title id="{name}-title">{title}</title><desc id="{name}-words">{words}</desc>'
        "{grid}{bars}{days}{columns}</svg>",
        name=name,
        height=_HEIGHT + _ROOM_ABOVE + _ROOM_BELOW,
        title=title,
        words=_in_words(days, totals),
        grid=_grid(scale),
        bars=_bars(series, scale, count),
        days=_day_labels(days),
        columns=format_html_join(
            "",
            '<rect class="ai-budget-column" x="{}%" y="0" width="{}%" height="{}">'
            "<title>{}</title></rect>",
            (
                (
                    _percent(index, count),
                    _percent(1, count),
                    _HEIGHT + _ROOM_ABOVE,
                    _column_title(day, total, index, series),
                )
                for index, (day, total) in enumerate(zip(days, totals, strict=True))
            ),
        ),
    )


def lines(days: Sequence[date], drawn: Sequence[Line], *, name: str, title: str) -> SafeString:
    """Return lines over the days, the last one on top. ``name`` is as that of ``stacked_bars``."""
    known = [amount for line in drawn for amount in line.amounts if amount is not None]
    scale = _Scale.up_to(max(known, default=0))
    return format_html(
        '<svg class="ai-budget-chart" role="img" aria-labelledby="{name}-title {name}-words" '
        'width="100%" height="{height}" direction="ltr">'
        '<title id="{name}-title">{title}</title><desc id="{name}-words">{words}</desc>'
        '{grid}<svg y="{above}" width="100%" height="{plot}" viewBox="0 0 {last} {plot}" '
        'preserveAspectRatio="none" overflow="visible">{lines}</svg>{days}</svg>',
        name=name,
        height=_HEIGHT + _ROOM_ABOVE + _ROOM_BELOW,
        title=title,
        words=_lines_in_words(days, drawn),
        grid=_grid(scale),
        above=_ROOM_ABOVE,
        plot=_HEIGHT,
        last=max(len(days) - 1, 1),
        lines=format_html_join(
            "",
            '<polyline class="ai-budget-line {}" points="{}" fill="none" '
            'vector-effect="non-scaling-stroke"><title>{}</title></polyline>',
            ((line.css_class, _points(line.amounts, scale), line.label) for line in drawn),
        ),
        days=_day_labels(days, on_points=True),
    )


def sparkline(amounts: Sequence[int], *, title: str) -> SafeString:
    """Return a small line that shows how an amount went, from the first day to the last."""
    points = _thinned(amounts)
    most = max(points, default=0) or 1
    last = max(len(points) - 1, 1)
    line = " ".join(
        f"{_tenths(index * 960, last)},{_tenths((most - max(amount, 0)) * 200 + 20 * most, most)}"
        for index, amount in enumerate(points if len(points) > 1 else [*points, *points])
    )
    return format_html(
        '<svg class="ai-budget-spark" role="img" width="96" height="24" viewBox="0 0 96 24" '
        'preserveAspectRatio="none"><title>{}</title>'
        '<polygon class="ai-budget-spark-area" points="0,23 {} 96,23"/>'
        '<polyline class="ai-budget-spark-line" points="{}" fill="none" '
        'vector-effect="non-scaling-stroke"/></svg>',
        title,
        line,
        line,
    )


def budget_bar(
    spent: int, *, held: int = 0, limit: int | None, plan: int | None = None, title: str
) -> SafeString:
    """Return what is spent of a limit as a bar, with a mark where the plan is; all nano-dollars.

    Without a limit the bar is as long as the plan or, beyond it, as what is spent. It is full at
    the limit, or at the plan where there is no limit, and about to be from 80 % on.
    """
    measure = plan if limit is None else limit
    if measure is None:
        return SafeString("")
    length = max(measure, spent + held, plan or 0) if limit is None else max(limit, plan or 0)
    return format_html(
        '<svg class="ai-budget-bar ai-budget-bar-{}" role="img" width="140" height="8" '
        'viewBox="0 0 1000 8" preserveAspectRatio="none"><title>{}</title>'
        '<rect class="ai-budget-track" width="1000" height="8"/>'
        '<rect class="ai-budget-held" width="{}" height="8"/>'
        '<rect class="ai-budget-spent" width="{}" height="8"/>{}</svg>',
        _state(spent + held, measure),
        title,
        _thousandths(spent + held, length),
        _thousandths(spent, length),
        ""
        if plan is None
        else format_html(
            '<line class="ai-budget-plan" x1="{0}" x2="{0}" y1="0" y2="8" '
            'vector-effect="non-scaling-stroke"/>',
            min(_thousandths(plan, length), 995),
        ),
    )


def share_bar(part: int, whole: int, *, css_class: str = "ai-budget-spent") -> SafeString:
    """Return a share as a bar, for the eye alone: the figure stands beside it."""
    return format_html(
        '<svg class="ai-budget-share" aria-hidden="true" width="64" height="6" '
        'viewBox="0 0 1000 6" preserveAspectRatio="none">'
        '<rect class="ai-budget-track" width="1000" height="6"/>'
        '<rect class="{}" width="{}" height="6"/></svg>',
        css_class,
        _thousandths(part, whole),
    )


def swatch(css_class: str) -> SafeString:
    """Return the colour of a series, to stand before its name."""
    return format_html(
        '<svg class="ai-budget-swatch" aria-hidden="true" width="10" height="10">'
        '<rect class="{}" width="10" height="10" rx="2"/></svg>',
        css_class,
    )


def stroke(css_class: str) -> SafeString:
    """Return how a line is drawn, to stand before its name."""
    return format_html(
        '<svg class="ai-budget-swatch" aria-hidden="true" width="22" height="10">'
        '<line class="ai-budget-line {}" x1="0" x2="22" y1="5" y2="5"/></svg>',
        css_class,
    )


def dollar_ticks(most: int) -> list[int]:
    """Return round amounts from 0 to at least ``most`` nano-dollars, evenly apart."""
    step = 1
    for power in range(19):
        for lead in (1, 2, 5):
            step = lead * 10**power
            if step * (_MOST_TICKS - 1) >= most:
                return [step * number for number in range(-(-most // step) + 1)]
    return [0, most]


# The pieces ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """Where an amount stands in a plot that is ``_HEIGHT`` pixels high, from 0 upwards."""

    ticks: tuple[int, ...]

    @classmethod
    def up_to(cls, most: int) -> _Scale:
        # An empty chart has an axis all the same.
        return cls(ticks=tuple(dollar_ticks(most)) if most else (0, money.NANO_PER_USD))

    def tenths(self, amount: int) -> int:
        """Return the height of an amount, in tenths of a pixel."""
        return max(amount, 0) * _HEIGHT * 10 // self.ticks[-1]

    def y(self, amount: int) -> str:
        """Return where an amount ends, in pixels from above."""
        return _pixels((_HEIGHT + _ROOM_ABOVE) * 10 - self.tenths(amount))


def _grid(scale: _Scale) -> SafeString:
    return format_html_join(
        "",
        '<line class="ai-budget-grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
        '<text class="ai-budget-tick" x="-8" y="{0}" dy="4" text-anchor="end">{1}</text>',
        ((scale.y(amount), _tick(amount, scale.ticks[1])) for amount in scale.ticks),
    )


def _bars(series: Sequence[Series], scale: _Scale, count: int) -> SafeString:
    width = _percent(8, count * 10)
    feet = [0] * count
    groups = []
    for it in series:
        bars = []
        for index, amount in enumerate(it.amounts):
            # From the foot's height to the head's: heights of their own would leave gaps.
            low, high = scale.tenths(feet[index]), scale.tenths(feet[index] + amount)
            feet[index] += amount
            if high > low:
                x = _percent(index * 10 + 1, count * 10)
                top = (_HEIGHT + _ROOM_ABOVE) * 10 - high
                bars.append((x, _pixels(top), width, _pixels(high - low)))
        drawn = format_html_join("", '<rect x="{}%" y="{}" width="{}%" height="{}"/>', bars)
        groups.append((it.css_class, drawn))
    return format_html_join("", '<g class="ai-budget-bars {}">{}</g>', groups)


def _day_labels(days: Sequence[date], *, on_points: bool = False) -> SafeString:
    """Return as many dates as fit beside one another on a narrow page."""
    every = -(-len(days) // _MOST_LABELS) or 1
    last = max(len(days) - 1, 1)
    return format_html_join(
        "",
        '<text class="ai-budget-tick" x="{}%" y="{}" text-anchor="middle">{}</text>',
        (
            (
                _percent(index, last) if on_points else _percent(index * 2 + 1, len(days) * 2),
                _HEIGHT + _ROOM_ABOVE + _ROOM_BELOW - 5,
                _day(day),
            )
            for index, day in enumerate(days)
            if index % every == 0
        ),
    )


def _column_title(day: date, total: int, index: int, series: Sequence[Series]) -> str:
    parts = [
        f"{it.label} {_short(it.amounts[index])}" for it in reversed(series) if it.amounts[index]
    ]
    whole = f"{formats.date_format(day)}: {_short(total)}"
    return "\n".join([whole, *parts]) if len(series) > 1 else whole


def _in_words(days: Sequence[date], totals: Sequence[int]) -> str:
    if not any(totals):
        return _("Nothing was spent.")
    most = max(totals)
    return _("From %(first)s to %(last)s, %(total)s in all; the most is %(most)s, on %(day)s.") % {
        "first": formats.date_format(days[0]),
        "last": formats.date_format(days[-1]),
        "total": _short(sum(totals)),
        "most": _short(most),
        "day": formats.date_format(days[totals.index(most)]),
    }


def _lines_in_words(days: Sequence[date], drawn: Sequence[Line]) -> str:
    """Return where each line ends."""
    ends = []
    for line in drawn:
        known = [it for it in zip(days, line.amounts, strict=True) if it[1] is not None]
        if known:
            day, amount = known[-1]
            words = _("%(name)s: %(amount)s on %(day)s")
            shown = {"amount": _short(amount or 0), "day": formats.date_format(day)}
            ends.append(words % {"name": line.label, **shown})
    return "; ".join(ends)


def _points(amounts: Iterable[int | None], scale: _Scale) -> str:
    return " ".join(
        f"{index},{_pixels(_HEIGHT * 10 - scale.tenths(amount))}"
        for index, amount in enumerate(amounts)
        if amount is not None
    )


def _thinned(amounts: Sequence[int]) -> list[int]:
    """Return at most ``_MOST_POINTS`` points: of more days, each the sum of as many of them."""
    size = -(-len(amounts) // _MOST_POINTS) or 1
    # From the end, so that the latest point is whole.
    starts = range(len(amounts) % size, len(amounts), size)
    return [sum(amounts[start : start + size]) for start in starts]


def _state(taken: int, measure: int) -> str:
    if taken >= measure:
        return "full"
    return "warn" if taken * 100 >= measure * 80 else "fine"


def _short(nanousd: int) -> str:
    return money.format_usd(nanousd)


def _tick(amount: int, step: int) -> str:
    """Return an amount of the axis with as many decimals as its steps have."""
    if step >= _COMPACT_FROM:
        return f"${amount // (1000 * money.NANO_PER_USD):,}k"
    decimals = 0
    while decimals < 9 and step % 10 ** (9 - decimals):
        decimals += 1
    return money.format_usd(amount, decimals=2 if decimals == 1 else decimals)


def _day(day: date) -> str:
    """Return a day without its year: there is room for no more."""
    # Translators: a short day in the letters of Django's `date` filter, as in "Oct 15".
    return formats.date_format(day, pgettext("short day", "M j"))


def _percent(part: int, whole: int) -> str:
    """Return a share in percent with two decimals."""
    hundredths = part * 10_000 // whole
    return f"{hundredths // 100}.{hundredths % 100:02}"


def _thousandths(part: int, whole: int) -> int:
    return min(max(part, 0) * 1000 // whole, 1000) if whole > 0 else 1000 * (part > 0)


def _tenths(number: int, among: int) -> str:
    return _pixels(number // among)


def _pixels(tenths: int) -> str:
    """Return tenths of a pixel as pixels."""
    return f"{tenths // 10}.{tenths % 10}"
