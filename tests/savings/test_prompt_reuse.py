from __future__ import annotations

from dataclasses import replace

from ai_budget.savings.prompt_cache import Decision, Marked
from ai_budget.savings.prompt_reuse import (
    HOUR,
    MINUTES,
    Entry,
    Mark,
    Plan,
    Position,
    Prices,
    Reuse,
    Sighting,
    at_most,
    look,
    plan,
)
from ai_budget.values import Usage
from tests.savings.prompt_api import MINIMUM, PER

AT = 1_800_000_000.0
PRICES = Prices(rates=(PER,))
RICH = 10**12


def row(*tokens: int) -> list[Position]:
    return [
        Position(fingerprint=f"p{index}", expected=count, most=4 * count)
        for index, count in enumerate(tokens)
    ]


def seen(count: int, *, times: int = 4) -> list[Sighting]:
    return [Sighting(at=AT, times=times, kind=f"{times}mmr") for _ in range(count)]


def alive(ttl: str = MINUTES) -> Entry:
    return Entry(until=AT + 100, ttl=ttl)


def planned(
    positions: list[Position],
    entries: list[Entry | None],
    *,
    sightings: list[Sighting] | None = None,
    afford: int = RICH,
) -> Plan:
    return plan(
        positions,
        sightings or seen(len(positions)),
        entries,
        reuse=Reuse(),
        prices=PRICES,
        minimum=MINIMUM,
        afford_nanousd=afford,
        at=AT,
    )


def test_what_comes_again_and_again_is_written() -> None:
    found = planned(row(2_000, 2_000), [None, None])
    assert (found.read, found.written) == (0, 2)


def test_what_was_never_seen_before_is_not() -> None:
    new = [Sighting(at=AT, times=0, kind="0ml2") for _ in range(2)]
    assert planned(row(2_000, 2_000), [None, None], sightings=new) == Plan()


def test_what_is_alive_is_read_for_nothing() -> None:
    found = planned(row(2_000, 2_000), [None, alive()], afford=0)
    assert found == Plan(marks=(Mark(index=1, ttl=MINUTES),), read=2)


def test_only_what_is_beyond_the_part_that_is_read_is_set_aside() -> None:
    found = planned(row(2_000, 3_000), [alive(), None])
    assert (found.read, found.written) == (1, 1)
    ttl = found.marks[-1].ttl
    assert found.most_nanousd == PRICES.premium_nanousd(12_000, ttl)


def test_an_entry_that_has_expired_is_not_read() -> None:
    gone = Entry(until=AT, ttl=MINUTES)
    assert planned(row(2_000, 2_000), [gone, gone], afford=0) == Plan()


def test_an_entry_that_nobody_has_booked_is_not_read() -> None:
    asked = Entry(until=AT + 100, ttl=MINUTES, asked_at=AT - 50)
    assert planned(row(2_000, 2_000), [asked, None], afford=0) == Plan()


def test_an_entry_below_the_minimum_is_none() -> None:
    assert planned(row(500, 2_000), [alive(), None], afford=0) == Plan()


