"""Charts, read as what they are made of: shapes, their places, and words for who sees none."""

from __future__ import annotations

import re
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from django.utils import translation
from hypothesis import given
from hypothesis import strategies as st

import ai_budget
from ai_budget import money
from ai_budget.review import charts
from ai_budget.review.charts import Series

USD = money.NANO_PER_USD
FIRST = date(2026, 10, 1)


def days(number: int) -> list[date]:
    return [FIRST + timedelta(days=offset) for offset in range(number)]


def one(*amounts: int, label: str = "chat", hue: int = 1) -> Series:
    return Series(label=label, hue=hue, amounts=amounts)


def parsed(svg: str) -> ElementTree.Element:
    # What parses as XML leaves nothing open and nothing unescaped.
    return ElementTree.fromstring(svg)  # noqa: S314


def bars(svg: str) -> list[tuple[float, float, float]]:
    """Each bar's left edge in percent, its top in pixels, and its height."""
    groups = parsed(svg).findall("g")
    return [
        (float(bar.attrib["x"].rstrip("%")), float(bar.attrib["y"]), float(bar.attrib["height"]))
        for group in groups
        for bar in group
    ]


def bar_chart(*series: Series, number: int) -> str:
    return charts.stacked_bars(days(number), series, name="chart", title="Spend by day")


# Series -----------------------------------------------------------------------------------------


def test_the_dearest_stands_at_the_foot() -> None:
    amounts = {(FIRST, "search"): 1, (FIRST, "chat"): 5, (days(2)[1], "search"): 2}

    found = charts.stack(amounts, days(2))

    assert [(it.label, it.hue, it.amounts) for it in found] == [
        ("chat", 1, (5, 0)),
        ("search", 2, (1, 2)),
    ]


def test_what_has_no_colour_left_stands_together() -> None:
    amounts = {(FIRST, f"feature-{number:02}"): 100 - number for number in range(12)}

    found = charts.stack(amounts, days(1))

    assert len(found) == charts.HUES
    assert (found[-1].label, found[-1].hue) == ("5 others", 0)
    assert sum(it.total_nanousd for it in found) == sum(amounts.values())


def test_a_last_one_alone_keeps_its_name() -> None:
    amounts = {(FIRST, f"feature-{number}"): 1 for number in range(charts.HUES)}

    assert "others" not in "".join(it.label for it in charts.stack(amounts, days(1)))


def test_what_spent_nothing_is_no_series() -> None:
    assert charts.stack({(FIRST, "chat"): 0}, days(1)) == ()


# Bars -------------------------------------------------------------------------------------------


def test_a_bar_is_as_high_as_its_share_of_the_axis() -> None:
    (low, high) = bars(bar_chart(one(1 * USD, 4 * USD), number=2))

    assert high[2] == pytest.approx(low[2] * 4, abs=0.2)
    assert low[1] + low[2] == pytest.approx(high[1] + high[2], abs=0.11)


def test_bars_stand_on_one_another_without_a_gap() -> None:
    foot, head = bars(bar_chart(one(3 * USD), one(USD, label="search", hue=2), number=1))

    assert foot[0] == head[0]
    assert head[1] + head[2] == pytest.approx(foot[1], abs=0.01)


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=40))
def test_no_bar_leaves_the_chart(amounts: list[int]) -> None:
    for left, top, height in bars(bar_chart(one(*amounts), number=len(amounts))):
        assert 0 <= left < 100
        assert top >= 0
        assert top + height <= 228.01


