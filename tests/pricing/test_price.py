"""What an answer cost: the rules that turn usage into nano-dollars."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from anthropic.types import Usage as SdkUsage
from anthropic.types.beta import BetaUsage
from genai_prices import data_snapshot
from genai_prices.types import TieredPrices
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import DjangoAssertNumQueries, Settings

from ai_budget import Usage, periods, price
from ai_budget.exceptions import UnclassifiedUsage, UnpricedModel
from ai_budget.money import parse_usd
from ai_budget.pricing.rates import resolve
from ai_budget.values import Iteration

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
OPUS, SONNET, HAIKU = "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"
MILLION = 1_000_000
LIBRARY_MODELS = [
    "claude-fable-5-2",
    "claude-opus-5-5",
    "claude-opus-4-5",
    "claude-sonnet-5-5",
    "claude-sonnet-4-5",
    "claude-haiku-5-5",
    "claude-haiku-4-5",
]
FROM_4_6 = [
    "claude-opus-4-6",
    "claude-sonnet-4-6",
    "claude-opus-4-7",
    "claude-sonnet-5",
    "claude-haiku-5-5",
    "claude-mythos-preview",
    "claude-mythos-5-1",
]
BEFORE_4_6 = [
    "claude-opus-4-5",
    "claude-opus-4-5-20251101",
    "claude-sonnet-4-5-20250929",
    "claude-haiku-4-5",
    "claude-opus-4-1",
    "claude-opus-4-20250514",
    "claude-sonnet-4-20250514",
    "claude-3-7-sonnet-latest",
    "claude-3-haiku-20240307",
]


def usd(dollars: str) -> int:
    return parse_usd(dollars)


counts = st.integers(min_value=0, max_value=2_000_000)
usages = st.builds(
    Usage,
    input_tokens=counts,
    cache_write_5m_tokens=counts,
    cache_write_1h_tokens=counts,
    cache_read_tokens=counts,
    output_tokens=counts,
    web_searches=st.integers(min_value=0, max_value=50),
    service_tier=st.sampled_from(["", "standard", "priority", "batch"]),
    inference_geo=st.sampled_from(["", "global", "not_available", "us"]),
)


def exact_dollars(model: str, usage: Usage, *, batch: bool) -> Fraction:
    """The price by the library's own figures, in fractions that round nothing."""
    _, info = data_snapshot.get_snapshot().find_provider_model(model, None, "anthropic", None)
    per = info.get_prices(NOW)
    prompt = (
        usage.input_tokens
        + usage.cache_write_5m_tokens
        + usage.cache_write_1h_tokens
        + usage.cache_read_tokens
    )

    def rate(value: Any) -> Fraction:
        if isinstance(value, TieredPrices):
            reached = [tier.price for tier in value.tiers if prompt > tier.start]
            value = reached[-1] if reached else value.base
        return Fraction(value) / MILLION

    tokens = (
        usage.input_tokens * rate(per.input_mtok)
        + usage.cache_write_5m_tokens * rate(per.cache_write_mtok)
        + usage.cache_write_1h_tokens * rate(per.cache_write_1h_mtok)
        + usage.cache_read_tokens * rate(per.cache_read_mtok)
        + usage.output_tokens * rate(per.output_mtok)
    )
    if usage.inference_geo == "us" and model not in [*BEFORE_4_6, "claude-sonnet-4-5"]:
        tokens *= Fraction(11, 10)
    if batch or usage.service_tier == "batch":
        tokens /= 2
    return tokens + Fraction(usage.web_searches, 100)


@given(model=st.sampled_from(LIBRARY_MODELS), usage=usages, batch=st.booleans())
def test_a_price_is_the_exact_amount_rounded_up_once(model: str, usage: Usage, batch: bool) -> None:
    exact = exact_dollars(model, usage, batch=batch) * 10**9

    assert price(model, usage, at=NOW, batch=batch) == ceil(exact)