def test_what_cannot_be_paid_whole_is_written_in_part() -> None:
    whole = planned(row(*[1_000] * 8), [None] * 8)
    part = planned(row(*[1_000] * 8), [None] * 8, afford=whole.most_nanousd // 2)
    assert 0 < part.written < whole.written == 8
    assert part.most_nanousd <= whole.most_nanousd // 2


def test_no_more_than_four_marks_are_set() -> None:
    kinds = [replace(one, kind=f"{4 - index % 2}mmr") for index, one in enumerate(seen(12))]
    entries = [alive() if index < 5 else None for index in range(12)]
    found = planned(row(*[2_000] * 12), entries, sightings=kinds)
    assert len(found.marks) == 4
    assert {4, 11} <= {mark.index for mark in found.marks}


def test_an_hours_mark_never_comes_after_one_of_minutes() -> None:
    reuse = Reuse(at=AT, kinds={"4m": [10**6, 0, 10**6, 10**6], "1m": [10**6, 10**6, 10**6, 10**6]})
    sightings = [*seen(2), *seen(2, times=1)]
    found = plan(
        row(*[2_000] * 4),
        sightings,
        [None] * 4,
        reuse=reuse,
        prices=PRICES,
        minimum=MINIMUM,
        afford_nanousd=RICH,
        at=AT,
    )
    ttls = [mark.ttl for mark in found.marks]
    assert HOUR in ttls
    assert ttls == sorted(ttls)  # "1h" before "5m"


def test_a_premium_is_that_of_the_dearest_rates_that_may_apply() -> None:
    dear = replace(PER, input=4_000_000_000, cache_write_5m=5_000_000_000)
    assert Prices(rates=(PER, dear)).premium_nanousd(1_000, MINUTES) == 1_000_000
    assert Prices(rates=(PER,), geo=(11, 10)).premium_nanousd(1_000, MINUTES) == 550_000


def test_a_position_is_as_good_as_new_when_it_was_seen_too_long_ago() -> None:
    positions, reuse = row(2_000), Reuse()
    first = look(positions, [None], reuse, AT)
    assert look(positions, first, reuse, AT + 7_000)[0].times == 1
    assert look(positions, first, reuse, AT + 7_300)[0].times == 0


def test_shares_follow_what_came_again() -> None:
    positions, reuse, at = row(2_000), Reuse(), AT
    prior = reuse.shares("1mmr", 2_000)
    for number in range(60):  # each is seen a second time, and never a third
        first = look([replace(positions[0], fingerprint=f"{number}")], [None], reuse, at)
        look(positions, first, reuse, at + 30)
        at += 60
    look(positions, [None], reuse, at + 3_000)
    soon, _ = reuse.shares("0ml0", 2_000)
    assert soon > 0.8
    assert reuse.shares("1mmr", 2_000)[0] < prior[0] / 2


# What is believed of the API's entries, once an answer has been booked


def entries_after(usage: Usage, *marked: Marked) -> dict[str, str]:
    decision = Decision(plan=Plan(), feature="chat", minimum=MINIMUM, at=AT, marked=marked)
    return {key.rsplit(":", 1)[1]: ttl for key, ttl in decision._entries(usage)}


def test_a_prefix_that_may_be_too_short_is_not_believed_to_be_cached() -> None:
    first = Marked(name="a", ttl=MINUTES, known="", beyond=4_000)
    last = Marked(name="b", ttl=MINUTES, known="", beyond=0)
    assert entries_after(Usage(cache_write_5m_tokens=5_000), first, last) == {"b": MINUTES}
    assert entries_after(Usage(cache_write_5m_tokens=5_024), first, last).keys() == {"a", "b"}


def test_nothing_is_believed_where_nothing_was_read_or_written() -> None:
    assert (
        entries_after(Usage(input_tokens=500), Marked(name="a", ttl=HOUR, known="", beyond=0)) == {}
    )


def test_an_hour_is_believed_only_where_an_hour_was_billed() -> None:
    marked = Marked(name="a", ttl=HOUR, known="", beyond=0)
    assert entries_after(Usage(cache_write_1h_tokens=5_000), marked) == {"a": HOUR}
    assert entries_after(Usage(cache_write_5m_tokens=5_000), marked) == {"a": MINUTES}
    assert entries_after(Usage(cache_read_tokens=5_000), marked) == {"a": MINUTES}


def test_of_two_marks_for_an_hour_only_the_last_is_sure_to_have_been_written_so() -> None:
    """Another request may have written the first for five minutes meanwhile."""
    first = Marked(name="a", ttl=HOUR, known="", beyond=1_000)
    last = Marked(name="b", ttl=HOUR, known="", beyond=0)
    usage = Usage(cache_read_tokens=4_000, cache_write_1h_tokens=1_000)
    assert entries_after(usage, first, last) == {"a": MINUTES, "b": HOUR}


def test_what_is_read_keeps_its_lifetime_and_what_is_lost_is_written_anew() -> None:
    known = Marked(name="a", ttl=MINUTES, known=HOUR, beyond=0)
    assert entries_after(Usage(cache_read_tokens=5_000), known) == {"a": HOUR}
    assert entries_after(Usage(cache_write_5m_tokens=5_000), known) == {"a": MINUTES}


def test_a_prefix_is_taken_for_no_longer_than_a_prompt_that_began_with_it() -> None:
    positions = row(1_000, 500)

    shorter = at_most(positions, 1, 1_200)

    assert [one.most for one in shorter] == [1_200, 2_000]
    assert [one.expected for one in shorter] == [1_000, 500]


def test_a_plan_says_that_more_would_pay_than_can_be_risked() -> None:
    rich, poor = (planned(row(4_000), [None], afford=afford) for afford in (RICH, 0))

    assert (rich.wished, rich.is_short) == (1, False)
    assert (poor.wished, poor.is_short, poor.marks) == (1, True, ())
