from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.utils import translation
from hypothesis import given
from hypothesis import strategies as st

from ai_budget import money
from ai_budget.review.attention import OverPlan, Spike
from ai_budget.review.comparison import Change, Comparison
from ai_budget.review.forecast import Forecast
from ai_budget.review.pace import Against, BudgetPace, Week
from ai_budget.review.refusals import Refusals
from ai_budget.review.render import (
    RENDERERS,
    to_csv,
    to_data,
    to_html,
    to_json,
    to_markdown,
    to_table,
)
from ai_budget.review.report import Report
from ai_budget.review.spans import Span
from ai_budget.review.spending import (
    CategorySpend,
    Downgrade,
    FeatureSpend,
    ModelSpend,
    Saving,
    SubjectSpend,
    Total,
    UserSpend,
)

SPEND = 12_345_678_901

OCTOBER = Span(since=datetime(2026, 10, 1, tzinfo=UTC), until=datetime(2026, 11, 1, tzinfo=UTC))

EMPTY = Report(
    since=OCTOBER.since,
    until=OCTOBER.until,
    time_zone="UTC",
    at=datetime(2026, 10, 15, 12, tzinfo=UTC),
    span=OCTOBER,
    total=Total(),
    comparison=Comparison(
        since=datetime(2026, 9, 1, tzinfo=UTC),
        until=datetime(2026, 9, 15, 12, tzinfo=UTC),
        is_month=True,
        same_days=True,
        total=Change(name="*"),
    ),
    features=(),
    users=(),
    subjects=(),
    models=(),
    refusals=(),
    downgrades=(),
)

FULL = replace(
    EMPTY,
    total=Total(
        spend_nanousd=SPEND,
        held_nanousd=5,
        in_flight=1,
        calls=1234,
        attempts=1300,
        cached=34,
        looked_up=1234,
        saved_nanousd=2_500_000_000,
        refused=7,
        active_users=40,
        spend_by_users_nanousd=SPEND,
        budget_nanousd=20_000_000_000,
        plan_nanousd=15_000_000_000,
    ),
    features=(
        FeatureSpend(
            feature="chat",
            total_nanousd=SPEND,
            spend_nanousd=SPEND,
            calls=1234,
            cached=34,
            looked_up=1234,
            saved_nanousd=2_500_000_000,
            refused=7,
            budget_nanousd=20_000_000_000,
            plan_nanousd=15_000_000_000,
        ),
        FeatureSpend(feature="search", total_nanousd=SPEND),
    ),
    users=(
        UserSpend(user_id=1, label="anna", deleted=False, calls=3, spend_nanousd=SPEND),
        UserSpend(user_id=42, label="user 42 (deleted)", deleted=True, calls=1, spend_nanousd=1),
    ),
    subjects=(SubjectSpend(subject="tenant-1", calls=2, spend_nanousd=9),),
    models=(
        ModelSpend(
            model="claude-haiku-5-5",
            total_nanousd=SPEND,
            calls=1234,
            paid_calls=1200,
            output_tokens=480_000,
            spend_nanousd=SPEND,
        ),
        ModelSpend(
            model="claude-opus-5-5",
            total_nanousd=SPEND,
            calls=1,
            paid_calls=0,
            output_tokens=0,
            spend_nanousd=0,
        ),
    ),
    refusals=(Refusals(feature="chat", refused=7),),
    downgrades=(
        Downgrade(
            feature="chat",
            requested_model="claude-opus-5-5",
            model="claude-haiku-5-5",
            calls=2,
            spend_nanousd=9,
        ),
    ),
    savings=(
        Saving(levers=("response cache",), calls=34, saved_nanousd=2_600_000_000),
        Saving(levers=("prompt cache", "batch"), calls=9, saved_nanousd=-100_000_000),
    ),
    categories=(
        CategorySpend(
            category="product",
            total_nanousd=SPEND,
            spend_nanousd=SPEND,
            calls=1234,
            plan_nanousd=10_000_000_000,
        ),
        CategorySpend(category="", total_nanousd=SPEND),
    ),
    weeks=(
        BudgetPace(
            name="*",
            against=Against.PLAN,
            weeks=(
                Week(
                    since=date(2026, 10, 1),
                    until=date(2026, 10, 8),
                    spend_nanousd=4,
                    expected_nanousd=4,
                ),
                Week(
                    since=date(2026, 10, 8),
                    until=date(2026, 10, 15),
                    spend_nanousd=9,
                    expected_nanousd=4,
                ),
            ),
        ),
        BudgetPace(
            name="chat",
            against=Against.LIMIT,
            weeks=(
                Week(
                    since=date(2026, 10, 1),
                    until=date(2026, 10, 8),
                    spend_nanousd=1,
                    expected_nanousd=4,
                ),
                Week(
                    since=date(2026, 10, 8),
                    until=date(2026, 10, 15),
                    spend_nanousd=0,
                    expected_nanousd=0,
                    running=True,
                ),
            ),
        ),
    ),
    comparison=replace(
        EMPTY.comparison,
        total=Change(name="*", spend_nanousd=SPEND, before_nanousd=10_000_000_000),
        features=(
            Change(name="chat", spend_nanousd=SPEND, before_nanousd=10_000_000_000),
            Change(name="search", before_nanousd=1_000_000_000),
            Change(name="new", spend_nanousd=1_000_000_000),
        ),
    ),
    days={(date(2026, 10, 1), "chat"): SPEND},
    forecast=Forecast(
        name="*",
        spent_nanousd=SPEND,
        forecast_nanousd=26_000_000_000,
        budget_nanousd=20_000_000_000,
        plan_nanousd=30_000_000_000,
    ),
    forecasts=(Forecast(name="chat", spent_nanousd=SPEND, forecast_nanousd=26_000_000_000),),
    attention=(
        OverPlan(feature="product", spend_nanousd=SPEND, plan_nanousd=10_000_000_000),
        Spike(
            feature="chat",
            since=datetime(2026, 10, 15, 11, tzinfo=UTC),
            spend_nanousd=5_000_000_000,
            usual_nanousd=100_000_000,
        ),
    ),
)