@given(usage=usages, parts=st.lists(usages, min_size=1, max_size=5))
def test_iterations_are_summed_before_the_one_rounding(usage: Usage, parts: list[Usage]) -> None:
    itemised = Usage(
        service_tier=usage.service_tier,
        inference_geo=usage.inference_geo,
        web_searches=usage.web_searches,
        iterations=tuple(Iteration(type="message", usage=part) for part in parts),
    )

    exact = Fraction(usage.web_searches, 100)
    for part in parts:
        counted = Usage(
            input_tokens=part.input_tokens,
            cache_write_5m_tokens=part.cache_write_5m_tokens,
            cache_write_1h_tokens=part.cache_write_1h_tokens,
            cache_read_tokens=part.cache_read_tokens,
            output_tokens=part.output_tokens,
            service_tier=usage.service_tier,
            inference_geo=usage.inference_geo,
        )
        exact += exact_dollars(HAIKU, counted, batch=False)

    assert price(HAIKU, itemised, at=NOW) == ceil(exact * 10**9)


def test_a_fraction_of_a_nano_dollar_is_rounded_up() -> None:
    # Half of 0.01 dollars a million: five nano-dollars a token, in US inference 5.5.
    tokens = {"cache_read_input_tokens": 1, "inference_geo": "us"}

    assert price(HAIKU, tokens, at=NOW, batch=True) == 6


# Batch, geography, speed, searches ---------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [
        {"input_tokens": MILLION},
        {"output_tokens": MILLION},
        {"cache_creation_input_tokens": MILLION},
        {"cache_creation": {"ephemeral_1h_input_tokens": MILLION}},
        {"cache_read_input_tokens": MILLION},
    ],
    ids=lambda tokens: next(iter(tokens)),
)
def test_a_batch_halves_every_token(tokens: dict[str, Any]) -> None:
    assert price(OPUS, tokens, at=NOW, batch=True) * 2 == price(OPUS, tokens, at=NOW)


def test_the_service_tier_tells_a_batch_too() -> None:
    tokens = {"input_tokens": MILLION, "service_tier": "batch"}

    assert price(OPUS, tokens, at=NOW) == usd("2")


def test_a_batch_is_halved_once_when_flag_and_tier_agree() -> None:
    tokens = {"input_tokens": MILLION, "service_tier": "batch"}

    assert price(OPUS, tokens, at=NOW, batch=True) == usd("2")


def test_priority_costs_as_standard() -> None:
    tokens = {"input_tokens": MILLION, "service_tier": "priority"}

    assert price(OPUS, tokens, at=NOW) == usd("4")


@pytest.mark.parametrize("model", FROM_4_6)
def test_us_inference_costs_a_tenth_more(model: str) -> None:
    anywhere = price(model, {"input_tokens": MILLION}, at=NOW)

    us = price(model, {"input_tokens": MILLION, "inference_geo": "us"}, at=NOW)

    assert us * 10 == anywhere * 11


@pytest.mark.parametrize("model", BEFORE_4_6)
def test_us_inference_costs_no_more_for_models_before_4_6(model: str) -> None:
    anywhere = price(model, {"input_tokens": MILLION}, at=NOW)

    assert price(model, {"input_tokens": MILLION, "inference_geo": "us"}, at=NOW) == anywhere


@pytest.mark.parametrize("geo", ["global", "not_available", "", None])
def test_inference_elsewhere_costs_the_plain_price(geo: str | None) -> None:
    assert price(OPUS, {"input_tokens": MILLION, "inference_geo": geo}, at=NOW) == usd("4")


def test_us_inference_stacks_with_a_batch() -> None:
    tokens = {"input_tokens": MILLION, "inference_geo": "us"}

    assert price(OPUS, tokens, at=NOW, batch=True) == usd("2.2")


def test_us_inference_stacks_with_fast_mode() -> None:
    tokens = {"output_tokens": MILLION, "inference_geo": "us", "speed": "fast"}

    assert price(OPUS, tokens, at=NOW) == usd("44")


def test_a_thousand_web_searches_cost_ten_dollars() -> None:
    assert price(OPUS, {"server_tool_use": {"web_search_requests": 1_000}}, at=NOW) == usd("10")


def test_web_searches_are_neither_halved_nor_dearer_in_the_us() -> None:
    usage = {"server_tool_use": {"web_search_requests": 3}, "inference_geo": "us"}

    assert price(OPUS, usage, at=NOW, batch=True) == usd("0.03")


def test_web_fetches_are_free() -> None:
    assert price(OPUS, {"server_tool_use": {"web_fetch_requests": 1_000}}, at=NOW) == 0


