"""A reservation is booked once, however often and in whatever order that is tried."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from ai_budget.ledger import base as ledgers
from ai_budget.policy.limits import Quota
from ai_budget.values import (
    SITE,
    Charge,
    Limit,
    Reservation,
    Settlement,
    Status,
    Usage,
)
from tests.ledger.conftest import Clock
from tests.ledger.given import (
    NOON,
    RELEASED,
    estimated,
    limit,
    limits_of,
    reserve,
    row,
    settle,
    settled,
    spent_held_calls,
    sums_of_calls,
    sums_of_windows,
)

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("clock")]

WHO = Charge(feature="chat", user_id=7, subject="acme")
EVERYWHERE: list[Limit] = limits_of(
    WHO, daily=1_000, quota=Quota(daily_calls=9), category="support"
)


def reserved(nanousd: int = 100, *, calls: int = 1) -> Reservation:
    return reserve(EVERYWHERE, nanousd, calls=calls, charge=WHO, category="support")


def everywhere() -> tuple[int, int, int]:
    """Spent, held and calls, the same in every balance of the attempt."""
    assert sums_of_windows() == sums_of_calls()
    (sums,) = {spent_held_calls(of) for of in EVERYWHERE}
    return sums


def booked(reservation: Reservation) -> tuple[str, int | None]:
    found = row(reservation)
    return found.status, found.cost_nanousd


# Once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [0, 1, 60, 100])
def test_settling_books_the_cost_and_gives_back_the_rest(cost: int) -> None:
    reservation = reserved(100)

    settle(reservation, settled(cost))

    assert everywhere() == (cost, 0, 1)
    assert booked(reservation) == ("settled", cost)


def test_a_cost_above_the_bound_is_booked_as_it_is() -> None:
    """It must not happen; where it does, the truth is worth more than the limit."""
    settle(reserved(100), settled(2_000))

    assert everywhere() == (2_000, 0, 1)


def test_an_estimate_is_booked_like_a_cost() -> None:
    reservation = reserved(100)

    settle(reservation, estimated(100))

    assert everywhere() == (100, 0, 1)
    assert booked(reservation) == ("estimated", 100)


def test_releasing_gives_everything_back_and_the_call_too() -> None:
    reservation = reserved(100)

    ledgers.current().release(reservation, RELEASED)

    assert everywhere() == (0, 0, 0)
    assert booked(reservation) == ("released", 0)


def test_releasing_a_repeat_gives_back_no_call() -> None:
    reserved(100)
    repeat = reserved(100, calls=0)

    settle(repeat, RELEASED)

    assert everywhere() == (0, 100, 1)


def test_others_in_flight_keep_what_they_hold() -> None:
    reserved(30)

    settle(reserved(100), settled(60))

    assert everywhere() == (60, 30, 2)


def test_what_is_settled_makes_room() -> None:
    for _ in range(5):
        settle(reserve([limit(180)], 100), settled(20))

    assert spent_held_calls(limit(180)) == (100, 0, 5)


def test_what_is_booked_is_booked_in_the_window_of_the_reservation(clock: Clock) -> None:
    reservation = reserve([limit(None)], 100)
    clock.pass_by(timedelta(days=1))

    settle(reservation, settled(60))

    assert spent_held_calls(limit(None)) == (60, 0, 1)
    assert spent_held_calls(limit(None, at=NOON + timedelta(days=1))) == (0, 0, 0)


def test_a_limit_that_was_lowered_changes_nothing_for_what_is_held() -> None:
    reservation = reserve([limit(100), limit(100, SITE)], 100)

    settle(reservation, settled(100))

    assert spent_held_calls(limit(5)) == (100, 0, 1)


# Again -------------------------------------------------------------------------------------------

Step = Callable[[Reservation], None]


def as_settled(cost: int) -> Step:
    return lambda reservation: settle(reservation, settled(cost))


def as_estimated(cost: int) -> Step:
    return lambda reservation: settle(reservation, estimated(cost))


def as_released(reservation: Reservation) -> None:
    settle(reservation, RELEASED)


@pytest.mark.parametrize(
    ("first", "second", "sums", "row_says"),
    [
        pytest.param(as_settled(60), as_settled(60), (60, 0, 1), ("settled", 60), id="twice"),
        pytest.param(
            as_settled(60), as_settled(5), (60, 0, 1), ("settled", 60), id="the-first-stands"
        ),
        pytest.param(
            as_settled(60), as_released, (60, 0, 1), ("settled", 60), id="release-after-settle"
        ),
        pytest.param(
            as_settled(60),
            as_estimated(100),
            (60, 0, 1),
            ("settled", 60),
            id="estimate-after-settle",
        ),
        pytest.param(as_released, as_released, (0, 0, 0), ("released", 0), id="released-twice"),
        pytest.param(
            as_released, as_settled(60), (0, 0, 0), ("released", 0), id="settle-after-release"
        ),
        pytest.param(
            as_released, as_estimated(60), (0, 0, 0), ("released", 0), id="estimate-after-release"
        ),
        pytest.param(
            as_estimated(100),
            as_settled(60),
            (60, 0, 1),
            ("settled", 60),
            id="the-truth-corrects-down",
        ),
        pytest.param(
            as_estimated(100),
            as_settled(140),
            (140, 0, 1),
            ("settled", 140),
            id="the-truth-corrects-up",
        ),
        pytest.param(
            as_estimated(100),
            as_settled(100),
            (100, 0, 1),
            ("settled", 100),
            id="the-truth-confirms",
        ),
        pytest.param(
            as_estimated(100),
            as_released,
            (0, 0, 0),
            ("released", 0),
            id="it-never-left-after-all",
        ),
        pytest.param(
            as_estimated(100),
            as_estimated(60),
            (100, 0, 1),
            ("estimated", 100),
            id="the-first-estimate-stands",
        ),
    ],
)
def test_what_comes_second(
    first: Step, second: Step, sums: tuple[int, int, int], row_says: tuple[str, int]
) -> None:
    reservation = reserved(100)

    first(reservation)
    second(reservation)

    assert everywhere() == sums
    assert booked(reservation) == row_says


def test_a_correction_is_made_once() -> None:
    reservation = reserved(100)
    settle(reservation, estimated(100))

    for _ in range(2):
        settle(reservation, settled(60))

    assert everywhere() == (60, 0, 1)


def test_a_reservation_can_be_settled_by_another_process() -> None:
    """Only the row's number and what was taken matter, not the object."""
    reservation = reserved(100)
    copy = Reservation(
        id=reservation.id,
        attempt=reservation.attempt,
        amounts=reservation.amounts,
        balances=reservation.balances[::-1],
    )

    settle(copy, settled(60))
    settle(reservation, settled(60))

    assert everywhere() == (60, 0, 1)