TABLE = """\
AI spend in 2026-10 (UTC)
=========================

Spend         $12.35
Budget        $20.00, 61.7 % used
Plan          $15.00, 82.3 % used
Before        $10.00 (the same days before: 2026-09-01 to 2026-09-15), so +23.5 %
Forecast      $26.00
In flight     <$0.01 held by 1 call
Saved         $2.50
Calls         1,234, of which 34 from the cache
Attempts      1,300
Refused       7
Active users  40, $0.3086 each

Needs attention
  - product spent $12.35, 123.5 % of its plan of $10.00.
  - chat spent $5.00 in the hour from Oct. 15, 2026, 11 a.m. on; usual is $0.10.

By category
  Category           Spend    Share  Calls  Cached  Budget used  Plan used  Refused
  product           $12.35  100.0 %  1,234       -            -  ! 123.5 %        0
  (in no category)   $0.00    0.0 %      0       -            -          -        0
  ! more than 120 % of the plan

By feature
  Feature   Spend    Share  Calls  Cached  Budget used  Plan used  Refused
  chat     $12.35  100.0 %  1,234   2.8 %       61.7 %     82.3 %        7
  search    $0.00    0.0 %      0       -            -          -        0

Weekly pace
  Budget          Against        10-01/07    10-08/14
  the whole site  plan     on track 100 %  over 225 %
  chat            limit        under 25 %    on track
  Spend as a share of what the plan or limit has for those days; of a running week, for what has
  passed of it.

Beside the same days before: 2026-09-01 to 2026-09-15
  Feature   Spend  Before  Difference    Change
  chat     $12.35  $10.00       $2.35   +23.5 %
  search    $0.00   $1.00      -$1.00  -100.0 %
  new       $1.00   $0.00       $1.00         -

Forecast for the month
  Budget           Spent  Forecast   Of limit  Of plan
  the whole site  $12.35    $26.00  ! 130.0 %   86.7 %
  chat            $12.35    $26.00          -        -

Most expensive users
  User               Calls   Spend
  anna                   3  $12.35
  user 42 (deleted)      1  <$0.01

Most expensive subjects
  Subject   Calls   Spend
  tenant-1      2  <$0.01

By model
  Model             Calls  Avg prompt  Avg output  Avg cost  1k output  Reads   Spend    Share
  claude-haiku-5-5  1,234           0         400   $0.0103    $0.0257      -  $12.35  100.0 %
  claude-opus-5-5       1           -           -         -          -      -   $0.00    0.0 %
  Averages of paid calls. 1k output: all that was paid, by thousand tokens that came out. Reads:
  prompt tokens that the API's prompt cache had.

Refusals
  Feature  Refused
  chat           7

Downgrades
  Feature  Asked for        Answered by       Calls   Spend
  chat     claude-opus-5-5  claude-haiku-5-5      2  <$0.01

Savings
  Lever                Calls   Saved
  response cache          34   $2.60
  prompt cache, batch      9  -$0.10

Not worth caching: under 20 % found in 500 calls or more
  Feature  Looked up  Found  Hit rate
  chat         1,234     34     2.8 %
"""


