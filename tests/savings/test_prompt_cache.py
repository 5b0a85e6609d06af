from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import anthropic
import pytest
from django.core.cache import cache, caches
from django.core.cache.backends.locmem import LocMemCache

from ai_budget.conf import conf
from ai_budget.pricing.cost import cost
from ai_budget.pricing.rates import Band, ModelRates, resolve
from ai_budget.pricing.usage import read_usage
from ai_budget.savings.prompt_account import Account
from ai_budget.savings.prompt_cache import Marking, mark
from ai_budget.testing import AnthropicSimulator
from ai_budget.values import Usage
from tests.savings.prompt_api import PER, RATES
from tests.savings.test_prompt_prefixes import (
    AT,
    IMAGE,
    LONG,
    MODEL,
    THINKING,
    TOOL,
    ask,
    body,
    say,
    text,
)

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _forget(settings: Any) -> None:
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.locmem.LocMemCache",
            "LOCATION": "prompt cache",
            "OPTIONS": {"MAX_ENTRIES": 100_000},
        }
    }
    cache.clear()


def prices() -> ModelRates:
    return resolve(MODEL, at=AT)


def plain(usage: Usage, rates: ModelRates) -> int:
    """What an answer would have cost without caching."""
    read = Usage(input_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens)
    return cost(rates, read)


class Site:
    """Sends marked bodies to the local API, and books what comes back."""

    def __init__(self, api: AnthropicSimulator, mode: str) -> None:
        self.client = anthropic.Anthropic(api_key="any", base_url=api.base_url)
        self.mode, self.at, self.rates = mode, AT, prices()
        self.cost = self.plain = 0

    def send(self, given: dict[str, Any], feature: str = "chat") -> Usage:
        marking = mark(given, mode=self.mode, rates=self.rates, feature=feature, at=self.at)
        self.at += timedelta(seconds=5)
        sent = marking.body if marking else given
        usage = read_usage(self.client.messages.create(**sent).usage)
        self.cost += cost(self.rates, usage)
        self.plain += plain(usage, self.rates)
        if marking is not None:
            marking.book(
                usage,
                cost_nanousd=cost(self.rates, usage),
                cost_plain_nanousd=plain(usage, self.rates),
            )
        return usage


CONVERSATIONS = {
    "a system prompt": body(ask(), system=LONG),
    "tools": body(ask(), tools=[TOOL]),
    "a conversation": body(ask(LONG), say(text("Yes.")), ask()),
    "thinking": body(ask(LONG), say(THINKING, text("Yes."), THINKING), ask()),
    "an image": body({"role": "user", "content": [text(LONG), IMAGE, text("What?")]}),
    "a tool": body(
        ask(LONG),
        say({"type": "tool_use", "id": "t1", "name": "look_up", "input": {}}),
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "found"}],
        },
        tools=[TOOL],
    ),
}


@pytest.mark.parametrize("shape", CONVERSATIONS)
@pytest.mark.parametrize("mode", ["5m", "1h"])
def test_a_marked_prefix_is_written_once_and_read_by_the_next_request(
    anthropic_api: AnthropicSimulator, mode: str, shape: str
) -> None:
    site = Site(anthropic_api, mode)
    first, second = (site.send(CONVERSATIONS[shape]) for _ in range(2))
    written = first.cache_write_5m_tokens if mode == "5m" else first.cache_write_1h_tokens
    assert written > 1_000
    assert second.cache_read_tokens == written
    assert not second.cache_write_5m_tokens
    assert not second.cache_write_1h_tokens


@pytest.mark.parametrize("mode", ["5m", "1h"])
def test_each_turn_reads_what_the_turn_before_it_wrote(
    anthropic_api: AnthropicSimulator, mode: str
) -> None:
    site, messages = Site(anthropic_api, mode), [ask(LONG)]
    read = []
    for number in range(5):
        messages += [say(text(f"{number} {LONG}")), ask(f"And {number}?")]
        read.append(site.send(body(*messages, system=LONG)).cache_read_tokens)
    assert read == sorted(set(read))
    assert read[1] > 1_500


def test_auto_learns_from_what_comes_again_and_then_reads(
    anthropic_api: AnthropicSimulator,
) -> None:
    site = Site(anthropic_api, "auto")
    usages = [site.send(body(ask(f"Question {n}"), system=LONG * 2)) for n in range(220)]
    assert not usages[0].cache_write_5m_tokens  # nothing is risked before anything is earned
    assert usages[-1].cache_read_tokens > 2_500
    assert site.cost < 0.85 * site.plain


