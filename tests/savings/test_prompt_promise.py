"""On no trace is the bill of "auto" more than 1 % above not caching at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.core.cache import cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai_budget.savings.prompt_reuse import Position
from tests.depth import deep, some_of
from tests.savings.prompt_api import Api, Sent

BEGINS = 1_800_000_000.0
MOST = 1.01


@pytest.fixture(autouse=True)
def _large_memory(settings: Any) -> Iterator[None]:
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
            "LOCATION": "promise",
            "OPTIONS": {"MAX_ENTRIES": 1_000_000},
        }
    }
    cache.clear()
    yield
    cache.clear()


def prompt(*names: str, tokens: int = 2_000, bytes_per_token: int = 4) -> list[Position]:
    """A prompt whose positions have these names, each with what comes before it."""
    return [
        Position(
            fingerprint="/".join(names[: index + 1]).replace(" ", "_"),
            expected=tokens,
            most=tokens * bytes_per_token,
            part="e" if index == len(names) - 1 else "m",
        )
        for index in range(len(names))
    ]


def test_a_prefix_that_comes_again_is_paid_once_and_read_from_then_on() -> None:
    api = Api()
    sent = []
    for number in range(400):
        sent.append(api.send(prompt("system", f"question {number}"), at=BEGINS + 5 * number))
        sent[-1].book()
    assert all(one.usage.cache_read_tokens == 2_000 for one in sent[-200:])
    assert api.cost_nanousd < 0.7 * api.plain_nanousd
    assert api.worst <= MOST


def test_what_comes_every_ten_minutes_is_kept_for_an_hour() -> None:
    api = Api()
    for number in range(1_000):
        sent = api.send(prompt("system", f"question {number}"), at=BEGINS + 600 * number)
        sent.book()
    assert sent.decision is not None
    assert "1h" in {mark.ttl for mark in sent.decision.plan.marks} or (
        sent.usage.cache_read_tokens == 2_000
    )
    assert api.cost_nanousd < 0.75 * api.plain_nanousd


def test_unique_prompts_cost_what_they_cost_without_caching() -> None:
    api = Api()
    for number in range(500):
        api.send(prompt(f"system {number}", "question"), at=BEGINS + 5 * number).book()
    assert api.cost_nanousd == api.plain_nanousd


def test_an_adversary_who_never_returns_to_what_was_written_wins_one_percent_at_most() -> None:
    """Whatever is not written comes again at once, so that all looks worth writing."""
    api, at, number = Api(), BEGINS, 0
    written = 0
    for _ in range(3_000):
        at += 3
        sent = api.send(prompt(f"document {number}", "question"), at=at, output=100)
        sent.book()
        if sent.usage.cache_write_5m_tokens or sent.usage.cache_write_1h_tokens:
            written += 1
            number += 1
    assert written > 10  # it was tempted indeed
    assert api.worst <= MOST


@pytest.mark.parametrize(
    "pause", some_of([289.0, 290.0, 299.9, 300.0, 300.1, 3_589.0, 3_600.0], count=3)
)
def test_prefixes_that_come_at_the_edge_of_a_lifetime_break_no_promise(pause: float) -> None:
    api, at = Api(), BEGINS
    for number in range(1_500):
        at += 3 if number % 7 else pause
        api.send(prompt("system", f"question {number // 7}", "x"), at=at).book()
    assert api.worst <= MOST


def test_answers_that_are_never_booked_leave_what_was_set_aside_spent() -> None:
    api, at = Api(), BEGINS
    for number in range(2_000):
        at += 3
        sent = api.send(prompt("system", f"document {number // 2}", "x"), at=at)
        if number % 5:
            sent.book()
    assert api.worst <= MOST


@pytest.mark.parametrize(("pause", "read"), [(280, 1), (289.9, 1), (290.1, 0)])
def test_an_entry_counts_as_gone_a_little_before_it_is(pause: float, read: int) -> None:
    api, at = Api(), BEGINS
    for number in range(300):
        at += 5
        last = api.send(prompt("system", f"question {number}"), at=at)
        last.book()
    assert last.usage.cache_read_tokens
    sent = api.send(prompt("system", "another"), at=at + pause)
    assert sent.decision is not None
    assert sent.decision.plan.read == read


def test_what_is_shorter_than_the_part_that_was_read_is_not_taken_to_be_refreshed() -> None:
    """A conversation keeps its own prefix alive, and not the system prompt of all."""
    api, at = Api(), BEGINS
    for number in range(300):
        at += 5
        api.send(prompt("system", f"question {number}"), at=at).book()
    for turn in range(100):
        at += 10
        sent = api.send(prompt("system", "talk", *map(str, range(min(turn, 1)))), at=at)
        sent.book()
    assert sent.decision is not None
    assert sent.decision.plan.read > 1
    other = api.send(prompt("system", "another"), at=at + 5)
    assert other.decision is not None
    assert other.decision.plan.read == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.9, 2.1, 30, 150, 285, 289.9, 290.1, 299.9, 301, 1_800])
        | st.sampled_from([3_500.0, 3_589.9, 3_599.9, 3_601.0]),
        st.lists(st.integers(0, 2), min_size=1, max_size=6),  # which prefix
        st.sampled_from([0, 1, 2, 5, 9, None, "cancel"]),  # booked after so many more; or never
        st.floats(0.1, 60),  # seconds until the answer begins
    ),
    max_size=60,
)


@settings(
    max_examples=deep(200, else_=40),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS, earlier=st.sampled_from([0, 60, 250]), size=st.sampled_from([600, 3_000]))
def test_no_trace_costs_more_than_one_percent_above_not_caching(
    steps: list[tuple[float, list[int], int | str | None, float]], earlier: int, size: int
) -> None:
    cache.clear()
    api, at = Api(), BEGINS
    for number in range(
        earlier
    ):  # a past in which caching paid, so that there is something to lose
        at += 4
        api.send(prompt("w", f"n{number}", tokens=3_000), at=at).book()
    open_: list[tuple[int, Sent]] = []
    for count, (pause, path, booked, begins) in enumerate(steps):
        at += pause
        positions = prompt(*map(str, path), tokens=size)
        # Fewer or more than expected, and the same whoever sends the prefix.
        true = [one.most * (sum(map(ord, one.fingerprint)) % 5) // 4 for one in positions]
        sent = api.send(positions, at=at, tokens=true, begins=begins)
        if booked == "cancel":
            # Refused, so never billed: the API takes back nothing that it wrote, which only helps.
            api.cost_nanousd -= sent.cost_nanousd
            api.plain_nanousd -= sent.plain_nanousd
            if sent.decision is not None:
                sent.decision.cancel()
        elif booked is not None:
            open_.append((count + int(booked), sent))
        for due, late in list(open_):
            if due <= count:
                late.book()
                open_.remove((due, late))
        assert api.cost_nanousd <= MOST * api.plain_nanousd + 10 * (count + 1 + earlier)
