"""Which model answers: the highest rung that is reached and whose model takes the request."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.periods import Period
from ai_budget.policy.ladder import choose_model, percent_used
from ai_budget.policy.limits import Rung
from ai_budget.values import SITE, BalanceKey, Balances, Limit

AT = datetime(2026, 5, 4, 12, tzinfo=UTC)
OPUS, SONNET, HAIKU = "opus", "sonnet", "haiku"
LADDER = (Rung(at_percent=50, model=SONNET), Rung(at_percent=80, model=HAIKU))


def limit(scope: str, amount: int | None, period: Period = Period.DAY) -> Limit:
    return Limit(scope=scope, amount=amount, window=periods.window(period, AT, ZoneInfo("UTC")))


def balance(of: Limit, *, spent: int = 0, held: int = 0) -> dict[BalanceKey, Balances]:
    return {of.key: Balances(spent_nanousd=spent, held_nanousd=held)}


# How much is used --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "held", "percent"),
    [
        (0, 0, 0),
        (49, 0, 49),
        (0, 49, 49),
        (30, 20, 50),
        (100, 0, 100),
        (150, 0, 150),
    ],
)
def test_what_is_spent_and_what_is_held_are_used(spent: int, held: int, percent: int) -> None:
    of = limit("feature:chat", 100)

    assert percent_used([of], balance(of, spent=spent, held=held)) == percent


def test_a_percent_that_is_not_whole_is_not_reached() -> None:
    of = limit("feature:chat", 1_000_000_000)

    assert percent_used([of], balance(of, spent=499_999_999)) == 49


@pytest.mark.parametrize("fullest", ["feature:chat", "category:support", SITE])
def test_the_fullest_limit_counts(fullest: str) -> None:
    limits = [limit(scope, 100) for scope in ("feature:chat", "category:support", SITE)]
    balances = {of.key: Balances(spent_nanousd=70 if of.scope == fullest else 10) for of in limits}

    assert percent_used(limits, balances) == 70


@pytest.mark.parametrize(("day", "month", "percent"), [(90, 10, 90), (10, 90, 90)])
def test_days_and_months_count_alike(day: int, month: int, percent: int) -> None:
    limits = [limit(SITE, 100, Period.DAY), limit(SITE, 1_000, Period.MONTH)]
    balances = balance(limits[0], spent=day) | balance(limits[1], spent=month * 10)

    assert percent_used(limits, balances) == percent


def test_a_limit_of_nothing_is_used_up() -> None:
    assert percent_used([limit(SITE, 0)], {}) == 100


def test_a_balance_that_was_never_counted_in_is_empty() -> None:
    assert percent_used([limit(SITE, 100)], {}) == 0


def test_without_a_limit_nothing_is_used() -> None:
    of = limit(SITE, None)

    assert percent_used([of], balance(of, spent=5)) == 0
    assert percent_used([], {}) == 0


# Which model -------------------------------------------------------------------------------------


def chosen(requested: str, percent: int, *, takes: Collection[str] = (SONNET, HAIKU)) -> str:
    choice = choose_model(requested, LADDER, percent, takes=lambda model: model in takes)
    assert choice.percent == percent
    assert bool(choice.reason) == (choice.model != requested)
    return choice.model


@pytest.mark.parametrize(
    ("percent", "model"),
    [(0, OPUS), (49, OPUS), (50, SONNET), (79, SONNET), (80, HAIKU), (100, HAIKU), (250, HAIKU)],
)
def test_the_highest_rung_that_is_reached_answers(percent: int, model: str) -> None:
    assert chosen(OPUS, percent) == model


def test_rungs_stand_in_any_order() -> None:
    choice = choose_model(OPUS, LADDER[::-1], 90, takes=lambda model: True)

    assert choice.model == HAIKU


def test_the_choice_says_why() -> None:
    choice = choose_model(OPUS, LADDER, 85, takes=lambda model: True)

    assert choice.reason == "rung 80 % at 85 %"


def test_without_a_ladder_the_request_is_answered_as_it_was_made() -> None:
    choice = choose_model(OPUS, (), 100, takes=lambda model: True)

    assert (choice.model, choice.reason) == (OPUS, "")


def test_a_rung_whose_model_does_not_take_the_request_is_skipped() -> None:
    assert chosen(OPUS, 90, takes=[SONNET]) == SONNET


def test_where_no_rung_takes_the_request_it_is_answered_as_it_was_made() -> None:
    assert chosen(OPUS, 90, takes=[]) == OPUS


def test_a_rung_that_is_not_reached_does_not_stand_in_for_one_that_is() -> None:
    assert chosen(OPUS, 60, takes=[HAIKU]) == OPUS


@pytest.mark.parametrize("percent", [50, 79])
def test_a_request_for_the_rungs_own_model_stays(percent: int) -> None:
    assert chosen(SONNET, percent) == SONNET


def test_a_request_for_a_rungs_model_goes_down_with_the_next() -> None:
    assert chosen(SONNET, 80) == HAIKU


def test_a_request_for_a_rungs_model_stays_where_the_next_does_not_take_it() -> None:
    assert chosen(SONNET, 90, takes=[SONNET]) == SONNET


@pytest.mark.parametrize("percent", [0, 50, 79, 80, 100])
def test_a_request_for_the_cheapest_is_never_answered_by_a_dearer(percent: int) -> None:
    assert chosen(HAIKU, percent) == HAIKU


@given(
    st.sampled_from([OPUS, SONNET, HAIKU]),
    st.integers(0, 200),
    st.integers(0, 200),
    st.sets(st.sampled_from([SONNET, HAIKU])),
)
def test_the_more_is_used_the_cheaper_is_the_model(
    requested: str, less: int, more: int, takes: set[str]
) -> None:
    """The rungs of a ladder go down in price."""
    down = [OPUS, SONNET, HAIKU]
    less, more = sorted((less, more))

    models = [chosen(requested, percent, takes=takes) for percent in (0, less, more)]

    assert sorted(models, key=down.index) == models