def test_a_model_without_a_fast_price_is_unpriced_in_fast_mode() -> None:
    with pytest.raises(UnpricedModel, match=SONNET):
        price(SONNET, {"input_tokens": 1, "speed": "fast"}, at=NOW)


# What usage may look like ------------------------------------------------------------------------

RAW = {
    "input_tokens": 123,
    "output_tokens": 45,
    "cache_creation_input_tokens": 300,
    "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
    "cache_read_input_tokens": 7,
    "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 1},
    "service_tier": "standard",
    "inference_geo": "us",
    "speed": "fast",
}


@pytest.mark.parametrize(
    "usage",
    [
        SdkUsage.model_validate(RAW),
        BetaUsage.model_validate(RAW),
        Usage(
            input_tokens=123,
            output_tokens=45,
            cache_write_5m_tokens=100,
            cache_write_1h_tokens=200,
            cache_read_tokens=7,
            web_searches=2,
            service_tier="standard",
            inference_geo="us",
            speed="fast",
        ),
    ],
    ids=["Usage", "BetaUsage", "ai_budget.Usage"],
)
def test_every_form_of_usage_has_the_price_of_its_dict(usage: Any) -> None:
    assert price(OPUS, usage, at=NOW) == price(OPUS, RAW, at=NOW)


def test_none_counts_as_nothing() -> None:
    nothing = dict.fromkeys(RAW)

    assert price(OPUS, {**nothing, "input_tokens": MILLION}, at=NOW) == usd("4")


def test_zero_is_a_count_of_its_own() -> None:
    usage = {
        "input_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": 0,
    }

    assert price(OPUS, usage, at=NOW) == 0


def test_writes_beyond_the_split_were_for_five_minutes() -> None:
    usage = {
        "cache_creation_input_tokens": 3_337,
        "cache_creation": {"ephemeral_5m_input_tokens": 68, "ephemeral_1h_input_tokens": 3_000},
    }

    assert price(OPUS, usage, at=NOW) == (68 + 269) * 5_000 + 3_000 * 8_000


def test_a_split_beyond_its_total_is_charged_as_split() -> None:
    usage = {
        "cache_creation_input_tokens": 0,
        "cache_creation": {"ephemeral_1h_input_tokens": 1_000},
    }

    assert price(OPUS, usage, at=NOW) == 1_000 * 8_000


def test_thinking_is_part_of_the_output() -> None:
    usage = {"output_tokens": MILLION, "output_tokens_details": {"thinking_tokens": 900_000}}

    assert price(OPUS, usage, at=NOW) == usd("20")


@pytest.mark.parametrize("count", [-1, 1.5, "12", True, float("nan")], ids=repr)
@pytest.mark.parametrize(
    "place",
    [
        lambda count: {"input_tokens": count},
        lambda count: {"output_tokens": count},
        lambda count: {"cache_read_input_tokens": count},
        lambda count: {"cache_creation_input_tokens": count},
        lambda count: {"cache_creation": {"ephemeral_1h_input_tokens": count}},
        lambda count: {"server_tool_use": {"web_search_requests": count}},
        lambda count: {"iterations": [{"type": "message", "input_tokens": count}]},
        lambda count: Usage(input_tokens=count),
        lambda count: Usage(web_searches=count),
        lambda count: Usage(
            iterations=(Iteration(type="message", usage=Usage(output_tokens=count)),)
        ),
    ],
    ids=[
        "input",
        "output",
        "read",
        "write",
        "split",
        "searches",
        "iteration",
        "ours",
        "ours-searches",
        "ours-iteration",
    ],
)
def test_a_count_that_is_no_whole_number_is_refused(place: Any, count: Any) -> None:
    with pytest.raises(UnclassifiedUsage, match="not a count"):
        price(OPUS, place(count), at=NOW)


@pytest.mark.parametrize(
    "usage",
    [
        {"cache_creation": 5},
        {"cache_creation": ["ephemeral_5m_input_tokens"]},
        {"server_tool_use": "web_search"},
        {"output_tokens_details": [1]},
        {"iterations": {"type": "message"}},
        {"iterations": [None]},
        {"iterations": "message"},
    ],
    ids=str,
)
def test_usage_of_another_shape_is_refused(usage: dict[str, Any]) -> None:
    with pytest.raises(UnclassifiedUsage):
        price(OPUS, usage, at=NOW)