def test_auto_reads_growing_conversations(anthropic_api: AnthropicSimulator) -> None:
    site = Site(anthropic_api, "auto")
    for number in range(40):
        messages = [ask(f"{number} {LONG}")]
        for turn in range(6):
            usage = site.send(body(*messages))
            messages += [say(text(f"{turn} " + LONG)), ask(f"And {turn}?")]
    assert usage.cache_read_tokens > 6_000
    assert site.cost < 0.8 * site.plain


def test_auto_marks_nothing_where_nothing_comes_again(anthropic_api: AnthropicSimulator) -> None:
    site = Site(anthropic_api, "auto")
    for number in range(100):
        site.send(body(ask(), system=f"{number} {LONG}"))
    assert site.cost == site.plain


def test_features_do_not_share_what_they_have_earned(anthropic_api: AnthropicSimulator) -> None:
    site = Site(anthropic_api, "auto")
    for number in range(150):
        site.send(body(ask(f"Question {number}"), system=LONG * 2))
    usage = site.send(body(ask(), system=LONG * 2), feature="mail")
    assert not usage.cache_read_tokens


# The account


def account(feature: str = "chat") -> int:
    one = Account(caches[conf.CACHE_ALIAS], feature)
    return one.balance(cache.get(one.key))


def earn(nanousd: int, feature: str = "chat") -> None:
    Account(caches[conf.CACHE_ALIAS], feature).give(nanousd)


def auto(given: dict[str, Any], at: datetime = AT) -> Marking:
    marking = mark(given, mode="auto", rates=RATES, feature="chat", at=at)
    assert marking is not None
    return marking


def tempt(**more: Any) -> Marking:
    """Let a prefix come again and again, with money to spend."""
    for number in range(8):
        given = body(ask(f"Question {number}"), system=LONG, **more)
        auto(given, AT + timedelta(seconds=5 * number))
    earn(10**9)
    return auto(body(ask("Another"), system=LONG, **more), AT + timedelta(seconds=60))


def tempted() -> Marking:
    """A marking that writes."""
    marking = tempt()
    assert "cache_control" in str(marking.body)
    return marking


def test_what_a_write_can_cost_at_most_is_set_aside_before_it_is_sent() -> None:
    tempted()
    # The bytes of the prefix at the premium of five minutes: 500 nano-dollars a token, US 1.1.
    assert 10**9 - account() >= len(LONG) * 500 * 1.1


def test_prices_that_the_prompt_cannot_reach_are_not_set_aside() -> None:
    dear = replace(PER, input=10**10, cache_write_5m=2 * 10**10)
    rates = replace(RATES, standard=(*RATES.standard, Band(above=100_000, rates=dear)))
    for words, most in ((LONG, 20_000), (LONG * 20, None)):
        cache.clear()
        earn(10**10)
        for number in range(9):
            given = body(ask(f"Question {number}"), system=words)
            at = AT + timedelta(seconds=5 * number)
            mark(given, mode="auto", rates=rates, feature="chat", at=at)
        spent = 10**10 - account()
        if most is None:  # above the border a token's premium is 20 times as much
            assert spent > len(words) * 10_000
        else:
            assert 0 < spent < 9 * most * 500 * 1.1


def test_what_a_write_did_not_cost_is_given_back_and_one_percent_with_it() -> None:
    marking = tempted()
    usage = Usage(input_tokens=50, cache_write_5m_tokens=1_500, output_tokens=10)
    marking.book(usage, cost_nanousd=4_750_000, cost_plain_nanousd=4_000_000)
    assert account() == 10**9 - 1_500 * 500 + 40_000


def test_what_reads_saved_is_paid_in() -> None:
    marking = tempted()
    usage = Usage(input_tokens=50, cache_read_tokens=1_500, output_tokens=10)
    marking.book(usage, cost_nanousd=1_300_000, cost_plain_nanousd=4_000_000)
    assert account() == 10**9 + 1_500 * 1_800 + 40_000


def test_a_call_that_was_not_billed_gets_all_back() -> None:
    tempted().cancel()
    assert account() == 10**9


def test_a_call_whose_end_is_unknown_leaves_it_spent() -> None:
    marking = tempted()
    before = account()
    marking.book(None, cost_nanousd=0, cost_plain_nanousd=4_000_000)
    assert account() == before < 10**9