def named(label: str) -> Report:
    """A report in which a user, a subject and a feature have this name."""
    (user, *_), (subject,) = FULL.users, FULL.subjects
    return replace(
        FULL,
        users=(replace(user, label=label),),
        subjects=(replace(subject, subject=label),),
        features=(replace(FULL.features[0], feature=label),),
    )


def cells(report: Report) -> list[list[str]]:
    return list(csv.reader(io.StringIO(to_csv(report))))


# Tables -----------------------------------------------------------------------------------------


def test_the_table_shows_every_section() -> None:
    assert to_table(FULL) == TABLE


def test_an_empty_span_says_so() -> None:
    assert to_table(EMPTY) == "There were no calls in 2026-10 (UTC).\n"
    chat = replace(OCTOBER, feature="chat")
    day = replace(EMPTY, until=datetime(2026, 10, 2, tzinfo=UTC), span=chat)
    assert to_table(day) == "There were no calls on 2026-10-01 (UTC), chat only.\n"
    days = replace(EMPTY, until=datetime(2026, 10, 15, tzinfo=UTC))
    assert to_table(days) == "There were no calls from 2026-10-01 to 2026-10-14 (UTC).\n"


def test_refusals_alone_are_no_empty_span() -> None:
    refused = replace(EMPTY, total=Total(refused=1), refusals=(Refusals(feature="x", refused=1),))

    assert "Refusals" in to_table(refused)


def test_no_limit_is_said_and_a_limit_of_zero_has_no_percentage() -> None:
    assert "Budget        no limit" in to_table(replace(FULL, total=Total(calls=1, attempts=1)))
    none = replace(FULL, total=Total(attempts=1, budget_nanousd=0))
    assert "Budget        $0.00\n" in to_table(none)


@pytest.mark.parametrize("name", ["x" * 300, "界" * 100])
def test_long_names_are_cut_so_that_lines_fit(name: str) -> None:
    downgrade = replace(FULL.downgrades[0], feature=name, requested_model=name, model=name)
    lines = to_table(replace(named(name), downgrades=(downgrade,))).splitlines()

    assert max(map(len, lines)) <= 100
    assert any("..." in line for line in lines)


def test_wide_characters_keep_the_columns_aligned() -> None:
    lines = to_table(replace(FULL, users=named("日本語").users)).splitlines()

    (row,) = (line for line in lines if "日本語" in line)
    (heading,) = (line for line in lines if line.strip().startswith("User "))
    # Each of the three characters takes two columns of a terminal.
    assert len(row) + 3 == len(heading)


def test_names_cannot_speak_to_the_terminal() -> None:
    table = to_table(named("\x1b[31mred\r\n"))

    assert "\x1b" not in table
    assert "?[31mred??" in table


# JSON -------------------------------------------------------------------------------------------


def test_json_carries_exact_dollars_as_strings() -> None:
    data = json.loads(to_json(FULL))

    assert money.parse_usd(data["total"]["spend_usd"]) == SPEND
    assert Decimal(data["features"][0]["spend_usd"]) == Decimal("12.345678901")
    assert data["features"][1]["hit_rate_percent"] is None
    assert data["users"][1] == {
        "user": "user 42 (deleted)",
        "user_id": "42",
        "deleted": True,
        "calls": 1,
        "spend_usd": "0.000000001",
    }


@given(st.integers(min_value=0, max_value=money.MAX_NANOUSD))
def test_any_amount_survives_json(nanousd: int) -> None:
    data = json.loads(to_json(replace(EMPTY, total=Total(spend_nanousd=nanousd))))

    assert money.parse_usd(data["total"]["spend_usd"]) == nanousd


def test_json_keeps_its_keys_in_an_empty_span() -> None:
    data = json.loads(to_json(EMPTY))

    assert data.keys() == json.loads(to_json(FULL)).keys()
    assert data["total"].keys() == to_data(FULL)["total"].keys()
    assert data["total"]["spend_usd"] == "0.000000000"
    assert data["features"] == data["users"] == data["models"] == data["downgrades"] == []


def test_no_number_in_json_is_a_float() -> None:
    def refuse(text: str) -> Any:
        raise AssertionError(f"{text} is a float")

    json.loads(to_json(FULL), parse_float=refuse)


# CSV --------------------------------------------------------------------------------------------


def test_csv_is_in_long_form() -> None:
    rows = cells(FULL)

    assert rows[0] == ["section", "name", "metric", "value"]
    assert ["total", "", "spend_usd", "12.345678901"] in rows
    assert ["features", "chat", "calls", "1234"] in rows
    assert ["users", "user 42 (deleted)", "deleted", "true"] in rows
    assert ["downgrades", "chat > claude-opus-5-5 > claude-haiku-5-5", "calls", "2"] in rows
    assert {len(row) for row in rows} == {4}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff20"])