def test_cache_writes_of_an_unknown_lifetime_are_refused() -> None:
    usage = {
        "cache_creation_input_tokens": 10,
        "cache_creation": {"ephemeral_24h_input_tokens": 10},
    }

    with pytest.raises(UnclassifiedUsage, match="ephemeral_24h_input_tokens"):
        price(OPUS, usage, at=NOW)


@pytest.mark.parametrize("field", ["speed", "service_tier"])
@pytest.mark.parametrize("value", ["warp", 2, {"name": "fast"}], ids=repr)
def test_an_unknown_speed_or_tier_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UnclassifiedUsage, match=field):
        price(OPUS, {"input_tokens": 1, field: value}, at=NOW)


def test_usage_must_be_usage() -> None:
    with pytest.raises(TypeError, match="int"):
        price(OPUS, 12, at=NOW)


# Iterations --------------------------------------------------------------------------------------


def entry(type_: str, *, model: str | None = None, **counts: int) -> dict[str, Any]:
    named = {} if model is None else {"model": model}
    zeros = {
        "input_tokens": 0,
        "output_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    return {"type": type_, **zeros, **named, **counts}


def test_messages_of_the_iterations_are_not_charged_twice() -> None:
    usage = {
        "input_tokens": 300,
        "output_tokens": 30,
        "iterations": [
            entry("message", input_tokens=100, output_tokens=10),
            entry("message", input_tokens=200, output_tokens=20),
        ],
    }

    assert price(OPUS, usage, at=NOW) == 300 * 4_000 + 30 * 20_000


@pytest.mark.parametrize("type_", ["message", "compaction", "advisor_message", "fallback_message"])
def test_each_entry_is_charged_at_its_own_model(type_: str) -> None:
    usage = {"iterations": [entry(type_, model=SONNET, input_tokens=MILLION)]}

    assert price(OPUS, usage, at=NOW) == usd("2")


def test_an_entry_without_a_model_is_the_answers_own() -> None:
    usage = {"iterations": [entry("message"), entry("compaction", cache_read_input_tokens=MILLION)]}

    assert price(OPUS, usage, at=NOW) == usd("0.20")


def test_helpers_come_on_top_of_the_counts_at_the_top() -> None:
    usage = {
        "input_tokens": 181,
        "output_tokens": 8,
        "iterations": [
            entry("compaction", input_tokens=100, output_tokens=83, cache_read_input_tokens=55_096),
            entry("message", input_tokens=181, output_tokens=8),
        ],
    }

    expected = 281 * 4_000 + 91 * 20_000 + 55_096 * 200

    assert price(OPUS, usage, at=NOW) == expected


def test_a_lone_helper_does_not_hide_the_counts_at_the_top() -> None:
    usage = {
        "input_tokens": 181,
        "output_tokens": 8,
        "iterations": [entry("compaction", input_tokens=100, output_tokens=83)],
    }

    assert price(OPUS, usage, at=NOW) == 281 * 4_000 + 91 * 20_000


def test_a_fallback_is_charged_beside_the_attempt_that_was_declined() -> None:
    usage = {
        "input_tokens": 50,
        "output_tokens": 5,
        "iterations": [
            entry("message", model="claude-fable-5-2", input_tokens=40, output_tokens=1),
            entry("fallback_message", model=OPUS, input_tokens=50, output_tokens=5),
        ],
    }

    expected = 40 * 8_000 + 1 * 40_000 + 50 * 4_000 + 5 * 20_000

    assert price("claude-fable-5-2", usage, at=NOW) == expected


def test_each_entry_is_of_the_tier_of_its_own_prompt() -> None:
    usage = {
        "input_tokens": 150_000,
        "iterations": [
            entry("message", input_tokens=75_000),
            entry("message", input_tokens=75_000),
        ],
    }

    assert price(HAIKU, usage, at=NOW) == usd("0.015")


def test_us_inference_is_for_the_entries_whose_models_have_it() -> None:
    usage = {
        "inference_geo": "us",
        "iterations": [
            entry("message", input_tokens=MILLION),
            entry("advisor_message", model="claude-opus-4-5", input_tokens=MILLION),
        ],
    }

    assert price(OPUS, usage, at=NOW) == usd("4.4") + usd("5")


def test_a_helper_without_fast_mode_ran_at_its_own_speed() -> None:
    usage = {
        "speed": "fast",
        "iterations": [
            entry("message", input_tokens=MILLION),
            entry("fallback_message", model=SONNET, input_tokens=MILLION),
        ],
    }

    assert price(OPUS, usage, at=NOW) == usd("8") + usd("2")


def test_an_attempt_without_fast_mode_that_a_fast_model_took_over_ran_at_its_own_speed() -> None:
    usage = {
        "speed": "fast",
        "iterations": [
            entry("message", input_tokens=MILLION),
            entry("fallback_message", model=OPUS, input_tokens=MILLION),
        ],
    }

    assert price(SONNET, usage, at=NOW) == usd("2") + usd("8")


def test_a_fast_answer_of_models_without_fast_mode_is_unpriced() -> None:
    usage = {"speed": "fast", "iterations": [entry("message", input_tokens=1)]}

    with pytest.raises(UnpricedModel, match=SONNET):
        price(SONNET, usage, at=NOW)


def test_searches_are_charged_once_beside_iterations() -> None:
    usage = {
        "server_tool_use": {"web_search_requests": 2},
        "iterations": [entry("message"), entry("message")],
    }

    assert price(OPUS, usage, at=NOW) == usd("0.02")


def test_an_entry_of_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(UnclassifiedUsage, match="dream"):
        price(OPUS, {"iterations": [entry("dream", input_tokens=1)]}, at=NOW)


def test_an_entry_of_an_unknown_model_is_unpriced() -> None:
    usage = {"iterations": [entry("advisor_message", model="gpt-9", input_tokens=1)]}

    with pytest.raises(UnpricedModel, match="gpt-9"):
        price(OPUS, usage, at=NOW)


# Platforms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dollars"),
    [
        ("global.anthropic.claude-opus-5-5", "4"),
        ("us.anthropic.claude-opus-5-5", "4.4"),
        ("eu.anthropic.claude-opus-5-5", "4.4"),
        ("anthropic.claude-opus-5-5", "4.4"),
        ("global.anthropic.claude-sonnet-4-5-20250929-v1:0", "3"),
        ("jp.anthropic.claude-sonnet-4-5-20250929-v1:0", "3.3"),
        ("us.anthropic.claude-sonnet-4-20250514-v1:0", "3"),
    ],
)
def test_bedrock_charges_a_tenth_more_where_a_region_is_named(model: str, dollars: str) -> None:
    cost = price(model, {"input_tokens": MILLION}, at=NOW, provider="bedrock")

    assert cost == usd(dollars)