@given(st.integers(0, money.MAX_NANOUSD))
def test_an_axis_has_few_round_steps_and_reaches_the_top(most: int) -> None:
    ticks = charts.dollar_ticks(most)

    assert ticks[0] == 0
    assert ticks[-1] >= most
    assert len(ticks) <= 5
    steps = {after - before for before, after in pairwise(ticks)}
    assert len(steps) <= 1
    assert all(re.fullmatch("[125]0*", str(step)) for step in steps)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, ["$0", "$1"]),
        (4 * USD, ["$0", "$1", "$2", "$3", "$4"]),
        (USD // 2, ["$0.00", "$0.20", "$0.40", "$0.60"]),
        (USD // 1000, ["$0.0000", "$0.0005", "$0.0010"]),
        (900_000 * USD, ["$0k", "$500k", "$1,000k"]),
    ],
)
def test_the_axis_is_written_with_as_many_decimals_as_it_needs(
    most: int, expected: list[str]
) -> None:
    words = [it.text for it in parsed(bar_chart(one(most), number=1)).iter("text")]

    assert words[:-1] == expected


def test_no_more_days_are_named_than_fit_a_narrow_page() -> None:
    for number in (1, 7, 8, 31, 92, 366):
        chart = bar_chart(one(*[USD] * number), number=number)
        named = [it.text for it in parsed(chart).iter("text") if "$" not in str(it.text)]
        assert named[0] == "Oct 1"
        assert len(named) <= 7


def test_each_day_says_what_it_is_made_of() -> None:
    chart = parsed(bar_chart(one(3 * USD), one(USD, label="search", hue=2), number=1))

    (column,) = (it for it in chart.iter("rect") if it.get("class") == "ai-budget-column")

    assert [it.text for it in column] == ["Oct. 1, 2026: $4.00\nsearch $1.00\nchat $3.00"]


def test_it_is_told_in_words_what_the_chart_shows() -> None:
    chart = parsed(bar_chart(one(USD, 3 * USD), number=2))
    by_id = {it.get("id"): it.text for it in chart.iter() if it.get("id")}

    assert chart.get("role") == "img"
    assert [by_id[name] for name in str(chart.get("aria-labelledby")).split()] == [
        "Spend by day",
        "From Oct. 1, 2026 to Oct. 2, 2026, $4.00 in all; the most is $3.00, on Oct. 2, 2026.",
    ]


def test_an_empty_chart_says_that_nothing_was_spent() -> None:
    chart = bar_chart(number=3)

    assert "Nothing was spent." in chart
    assert bars(chart) == []


def test_days_are_written_in_the_readers_language() -> None:
    with translation.override("de"):
        assert "Okt 1" in bar_chart(one(USD), number=1)


# Small charts -----------------------------------------------------------------------------------


def test_a_sparkline_goes_up_where_the_amounts_do() -> None:
    spark = parsed(charts.sparkline([0, USD, 2 * USD], title="chat"))
    line = spark.find("polyline")
    assert line is not None

    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]

    assert heights == [22.0, 12.0, 2.0]
    assert spark.findtext("title") == "chat"


@pytest.mark.parametrize("amounts", [[], [0], [5], [0, 0], [1] * 400])
def test_a_sparkline_of_whatever_there_is(amounts: list[int]) -> None:
    line = parsed(charts.sparkline(amounts, title="chat")).find("polyline")

    assert line is not None
    points = [tuple(map(float, it.split(","))) for it in line.attrib["points"].split()]
    assert len(points) <= 31
    assert all(0 <= x <= 96 and 2 <= y <= 22 for x, y in points)


def widths(svg: str) -> dict[str, str]:
    return {str(it.get("class")): it.attrib["width"] for it in parsed(svg).iter("rect")}


@pytest.mark.parametrize(
    ("spent", "held", "expected", "state"),
    [
        (0, 0, ("0", "0"), "fine"),
        (25, 25, ("250", "500"), "fine"),
        (70, 10, ("700", "800"), "warn"),
        (100, 0, ("1000", "1000"), "full"),
        (500, 0, ("1000", "1000"), "full"),
    ],
)
def test_a_bar_shows_what_is_spent_and_held_of_a_limit(
    spent: int, held: int, expected: tuple[str, str], state: str
) -> None:
    bar = charts.budget_bar(spent, held=held, limit=100, title="chat")

    assert (widths(bar)["ai-budget-spent"], widths(bar)["ai-budget-held"]) == expected
    assert f"ai-budget-bar-{state}" in bar