def test_no_name_becomes_a_formula(start: str) -> None:
    names = {row[1] for row in cells(named(f"{start}cmd|' /C calc'!A0"))}

    assert "'{}cmd|' /C calc'!A0".format("\n" if start == "\r" else start) in names
    assert not any(name.startswith(start) for name in names)


def test_names_with_separators_stay_one_cell() -> None:
    assert 'a,"b"' in {row[1] for row in cells(named('a,"b"'))}


def test_csv_of_an_empty_span_has_the_totals() -> None:
    rows = cells(EMPTY)

    assert ["total", "", "calls", "0"] in rows
    assert {row[0] for row in rows[1:]} == {"report", "total", "comparison"}


@pytest.mark.parametrize("renderer", RENDERERS.values(), ids=RENDERERS.keys())
def test_every_format_ends_its_last_line(renderer: Any) -> None:
    assert "".join(renderer(FULL)).endswith("\n")


# Markdown and HTML ------------------------------------------------------------------------------


def test_markdown_has_every_section_as_a_table() -> None:
    text = to_markdown(FULL)

    titles = [line for line in TABLE.splitlines() if line and not line.startswith(" ")][13:]
    assert all(f"## {title}" in text for title in titles)
    assert "| product | $12.35 | 100.0 % | 1,234 | - | - | ! 123.5 % | 0 |" in text
    assert "- product spent $12.35, 123.5 % of its plan of $10.00." in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<script>&", r"\<script\>&amp;"),
        ("[x](http://y)", r"\[x\](http://y)"),
        ("*a*_b_`c`", r"\*a\*\_b\_\`c\`"),
        ("two\nlines\r\n# more", r"two lines \# more"),
    ],
)
def test_no_name_is_markup_in_markdown(name: str, shown: str) -> None:
    text = to_markdown(named(name))

    assert f"| {shown} | 3 | $12.35 |" in text.splitlines()


def test_markdown_of_an_empty_span_says_so() -> None:
    assert to_markdown(EMPTY) == "There were no calls in 2026-10 (UTC).\n"


def test_html_needs_nothing_else() -> None:
    page = to_html(FULL)

    assert page.count("<svg") >= 2
    assert not re.search(r"<link|<script|<img|<iframe|url\(|@import|\ssrc=|\sstyle=", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    titles = [line for line in TABLE.splitlines() if line and not line.startswith(" ")][13:]
    assert all(f"<h2>{title}</h2>" in page for title in titles)


def test_html_marks_what_is_over_its_plan() -> None:
    (row,) = re.findall(r'<tr class="flagged">(?:(?!</tr>).)*product.*?</tr>', to_html(FULL))

    assert "! 123.5 %" in row


def test_no_name_is_markup_in_html() -> None:
    name = "</style><script>alert(1)</script>&"
    days = {(date(2026, 10, 1), name): SPEND}

    page = to_html(replace(named(name), days=days))

    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("</style>") == 1


def test_html_of_an_empty_span_says_so() -> None:
    page = to_html(EMPTY)

    assert "There were no calls in 2026-10 (UTC)." in page
    assert "<svg" not in page


def test_what_is_for_people_speaks_their_language() -> None:
    with translation.override("ar"):
        page = to_html(FULL)

    assert '<html lang="ar" dir="rtl">' in page


def test_a_long_range_has_no_chart_of_days() -> None:
    year = replace(FULL, until=datetime(2027, 10, 1, tzinfo=UTC))

    assert "<svg" not in to_html(year)


def test_only_the_latest_weeks_stand_beside_each_other() -> None:
    first = FULL.weeks[0].weeks[0]
    days = [date(2026, 8, 1) + timedelta(days=7 * number) for number in range(9)]
    weeks = tuple(replace(first, since=day, until=day + timedelta(days=7)) for day in days)
    long = replace(FULL, weeks=(replace(FULL.weeks[0], weeks=weeks),))

    assert "09-26/02" in to_table(long)
    assert "08-22/28" not in to_table(long)
    assert len(to_data(long)["weeks"]) == 9


def test_a_narrow_report_says_what_it_is_about() -> None:
    span = replace(OCTOBER, feature="chat", model="claude-x", tag=("plan", "free"))

    text = to_table(replace(FULL, span=span, total=replace(FULL.total, refused=None)))

    title = "AI spend in 2026-10 (UTC), chat, claude-x, plan=free only"
    assert text.startswith(f"{title}\n{'=' * len(title)}\n")
    assert "\nBudget " not in text
    assert "\nRefused " not in text