def test_bedrock_has_the_long_context_tier() -> None:
    tokens = {"input_tokens": 100_001}

    assert price("us.anthropic.claude-haiku-5-5", tokens, at=NOW, provider="bedrock") == (
        100_001 * 550
    )


def test_a_bare_name_in_an_iteration_is_of_the_region_that_was_asked() -> None:
    usage = {"iterations": [entry("message", model=OPUS, input_tokens=MILLION)]}

    cost = price("global.anthropic.claude-opus-5-5", usage, at=NOW, provider="bedrock")

    assert cost == usd("4")


@pytest.mark.parametrize(
    ("model", "dollars"),
    [
        ("claude-opus-5-5", "4"),
        ("claude-opus-4-5@20251101", "5"),
        ("claude-haiku-4-5@20251001", "1"),
        ("claude-sonnet-5", "2"),
    ],
)
def test_vertex_has_its_own_names(model: str, dollars: str) -> None:
    assert price(model, {"input_tokens": MILLION}, at=NOW, provider="vertex") == usd(dollars)


@pytest.mark.parametrize("provider", ["bedrock", "vertex", "foundry"])
def test_the_geography_of_other_platforms_is_in_their_names(provider: str) -> None:
    usage = {"input_tokens": MILLION, "inference_geo": "us"}
    model = "anthropic.claude-opus-4-8" if provider == "bedrock" else "claude-opus-4-8"

    assert price(model, usage, at=NOW, provider=provider) == price(
        model, {"input_tokens": MILLION}, at=NOW, provider=provider
    )


@pytest.mark.parametrize("provider", ["bedrock", "vertex"])
def test_searches_cost_the_same_where_the_library_is_silent(provider: str) -> None:
    model = "global.anthropic.claude-opus-4-8" if provider == "bedrock" else "claude-opus-4-8"
    usage = {"server_tool_use": {"web_search_requests": 1}}

    assert price(model, usage, at=NOW, provider=provider) == usd("0.01")