@pytest.mark.parametrize("first", ["book", "cancel"])
def test_the_first_end_counts(first: str) -> None:
    marking = tempted()
    usage = Usage(input_tokens=50, cache_write_5m_tokens=1_500)

    def book() -> None:
        marking.book(usage, cost_nanousd=4_750_000, cost_plain_nanousd=4_000_000)

    ends = [book, marking.cancel] if first == "book" else [marking.cancel, book]
    ends[0]()
    after = account()
    for end in (*ends, *ends):
        end()
    assert account() == after


def test_calls_with_marks_of_the_callers_earn_their_percent_and_no_more() -> None:
    given = body(ask(), system=LONG, cache_control={"type": "ephemeral"})
    marking = auto(given)
    marking.book(Usage(cache_read_tokens=100_000), cost_nanousd=100, cost_plain_nanousd=1_000)
    assert account() == 10


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 1}]},
        {"fallbacks": [{"model": "claude-haiku-5-5"}]},
        {"thread": {"type": "continue"}},
        {"a_parameter_of_tomorrow": True},
    ],
)
def test_what_may_be_read_more_than_once_is_not_risked(more: dict[str, Any]) -> None:
    assert "cache_control" not in str(tempt(**more).body)


def test_two_at_the_same_time_do_not_both_write() -> None:
    tempted()
    again = auto(body(ask("And another"), system=LONG), AT + timedelta(seconds=60.5))
    assert "cache_control" not in str(again.body)


def test_an_entry_that_its_writer_has_not_booked_is_not_taken_for_free() -> None:
    tempted()
    before = account()
    again = auto(body(ask("And another"), system=LONG), AT + timedelta(seconds=70))
    assert "cache_control" not in str(again.body) or account() < before


def test_nothing_is_marked_while_the_account_is_in_debt() -> None:
    marking = tempted()
    usage = Usage(input_tokens=50, cache_write_5m_tokens=1_500)
    marking.book(usage, cost_nanousd=3 * 10**9, cost_plain_nanousd=1)  # as if it kept nothing
    later = AT + timedelta(seconds=70)
    assert account() < 0
    assert "cache_control" not in str(auto(body(ask("And another"), system=LONG), later).body)


# A cache that fails, and what is in it


class DownCache(LocMemCache):
    """A cache whose server is gone."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("cannot reach secret-host with the prompt: " + LONG)

    set = add = incr = get_many = set_many = get


def test_a_cache_that_fails_means_no_marks_and_no_error(
    settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CACHES = {"default": {"BACKEND": f"{__name__}.DownCache"}}
    with caplog.at_level(logging.DEBUG):
        assert mark(body(ask(), system=LONG), mode="auto", rates=RATES, feature="c", at=AT) is None
    assert "ConnectionError" in caplog.text
    assert "secret-host" not in caplog.text


def test_a_cache_that_fails_later_loses_no_answer(settings: Any) -> None:
    marking = tempted()
    settings.CACHES = {"default": {"BACKEND": f"{__name__}.DownCache"}}
    marking.book(Usage(input_tokens=1), cost_nanousd=1, cost_plain_nanousd=1)
    marking.cancel()


@pytest.mark.parametrize("wrong", ["", "x y z w", 7, "[1]", "null", b"\x00"])
def test_what_is_not_ours_in_the_cache_means_no_marks_and_no_error(wrong: Any) -> None:
    tempted()
    for key in list(caches["default"]._cache):  # type: ignore[attr-defined]
        cache.set(key.split(":", 2)[2], wrong)
    mark(body(ask(), system=LONG), mode="auto", rates=RATES, feature="chat", at=AT)


def test_neither_keys_nor_values_nor_logs_have_any_of_the_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = "hunter2-my-diary"
    with caplog.at_level(logging.DEBUG):
        for number in range(9):
            given = body(ask(f"{secret} {number}"), system=secret + LONG, tools=[TOOL])
            marking = auto(given, AT + timedelta(seconds=5 * number))
            marking.book(Usage(input_tokens=2_000), cost_nanousd=10**9, cost_plain_nanousd=10**9)
    stored = str(caches["default"]._cache)  # type: ignore[attr-defined]
    assert "ai_budget:prompt" in stored
    for kept in (stored, caplog.text, repr(marking), marking.note):
        assert secret not in kept
        assert "stable text" not in kept


def test_what_is_remembered_expires() -> None:
    tempted()
    expires = caches["default"]._expire_info  # type: ignore[attr-defined]
    assert expires
    assert [key for key, until in expires.items() if until is None and "account" not in key] == []
