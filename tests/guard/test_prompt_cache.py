"""Prompt caching through the guard: marked, bounded, booked with what it saved."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import pytest
from django.core.cache import caches

import ai_budget
from ai_budget.exceptions import BudgetExceeded
from ai_budget.guard.marks import Marks
from ai_budget.pricing.bound import bound
from ai_budget.pricing.rates import resolve
from ai_budget.savings import prompt_cache
from ai_budget.savings.prompt_cache import Marking
from ai_budget.testing import AnthropicSimulator, Fail, Reply, freeze, override_budget
from tests.guard.books import MODEL, assert_balanced, assert_exact, only_row, rows

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SYSTEM = "You answer questions about the manual. " * 400


@pytest.fixture(autouse=True)
def nothing_learned() -> None:
    caches["default"].clear()


def marks(api: AnthropicSimulator) -> int:
    """How many marks the last request carried."""
    return str(api.requests[-1].body or {}).count("cache_control")


@pytest.mark.parametrize("ttl", ["5m", "1h"])
def test_a_prefix_is_written_once_and_then_read(api: AnthropicSimulator, ttl: str) -> None:
    with override_budget("chat", prompt_cache=ttl):
        for question in ("Who?", "Why?"):
            ai_budget.ask(question, feature="chat", system=SYSTEM)

    written, read = rows()
    in_cache = written.cache_write_5m_tokens if ttl == "5m" else written.cache_write_1h_tokens
    assert in_cache > 1_000
    assert read.cache_read_tokens == in_cache
    assert (read.cache_write_5m_tokens, read.cache_write_1h_tokens) == (0, 0)
    assert_balanced()


def test_what_it_saved_is_booked_and_what_it_cost_is_negative(api: AnthropicSimulator) -> None:
    with override_budget("chat", prompt_cache="5m"):
        for question in ("Who?", "Why?"):
            ai_budget.ask(question, feature="chat", system=SYSTEM)

    for row in rows():
        prompt = row.input_tokens + row.cache_write_5m_tokens + row.cache_read_tokens
        plain = ai_budget.price(MODEL, {"input_tokens": prompt, "output_tokens": row.output_tokens})
        assert row.saved_nanousd == plain - (row.cost_nanousd or 0)
        assert row.saved_reason == "prompt cache"
    written, read = rows()
    assert written.saved_nanousd < 0 < read.saved_nanousd


def test_the_bound_holds_what_a_write_costs_more(api: AnthropicSimulator) -> None:
    with override_budget("chat", prompt_cache="1h"):
        ai_budget.ask("Who?", feature="chat", system=SYSTEM)

    row = only_row()
    sent = bound(api.requests[-1].body or {}, resolve(MODEL))
    assert row.reserved_nanousd == sent.nanousd
    assert (row.cost_nanousd or 0) <= row.reserved_nanousd


def test_where_only_the_plain_prompt_fits_it_goes_plain(api: AnthropicSimulator) -> None:
    body = {
        "model": MODEL,
        "max_tokens": 10,
        "system": SYSTEM,
        "messages": [{"role": "user", "content": "Who?"}],
    }
    plain = bound(body, resolve(MODEL)).nanousd
    with override_budget("chat", prompt_cache="1h", daily_limit_usd=f"{plain / 1e9:.9f}"):
        ai_budget.ask("Who?", feature="chat", system=SYSTEM, max_tokens=10)

    assert marks(api) == 0
    assert only_row().reserved_nanousd == plain
    assert_balanced()


def test_marks_of_the_caller_are_left_alone(
    api: AnthropicSimulator, client: anthropic.Anthropic
) -> None:
    theirs = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
    with override_budget("chat", prompt_cache="1h"):
        client.messages.create(
            model=MODEL,
            max_tokens=10,
            system=theirs,  # type: ignore[arg-type]
            messages=[{"role": "user", "content": "Who?"}],
        )

    assert (api.requests[-1].body or {})["system"] == theirs


def test_the_decision_says_so_without_the_prompt(api: AnthropicSimulator) -> None:
    with override_budget("chat", prompt_cache="5m"):
        ai_budget.ask("Who?", feature="chat", system=SYSTEM)

    assert only_row().decision.startswith("prompt cache 5m at")
    assert "manual" not in only_row().decision


def test_auto_marks_what_it_has_seen_to_come_again(api: AnthropicSimulator) -> None:
    seen: list[int] = []
    with override_budget("chat", prompt_cache="auto"):
        for number in range(80):
            with freeze(NOON + timedelta(seconds=5 * number)):
                ai_budget.ask(f"Question {number}?", feature="chat", system=SYSTEM)
            seen.append(marks(api))

    saved = sum(row.saved_nanousd for row in rows())
    plain = saved + sum(row.cost_nanousd or 0 for row in rows())
    assert seen[0] == 0
    assert seen[-1] > 0
    assert seen.index(1) < 40  # 1 % of each call pays for a write of a quarter
    assert saved > plain // 4


def test_auto_does_not_mark_what_never_comes_again(api: AnthropicSimulator) -> None:
    with override_budget("chat", prompt_cache="auto"):
        for number in range(150):
            with freeze(NOON + timedelta(seconds=5 * number)):
                ai_budget.ask("Who?", feature="chat", system=f"{number}: {SYSTEM}")

    assert sum(row.cache_write_5m_tokens + row.cache_write_1h_tokens for row in rows()) == 0


@pytest.mark.parametrize("end", [Fail(status=400), Reply(stop_reason="refusal", content=[])])
def test_what_was_set_aside_comes_back_where_nothing_is_billed(
    api: AnthropicSimulator, end: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Marking, "cancel", lambda self: ended.append("cancelled"))
    monkeypatch.setattr(Marking, "book", lambda self, usage, **kwargs: ended.append("booked"))
    api.enqueue(end)

    with override_budget("chat", prompt_cache="auto"):
        with suppress(anthropic.BadRequestError):
            ai_budget.ask("Who?", feature="chat", system=SYSTEM)
        ai_budget.ask("Who?", feature="chat", system=SYSTEM)

    assert ended == ["cancelled", "booked"]


def test_what_helps_a_call_is_not_marked(api: AnthropicSimulator) -> None:
    api.enqueue(Reply(text='{"level": "hard"}'))
    with override_budget("chat", prompt_cache="1h", routing="classifier", model="claude-opus-5-5"):
        ai_budget.ask("Why? " * 3_000, feature="chat", system=SYSTEM, max_tokens=500)

    assert "cache_control" not in str(api.requests[0].body)
    assert "cache_control" in str(api.requests[1].body)


def test_a_cache_that_fails_marks_nothing(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("gone")

    monkeypatch.setattr(caches["default"], "get_many", fail)
    with override_budget("chat", prompt_cache="auto"):
        answer = ai_budget.ask("Who?", feature="chat", system=SYSTEM)

    assert answer.text
    assert marks(api) == 0
    assert_exact(api)


def test_what_one_account_wrote_another_does_not_take_for_its_own(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = prompt_cache.mark

    def spy(body: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["where"])
        return real(body, **kwargs)

    monkeypatch.setattr(prompt_cache, "mark", spy)
    with override_budget("chat", prompt_cache="auto"):
        for key in ("one", "one", "two"):
            ai_budget.client(feature="chat", api_key=key).messages.create(
                model=MODEL, max_tokens=10, messages=[{"role": "user", "content": "Who?"}]
            )

    one, again, two = seen
    assert one == again != two


def test_what_was_set_aside_comes_back_where_nothing_is_sent(
    api: AnthropicSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Marking, "cancel", lambda self: ended.append("cancelled"))

    with (
        override_budget("chat", prompt_cache="auto", daily_limit_usd=0),
        pytest.raises(BudgetExceeded),
    ):
        ai_budget.ask("Who?", feature="chat", system=SYSTEM)

    assert "cancelled" in ended


def test_marks_that_are_taken_off_or_changed_give_back_what_was_set_aside() -> None:
    given = {"model": MODEL, "max_tokens": 9, "system": SYSTEM, "messages": [{"role": "user"}]}
    ended: list[str] = []

    class Fake:
        note, body = "prompt cache", given

        def cancel(self) -> None:
            ended.append("cancelled")

    marks = Marks("auto", "chat", NOON)
    marks._marking, marks._of = Fake(), {**given, "model": "another"}  # type: ignore[assignment]
    marks.mark(given, resolve(MODEL))
    changed = len(ended)
    marks._marking = Fake()  # type: ignore[assignment]
    taken_off = marks.take_off()

    assert (changed, taken_off, len(ended)) == (1, True, 2)
    assert marks.mark(given, resolve(MODEL)) is None


def test_a_stream_that_was_cut_earns_nothing_for_what_it_only_may_have_said(
    api: AnthropicSimulator, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    booked: list[dict[str, int]] = []
    monkeypatch.setattr(Marking, "book", lambda self, usage, **given: booked.append(given))
    api.enqueue(Reply(text="word " * 500, chunk_delay=0.01))
    with (
        override_budget("chat", prompt_cache="auto"),
        client.messages.stream(
            model=MODEL,
            max_tokens=1_000,
            system=SYSTEM,
            messages=[{"role": "user", "content": "Who?"}],
        ) as stream,
    ):
        next(iter(stream.text_stream))

    row = only_row()
    assert row.output_tokens > 500  # an allowance for what was on its way
    assert booked[0]["cost_plain_nanousd"] == ai_budget.price(
        MODEL, {"input_tokens": row.input_tokens, "output_tokens": 0}
    )