# Models without a price --------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["claude-nova-9", "", "gpt-5", "claude"])
def test_an_unknown_model_is_unpriced(model: str) -> None:
    with pytest.raises(UnpricedModel, match="No price is known"):
        price(model, {"input_tokens": 1}, at=NOW)


def test_an_unknown_model_may_be_booked_at_the_dearest_known_rates(
    settings: Settings,
) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNPRICED_MODEL": "allow"}

    for tokens in ({"input_tokens": 1}, {"output_tokens": 1}, {"cache_read_input_tokens": 1}):
        dearest = max(
            price(model, tokens, at=NOW) for model in [*LIBRARY_MODELS, "claude-opus-4-1"]
        )
        assert price("claude-nova-9", tokens, at=NOW) >= dearest > 0


def test_the_dearest_known_rates_are_the_platforms_too(settings: Settings) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNPRICED_MODEL": "allow"}
    tokens = {"cache_creation": {"ephemeral_1h_input_tokens": MILLION}}

    regional = price("us.anthropic.claude-fable-5", tokens, at=NOW, provider="bedrock")

    assert price("us.anthropic.claude-nova-9", tokens, at=NOW, provider="bedrock") >= regional


def test_an_unknown_model_may_be_booked_in_fast_mode_too(settings: Settings) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNPRICED_MODEL": "allow"}
    tokens = {"output_tokens": MILLION, "speed": "fast"}

    assert price("claude-nova-9", tokens, at=NOW) >= usd("80")


def test_allowing_unknown_models_is_read_live(settings: Settings) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNPRICED_MODEL": "allow"}
    price("claude-nova-9", {"input_tokens": 1}, at=NOW)
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNPRICED_MODEL": "refuse"}

    with pytest.raises(UnpricedModel):
        price("claude-nova-9", {"input_tokens": 1}, at=NOW)


# Moments -----------------------------------------------------------------------------------------


def test_a_price_is_that_of_now_unless_a_moment_is_given() -> None:
    before, after = datetime(2026, 3, 12, tzinfo=UTC), datetime(2026, 3, 13, tzinfo=UTC)
    tokens = {"input_tokens": 200_001}

    with periods.override_clock(lambda: before):
        dear = price("claude-sonnet-4-6", tokens)
    with periods.override_clock(lambda: after):
        cheap = price("claude-sonnet-4-6", tokens)

    assert dear == 2 * cheap


@pytest.mark.parametrize("hours", [-11, -5, 9, 14])
def test_the_day_of_a_price_is_that_of_utc_whatever_the_moments_zone(hours: int) -> None:
    zone = timezone(timedelta(hours=hours))
    change = datetime(2026, 3, 13, tzinfo=UTC)
    tokens = {"input_tokens": 200_001}

    before = price("claude-sonnet-4-6", tokens, at=(change - timedelta(seconds=1)).astimezone(zone))
    after = price("claude-sonnet-4-6", tokens, at=change.astimezone(zone))

    assert before == 2 * after


def test_a_moment_without_a_zone_is_refused_known_model_or_not() -> None:
    naive = datetime(2026, 11, 22)  # noqa: DTZ001
    price(OPUS, {"input_tokens": 1}, at=NOW)

    for model in (OPUS, SONNET):
        with pytest.raises(ValueError, match="aware"):
            price(model, {"input_tokens": 1}, at=naive)


# Speed -------------------------------------------------------------------------------------------


def test_a_warm_price_asks_neither_the_database_nor_the_library(
    django_assert_num_queries: DjangoAssertNumQueries, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = {**RAW, "iterations": [entry("advisor_message", model="claude-opus-5")]}
    price(OPUS, usage, at=NOW)

    def refuse(*args: Any) -> Any:
        raise AssertionError("the library was asked")

    monkeypatch.setattr(data_snapshot.DataSnapshot, "find_provider_model", refuse)
    with django_assert_num_queries(0):
        for hour in range(12):
            price(OPUS, usage, at=NOW + timedelta(hours=hour) - timedelta(hours=12))


def test_rates_are_resolved_once_for_a_model_and_day() -> None:
    assert resolve(OPUS, at=NOW) is resolve(OPUS, at=NOW + timedelta(hours=11))