def test_the_plan_is_a_mark_on_the_bar() -> None:
    mark = parsed(charts.budget_bar(10, limit=100, plan=40, title="chat")).find("line")

    assert mark is not None
    assert mark.attrib["x1"] == "400"


def test_without_a_limit_the_bar_is_measured_by_the_plan() -> None:
    bar = charts.budget_bar(150, limit=None, plan=100, title="chat")

    assert "ai-budget-bar-full" in bar
    assert 'x1="666"' in bar


def test_without_either_there_is_nothing_to_draw() -> None:
    assert charts.budget_bar(150, limit=None, title="chat") == ""


def test_a_limit_of_nothing_is_full() -> None:
    bar = charts.budget_bar(0, limit=0, title="chat")

    assert "ai-budget-bar-full" in bar
    assert widths(bar)["ai-budget-spent"] == "0"


def month(*lines: tuple[str, tuple[int | None, ...]]) -> ElementTree.Element:
    drawn = [charts.Line(label=label, css_class="x", amounts=amounts) for label, amounts in lines]
    return parsed(charts.lines(days(3), drawn, name="month", title="This month"))


def test_lines_share_one_axis_and_end_where_nothing_is_known() -> None:
    chart = month(("plan", (2 * USD, 2 * USD, 2 * USD)), ("spent", (0, USD, None)))

    assert [it.attrib["points"] for it in chart.iter("polyline")] == [
        "0,0.0 1,0.0 2,0.0",
        "0,220.0 1,110.0",
    ]


def test_it_is_told_in_words_where_lines_end() -> None:
    chart = month(("plan", (None, None, 2 * USD)), ("spent", (0, USD, None)), ("none", (None,) * 3))

    assert chart.findtext("desc") == "plan: $2.00 on Oct. 3, 2026; spent: $1.00 on Oct. 2, 2026"


# All of them ------------------------------------------------------------------------------------

HOSTILE = '<script>alert("x")</script>&\'"'


@pytest.mark.parametrize(
    "svg",
    [
        bar_chart(one(USD, label=HOSTILE), one(USD, label="b", hue=2), number=1),
        charts.stacked_bars(days(1), [one(USD)], name="chart", title=HOSTILE),
        charts.sparkline([1, 2], title=HOSTILE),
        charts.budget_bar(1, limit=2, plan=1, title=HOSTILE),
        charts.share_bar(1, 2),
        charts.swatch("ai-budget-hue-1"),
        charts.stroke("ai-budget-line-before"),
        charts.lines(
            days(1),
            [charts.Line(label=HOSTILE, css_class="x", amounts=(1,))],
            name="month",
            title=HOSTILE,
        ),
    ],
)
def test_a_chart_is_well_formed_and_has_no_style_and_no_script(svg: str) -> None:
    for element in parsed(svg).iter():
        assert element.tag not in {"script", "style"}
        assert not {name for name in element.attrib if name == "style" or name.startswith("on")}
    assert "<script" not in svg


# Colours ----------------------------------------------------------------------------------------

STYLES = Path(*ai_budget.__path__, "static", "ai_budget", "charts.css")
WHITE, ALMOST_BLACK = "#ffffff", "#121212"
"""What the admin's pages are drawn on, in light and in dark."""


def luminance(colour: str) -> float:
    """By the formula of WCAG 2."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def hues() -> dict[str, tuple[str, str]]:
    rule = r"--ai-budget-hue-(\d): light-dark\((#\w{6}), (#\w{6})\)"
    return {hue: (a, b) for hue, a, b in re.findall(rule, STYLES.read_text(encoding="utf-8"))}


def test_every_hue_stands_out_from_the_page_in_light_and_in_dark() -> None:
    assert sorted(hues()) == [str(number) for number in range(charts.HUES + 1)]
    for light, dark in hues().values():
        assert contrast(light, WHITE) >= 3
        assert contrast(dark, ALMOST_BLACK) >= 3


def test_no_hue_is_there_twice() -> None:
    for shades in zip(*hues().values(), strict=True):
        assert len(set(shades)) == charts.HUES + 1
