"""Windows are true: half-open, without gap or overlap, in every zone and on every odd day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from functools import partial
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ai_budget import periods
from ai_budget.periods import Period, Window

BERLIN = ZoneInfo("Europe/Berlin")
NEW_YORK = ZoneInfo("America/New_York")
CAIRO = ZoneInfo("Africa/Cairo")  # its clocks jump from midnight to one o'clock
BEIRUT = ZoneInfo("Asia/Beirut")  # so do these
HAVANA = ZoneInfo("America/Havana")  # its clocks go back from one o'clock to midnight
KATHMANDU = ZoneInfo("Asia/Kathmandu")  # UTC+05:45
APIA = ZoneInfo("Pacific/Apia")  # had no 30 December 2011

ODD = (BERLIN, NEW_YORK, CAIRO, BEIRUT, HAVANA, KATHMANDU, APIA, ZoneInfo("Australia/Lord_Howe"))
zones = st.sampled_from(ODD) | st.sampled_from(sorted(available_timezones())).map(ZoneInfo)
# Until 2011 a few zones changed their clocks one minute after midnight; none does since.
instants = st.datetimes(
    min_value=datetime(2011, 12, 1),  # noqa: DTZ001 - hypothesis adds the zone itself
    max_value=datetime(2045, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
)
lengths = st.sampled_from(Period)


def hours(window: Window) -> float:
    return (window.end - window.start) / timedelta(hours=1)


def noon(year: int, month: int, day: int, zone: ZoneInfo) -> datetime:
    return datetime(year, month, day, 12, tzinfo=zone)


# Half-open ---------------------------------------------------------------------------------------


def test_a_window_contains_its_start() -> None:
    window = periods.day(noon(2026, 5, 4, BERLIN), BERLIN)

    assert window.start in window


def test_a_window_does_not_contain_its_end() -> None:
    window = periods.day(noon(2026, 5, 4, BERLIN), BERLIN)

    assert window.end not in window


def test_the_last_microsecond_belongs_to_the_window() -> None:
    window = periods.month(noon(2026, 5, 4, BERLIN), BERLIN)

    assert window.end - timedelta(microseconds=1) in window


def test_the_bounds_are_kept_in_utc() -> None:
    window = periods.day(noon(2026, 5, 4, BERLIN), BERLIN)

    assert (window.start.tzinfo, window.end.tzinfo) == (UTC, UTC)
    assert window.start == datetime(2026, 5, 3, 22, tzinfo=UTC)


# A window for every instant ----------------------------------------------------------------------


@given(lengths, instants, zones)
@example(Period.DAY, datetime(2011, 12, 30, 10, tzinfo=UTC), APIA)
@example(Period.DAY, datetime(2024, 4, 25, 22, tzinfo=UTC), CAIRO)
@example(Period.DAY, datetime(2026, 11, 1, 4, 30, tzinfo=UTC), HAVANA)
@example(Period.DAY, datetime(2026, 11, 1, 5, 30, tzinfo=UTC), HAVANA)
def test_every_instant_is_in_its_own_window(period: Period, at: datetime, zone: ZoneInfo) -> None:
    assert at in periods.window(period, at, zone)


@given(lengths, instants, zones)
@example(Period.DAY, datetime(2011, 12, 30, 9, tzinfo=UTC), APIA)
def test_the_next_window_begins_where_one_ends(
    period: Period, at: datetime, zone: ZoneInfo
) -> None:
    window = periods.window(period, at, zone)

    following = periods.window(period, window.end, zone)

    assert following.start == window.end
    assert following.first_day > window.first_day


@given(lengths, instants, zones)
@example(Period.DAY, datetime(2011, 12, 30, 10, tzinfo=UTC), APIA)
def test_the_window_before_ends_where_one_begins(
    period: Period, at: datetime, zone: ZoneInfo
) -> None:
    window = periods.window(period, at, zone)

    before = periods.window(period, window.start - timedelta(microseconds=1), zone)

    assert before.end == window.start


@given(instants, zones)
def test_the_days_of_a_month_are_the_month(at: datetime, zone: ZoneInfo) -> None:
    month = periods.month(at, zone)

    days = periods.days(month.first_day, periods.next_month(month.first_day), zone)

    assert (days[0].start, days[-1].end) == (month.start, month.end)
    assert all(one.end == other.start for one, other in pairwise(days))


@given(instants, zones)
def test_a_day_is_in_one_month(at: datetime, zone: ZoneInfo) -> None:
    day, month = periods.day(at, zone), periods.month(at, zone)

    assert month.start <= day.start
    assert day.end <= month.end


@given(lengths, instants, zones, st.integers(-14, 14))
def test_the_zone_in_which_an_instant_is_written_changes_nothing(
    period: Period, at: datetime, zone: ZoneInfo, offset: int
) -> None:
    elsewhere = at.astimezone(timezone(timedelta(hours=offset)))

    assert periods.window(period, elsewhere, zone) == periods.window(period, at, zone)


# Days on which clocks change ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "on", "length"),
    [
        pytest.param(BERLIN, date(2026, 3, 29), 23, id="Berlin-spring"),
        pytest.param(BERLIN, date(2026, 10, 25), 25, id="Berlin-autumn"),
        pytest.param(BERLIN, date(2026, 10, 26), 24, id="Berlin-the-day-after"),
        pytest.param(NEW_YORK, date(2026, 3, 8), 23, id="New-York-spring"),
        pytest.param(NEW_YORK, date(2026, 11, 1), 25, id="New-York-autumn"),
        pytest.param(CAIRO, date(2024, 4, 26), 23, id="Cairo-no-midnight"),
        pytest.param(CAIRO, date(2024, 10, 31), 25, id="Cairo-autumn"),
        pytest.param(BEIRUT, date(2026, 3, 29), 23, id="Beirut-no-midnight"),
        pytest.param(BEIRUT, date(2026, 10, 24), 25, id="Beirut-autumn"),
        pytest.param(HAVANA, date(2026, 3, 8), 23, id="Havana-no-midnight"),
        pytest.param(HAVANA, date(2026, 11, 1), 25, id="Havana-two-midnights"),
        pytest.param(ZoneInfo("Australia/Lord_Howe"), date(2026, 4, 5), 24.5, id="half-an-hour"),
        pytest.param(KATHMANDU, date(2026, 3, 29), 24, id="Kathmandu"),
    ],
)
def test_a_day_has_the_hours_it_has(zone: ZoneInfo, on: date, length: float) -> None:
    assert hours(periods.day(noon(on.year, on.month, on.day, zone), zone)) == length


def test_a_day_without_a_midnight_begins_at_the_jump() -> None:
    jump = datetime(2024, 4, 25, 22, tzinfo=UTC)

    day = periods.day(jump, CAIRO)

    assert (day.first_day, day.start) == (date(2024, 4, 26), jump)
    assert day.start.astimezone(CAIRO).hour == 1


def test_a_day_with_two_midnights_begins_at_the_first() -> None:
    day = periods.day(noon(2026, 11, 1, HAVANA), HAVANA)

    assert day.start == datetime(2026, 11, 1, 4, tzinfo=UTC)
    assert day.start + timedelta(hours=1) in day  # the second midnight


def test_the_hour_before_clocks_go_back_over_midnight_comes_twice_on_the_old_day() -> None:
    first, second = (
        datetime(2024, 10, 31, 23, 30, tzinfo=CAIRO, fold=fold).astimezone(UTC) for fold in (0, 1)
    )

    assert second - first == timedelta(hours=1)
    assert periods.day(first, CAIRO) == periods.day(second, CAIRO)


def test_a_quarter_hour_offset_is_kept() -> None:
    assert periods.midnight(date(2026, 5, 4), KATHMANDU) == datetime(2026, 5, 3, 18, 15, tzinfo=UTC)


def test_a_skipped_day_is_empty() -> None:
    (skipped,) = periods.days(date(2011, 12, 30), date(2011, 12, 31), APIA)

    assert skipped.start == skipped.end
    assert skipped.start not in skipped


def test_the_day_after_a_skipped_one_begins_where_the_day_before_ended() -> None:
    before = periods.day(noon(2011, 12, 29, APIA), APIA)
    after = periods.day(noon(2011, 12, 31, APIA), APIA)

    assert before.end == after.start


@pytest.mark.parametrize(
    ("zone", "on", "length"),
    [
        pytest.param(BERLIN, date(2026, 3, 1), 31 * 24 - 1, id="spring"),
        pytest.param(BERLIN, date(2026, 10, 1), 31 * 24 + 1, id="autumn"),
        pytest.param(APIA, date(2011, 12, 1), 30 * 24, id="a-skipped-day"),
    ],
)
def test_a_month_has_the_hours_of_its_days(zone: ZoneInfo, on: date, length: float) -> None:
    assert hours(periods.month(noon(on.year, on.month, on.day, zone), zone)) == length


# The calendar ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "days"),
    [
        (date(2026, 1, 1), 31),
        (date(2026, 2, 1), 28),
        (date(2028, 2, 1), 29),
        (date(2100, 2, 1), 28),
        (date(2000, 2, 1), 29),
        (date(2026, 4, 1), 30),
        (date(2026, 12, 1), 31),
    ],
)
def test_a_month_has_its_days(first: date, days: int) -> None:
    month = periods.month(noon(first.year, first.month, 15, KATHMANDU), KATHMANDU)

    assert (month.first_day, hours(month)) == (first, days * 24)


@pytest.mark.parametrize("period", Period)
def test_the_year_ends_at_midnight_of_the_zone(period: Period) -> None:
    window = periods.window(period, noon(2026, 12, 31, KATHMANDU), KATHMANDU)

    assert window.end == datetime(2026, 12, 31, 18, 15, tzinfo=UTC)
    assert periods.window(period, window.end, KATHMANDU).first_day == date(2027, 1, 1)


def test_one_instant_is_on_different_days_in_different_zones() -> None:
    at = datetime(2026, 1, 31, 23, 30, tzinfo=UTC)

    assert periods.day(at, BERLIN).first_day == date(2026, 2, 1)
    assert periods.day(at, NEW_YORK).first_day == date(2026, 1, 31)
    assert periods.month(at, BERLIN).first_day != periods.month(at, NEW_YORK).first_day


@pytest.mark.parametrize("day", [1, 15, 28, 31])
def test_the_month_after_december_is_january(day: int) -> None:
    assert periods.next_month(date(2026, 12, day)) == date(2027, 1, 1)


def test_the_month_after_the_last_of_january_is_february() -> None:
    assert periods.next_month(date(2026, 1, 31)) == date(2026, 2, 1)


@pytest.mark.parametrize("day", [1, 31])
def test_the_month_before_march_is_february(day: int) -> None:
    assert periods.previous_month(date(2026, 3, day)) == date(2026, 2, 1)


def test_the_month_before_january_is_december() -> None:
    assert periods.previous_month(date(2026, 1, 15)) == date(2025, 12, 1)


def test_days_end_before_their_last() -> None:
    days = periods.days(date(2028, 2, 28), date(2028, 3, 1), BERLIN)

    assert [day.first_day for day in days] == [date(2028, 2, 28), date(2028, 2, 29)]


def test_there_are_no_days_backwards() -> None:
    assert periods.days(date(2026, 5, 4), date(2026, 5, 1), BERLIN) == []


@pytest.mark.parametrize(
    ("period", "shown"), [(Period.DAY, "2026-05-04"), (Period.MONTH, "2026-05")]
)
def test_a_window_is_shown_by_its_date(period: Period, shown: str) -> None:
    assert str(periods.window(period, noon(2026, 5, 4, BERLIN), BERLIN)) == shown


# The clock ---------------------------------------------------------------------------------------


def test_the_present_is_in_utc() -> None:
    before = datetime.now(UTC)

    assert before <= periods.now() <= datetime.now(UTC)
    assert periods.now().tzinfo is UTC


def test_an_overridden_clock_tells_the_time() -> None:
    then = datetime(2026, 5, 4, 12, tzinfo=UTC)

    with periods.override_clock(lambda: then):
        assert (periods.now(), periods.is_overridden()) == (then, True)


def test_the_clock_comes_back() -> None:
    with periods.override_clock(partial(datetime, 2020, 1, 1, tzinfo=UTC)):
        pass

    assert periods.now().year > 2020
    assert not periods.is_overridden()


def test_the_clock_comes_back_after_an_error() -> None:
    with (
        pytest.raises(RuntimeError),
        periods.override_clock(partial(datetime, 2020, 1, 1, tzinfo=UTC)),
    ):
        raise RuntimeError

    assert not periods.is_overridden()


def test_overrides_of_the_clock_nest() -> None:
    first, second = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)

    with periods.override_clock(lambda: first):
        with periods.override_clock(lambda: second):
            assert periods.now() == second
        assert periods.now() == first


def test_durations_only_ever_go_forward() -> None:
    first = periods.monotonic()

    assert periods.monotonic() >= first