def test_what_is_not_there_is_not_settled() -> None:
    reservation = reserved(100)
    missing = Reservation(
        id=reservation.id + 1,
        attempt=reservation.attempt,
        amounts=reservation.amounts,
        balances=reservation.balances,
    )

    settle(missing, settled(60))

    assert everywhere() == (0, 100, 1)


# What the row says -------------------------------------------------------------------------------


def test_the_row_has_all_that_was_used() -> None:
    reservation = reserved(100)
    usage = Usage(
        input_tokens=1,
        cache_write_5m_tokens=2,
        cache_write_1h_tokens=3,
        cache_read_tokens=4,
        output_tokens=5,
        thinking_tokens=6,
        web_searches=7,
        service_tier="priority",
    )

    settle(
        reservation,
        Settlement(
            status=Status.SETTLED,
            cost_nanousd=60,
            usage=usage,
            stop_reason="end_turn",
            request_id="req_1",
            latency_ms=850,
            first_token_ms=120,
        ),
    )

    found = row(reservation)
    assert (found.input_tokens, found.output_tokens, found.thinking_tokens) == (1, 5, 6)
    assert (
        found.cache_write_5m_tokens,
        found.cache_write_1h_tokens,
        found.cache_read_tokens,
    ) == (2, 3, 4)
    assert (found.web_searches, found.service_tier) == (7, "priority")
    assert (found.stop_reason, found.request_id) == ("end_turn", "req_1")
    assert (found.latency_ms, found.first_token_ms, found.error) == (850, 120, "")
    assert found.reserved_nanousd == 100


def test_the_row_says_when_it_was_settled(clock: Clock) -> None:
    reservation = reserved()
    clock.pass_by(timedelta(seconds=1.5))

    settle(reservation, settled(1))

    assert row(reservation).settled_at == NOON + timedelta(seconds=1.5)


def test_the_row_says_what_went_wrong() -> None:
    reservation = reserved()

    settle(reservation, estimated(100, error="APITimeoutError"))

    assert row(reservation).error == "APITimeoutError"


def test_words_that_are_too_long_are_cut() -> None:
    reservation = reserved()

    settle(
        reservation,
        settled(
            1,
            error="e" * 100,
            stop_reason="s" * 100,
            request_id="r" * 100,
            usage=Usage(service_tier="t" * 100),
        ),
    )

    found = row(reservation)
    assert [
        len(text) for text in (found.error, found.stop_reason, found.request_id, found.service_tier)
    ] == [64, 32, 64, 16]


def test_a_correction_says_what_was_used_after_all() -> None:
    reservation = reserved(100)
    settle(reservation, estimated(100, error="deadline passed"))

    settle(reservation, settled(60, usage=Usage(output_tokens=5), request_id="req_1"))

    found = row(reservation)
    assert (found.error, found.output_tokens, found.request_id) == ("", 5, "req_1")


def test_speed_and_geography_are_what_the_answer_says() -> None:
    reservation = reserve([limit(None)], speed="fast", inference_geo="")

    settle(reservation, settled(1, usage=Usage(speed="standard", inference_geo="us")))

    assert (row(reservation).speed, row(reservation).inference_geo) == ("standard", "us")


def test_speed_and_geography_stay_as_asked_where_the_answer_is_silent() -> None:
    reservation = reserve([limit(None)], speed="fast", inference_geo="us")

    settle(reservation, settled(1))

    assert (row(reservation).speed, row(reservation).inference_geo) == ("fast", "us")
