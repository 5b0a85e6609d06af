"""What a feature would cost a month, and what each lever would save."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import Settings

import ai_budget
from ai_budget import Usage
from ai_budget.exceptions import UnpricedModel
from ai_budget.pricing.monthly import (
    Lever,
    MonthlyEstimate,
    estimate_monthly,
    read_share,
)
from ai_budget.pricing.rates import minimum_prefix
from ai_budget.testing.catalogue import LISTED_MODELS, limits_of

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
OPUS, SONNET, HAIKU = "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"


def estimate(model: str = SONNET, **given: Any) -> MonthlyEstimate:
    usage = {"calls_per_day": 1_000, "input_tokens": 1_000, "output_tokens": 100, **given}
    return estimate_monthly(model, at=NOW, **usage)


def lever(of: MonthlyEstimate, name: str, detail: str = "") -> Lever | None:
    found = (each for each in of.levers if each.name == name and detail in each.detail)
    return next(found, None)


def offered(of: MonthlyEstimate) -> set[str]:
    return {each.name for each in of.levers if not each.used}


# The bill ----------------------------------------------------------------------------------------


def test_a_call_a_day_and_a_month() -> None:
    """Sonnet: 1,000 x $2 + 100 x $10, per million, are $0.003 a call."""
    of = estimate()

    assert of.per_call == Decimal("0.003")
    assert of.per_day == Decimal(3)
    assert of.per_month == Decimal(90)


def test_a_month_has_as_many_days_as_are_said() -> None:
    assert estimate(days=31).per_month == Decimal(93)


def test_a_batch_costs_half() -> None:
    assert estimate(batch=True).per_month == Decimal(45)


def test_what_the_response_cache_answers_is_free() -> None:
    """700 of 1,000 calls are paid: $2.10 a day, and $0.0021 for the average call."""
    of = estimate(cache_hit_rate="30%")

    assert (of.per_call, of.per_day, of.per_month) == (
        Decimal("0.0021"),
        Decimal("2.1"),
        Decimal(63),
    )


def test_where_every_call_is_answered_from_the_cache_nothing_is_paid() -> None:
    of = estimate(cache_hit_rate=1, cached_prefix_tokens=1_000)

    assert [of.per_call, of.per_day, of.per_month] == [0, 0, 0]
    assert offered(of) == set()


@pytest.mark.parametrize(("tokens", "dollars"), [(100_000, "0.01"), (100_001, "0.0500005")])
def test_a_long_prompt_costs_the_long_context_price(tokens: int, dollars: str) -> None:
    """Haiku: $0.10 per million up to 100,000 tokens of prompt, $0.50 for all of a longer one."""
    of = estimate(HAIKU, input_tokens=tokens, output_tokens=0)

    assert of.per_call == Decimal(dollars)


def test_inference_in_the_us_costs_a_tenth_more(settings: Settings) -> None:
    settings.AI_BUDGET = {"INFERENCE_GEO": "us"}

    assert estimate().per_month == Decimal(99)


def test_the_price_is_that_of_its_day() -> None:
    """Sonnet 4.6 lost its dearer tier above 200,000 tokens on 2026-03-13."""
    usage: dict[str, Any] = {"calls_per_day": 1, "input_tokens": 300_000, "output_tokens": 0}
    before, after = (
        estimate_monthly("claude-sonnet-4-6", at=datetime(2026, 3, day, tzinfo=UTC), **usage)
        for day in (1, 20)
    )

    assert (before.per_call, after.per_call) == (Decimal("1.8"), Decimal("0.9"))


def test_each_figure_is_rounded_up_once() -> None:
    """A third of 50 nano-dollars: two of three are paid."""
    usage: dict[str, Any] = {"input_tokens": 1, "output_tokens": 0, "calls_per_day": 7, "days": 3}
    of = estimate(HAIKU, cache_hit_rate="0.333333333", **usage)

    # 100 x 0.666666667 = 66.6666667 a call, 466.66... a day, 1,400.0000007 in three.
    assert (of.per_call_nanousd, of.per_day_nanousd, of.per_month_nanousd) == (67, 467, 1_401)


# The prompt cache --------------------------------------------------------------------------------


def kept(calls: int, **given: Any) -> MonthlyEstimate:
    """All of a prompt of 1,000 tokens is a prefix, and the answer is nothing.

    Sonnet, in nano-dollars a token: 2,000 read anew, 2,500 or 4,000 written, 100 read.
    """
    usage = {"input_tokens": 1_000, "output_tokens": 0, "cached_prefix_tokens": 1_000, **given}
    return estimate(calls_per_day=calls, **usage)


def test_a_prefix_is_read_by_the_calls_that_come_in_time() -> None:
    """288 calls a day are one in five minutes, twelve an hour.

    exp(-1) of them miss a prefix of five minutes, exp(-12) = 0.0000061 one of an hour. So it is
    kept an hour: 0.999993 x 100 + 0.000007 x 4,000 = 100.0273 a token.
    """
    of = kept(288)

    assert of.prompt_cache == "1h"
    assert of.per_call_nanousd == 100_028
    used = lever(of, "prompt_cache")
    assert used is not None
    assert used.detail == "1,000 tokens for 1h, 99.9 % reads"
    # Without it 288 x 30 x 2,000,000; with it 288 x 30 x 100,027.3.
    assert used.saving_nanousd == 288 * 30 * 2_000_000 - 864_235_872


@pytest.mark.parametrize(("calls", "how"), [(10, "off"), (17, "off"), (18, "1h"), (50_000, "5m")])
def test_the_cheapest_way_to_keep_a_prefix_is_taken(calls: int, how: str) -> None:
    """An hour pays from where 100 p + 4,000 (1 - p) is under 2,000: p = 51.3 %, 17.3 calls."""
    assert kept(calls).prompt_cache == how


@pytest.mark.parametrize("tokens", ["512", "1,000"])
def test_a_prefix_that_is_read_too_seldom_is_not_written(tokens: str) -> None:
    of = kept(10, cached_prefix_tokens=int(tokens.replace(",", "")))

    used = lever(of, "prompt_cache")
    assert used is not None
    assert (used.saving_nanousd, used.detail) == (
        0,
        f"off: {tokens} tokens, read too seldom to pay",
    )
    assert of.per_call_nanousd == 2_000_000


@pytest.mark.parametrize(("tokens", "how"), [(511, "off"), (512, "5m")])
def test_a_prefix_has_to_be_long_enough(tokens: int, how: str) -> None:
    of = kept(50_000, cached_prefix_tokens=tokens)

    assert of.prompt_cache == how
    used = lever(of, "prompt_cache")
    assert used is not None
    assert ("kept from 512 on" in used.detail) == (how == "off")


def test_calls_that_the_response_cache_answers_do_not_keep_a_prefix() -> None:
    """Of 288 calls at a hit rate of 95 % but 14.4 are paid, too few for an hour."""
    assert kept(288, cache_hit_rate="95%").prompt_cache == "off"


def test_a_prefix_of_a_long_prompt_costs_the_long_context_price() -> None:
    """Haiku above 100,000 tokens: 0.999999 x 50 + 0.000001 x 625 nano-dollars a token."""
    of = estimate(
        HAIKU,
        calls_per_day=50_000,
        input_tokens=200_000,
        output_tokens=0,
        cached_prefix_tokens=200_000,
    )

    assert of.per_call_nanousd == 10_000_115


def test_some_call_always_writes() -> None:
    """Of however many calls, one in a million: 99.9999 + 0.0025 a token."""
    assert kept(1_000_000_000).per_call_nanousd == 100_003  # 100,002.4


def test_in_a_batch_few_calls_find_the_prefix() -> None:
    """Half of 0.3 x 100 + 0.7 x 2,500 = 1,780 a token."""
    of = kept(50_000, batch=True)

    assert (of.prompt_cache, of.per_call_nanousd) == ("5m", 890_000)


def test_the_callers_decimal_context_changes_nothing() -> None:
    expected = kept(300, cache_hit_rate="12.3456789%")

    with localcontext(Context(prec=2)):
        assert kept(300, cache_hit_rate="12.3456789%") == expected


@pytest.mark.parametrize(
    "model",
    [*LISTED_MODELS, "claude-opus-4-1", "claude-3-5-haiku-20241022", "claude-sonnet-4-20250514"],
)
def test_the_minimum_prefix_is_the_apis(model: str) -> None:
    assert minimum_prefix(model) == limits_of(model).minimum_cached_prefix


# The levers --------------------------------------------------------------------------------------


def test_every_lever_is_offered_with_its_figures() -> None:
    """Of Opus at 1,000 calls of 1,000 + 100 tokens: $0.006 a call, $180 a month."""
    of = estimate(OPUS)

    assert {(each.name, each.detail): each.saving for each in of.levers} == {
        # 1,000 x $0.10 + 100 x $0.50 per million: $0.00015 a call, $4.50 a month.
        ("model", HAIKU): Decimal("175.5"),
        ("model", SONNET): Decimal(90),
        ("batch", "answers within 24 hours"): Decimal(90),
        ("response_cache", "20 % of calls answered from it"): Decimal(36),
        # 25 tokens less at $20 per million.
        ("output", "answers of 75 tokens"): Decimal(15),
    }
    assert not any(each.used for each in of.levers)


def test_the_prompt_cache_is_offered_for_half_of_the_prompt() -> None:
    """2,000 tokens of which 1,000 are read by all but one in a million of 50,000 calls.

    In their place of 1,000 x 2,000 nano-dollars come 0.999999 x 100 + 0.000001 x 2,500.
    """
    of = estimate(calls_per_day=50_000, input_tokens=2_000)

    found = lever(of, "prompt_cache")
    assert found is not None
    assert found.detail == "1,000 tokens for 5m, 99.9 % reads"
    assert found.saving_nanousd == 50_000 * 30 * 2_000_000 - 150_000 * 1_000_024


def test_the_most_helpful_comes_first() -> None:
    of = estimate(OPUS)
    savings = [each.saving for each in of.levers]

    assert savings == sorted(savings, reverse=True)
    assert of.best_lever == of.levers[0]


def test_levers_in_use_come_before_those_that_are_left() -> None:
    of = estimate(OPUS, cache_hit_rate="1%")

    assert [each.used for each in of.levers] == [True] + [False] * (len(of.levers) - 1)
    assert of.best_lever is not None
    assert not of.best_lever.used


def test_a_lever_in_use_tells_what_the_bill_would_be_without_it() -> None:
    of = estimate(cache_hit_rate="25%", batch=True)  # 90 x 0.75 x 0.5

    hits, halved = lever(of, "response_cache"), lever(of, "batch")
    assert of.per_month == Decimal("33.75")
    assert hits is not None
    assert halved is not None
    assert (hits.saving, hits.saving_percent) == (Decimal("11.25"), Decimal("25.0"))
    assert (halved.saving, halved.saving_percent) == (Decimal("33.75"), Decimal("50.0"))


def test_a_batch_is_not_offered_where_the_prompt_cache_saves_more() -> None:
    assert "batch" not in offered(kept(50_000))


def test_a_lever_in_use_that_costs_more_says_so() -> None:
    """890 a token in batches; 100.0024 at once."""
    halved = lever(kept(50_000, batch=True), "batch")

    assert halved is not None
    assert halved.used
    assert halved.saving_nanousd < 0


def test_the_tiers_below_are_offered_and_none_above() -> None:
    assert lever(estimate(SONNET), "model", HAIKU) is not None
    assert lever(estimate(SONNET), "model", OPUS) is None
    assert lever(estimate(HAIKU), "model") is None


def test_a_model_outside_the_tiers_is_offered_those_that_are_cheaper() -> None:
    of = estimate("claude-haiku-4-5")  # 1 / 5: above Haiku 5.5, below Sonnet 5.5

    assert [each.detail for each in of.levers if each.name == "model"] == [HAIKU]


def test_a_tier_without_a_price_is_not_offered(settings: Settings) -> None:
    settings.AI_BUDGET = {"TIERS": ["claude-nonsense", HAIKU, SONNET]}

    assert [each.detail for each in estimate().levers if each.name == "model"] == [HAIKU]


def test_a_tier_that_cannot_read_so_much_is_not_offered(settings: Settings) -> None:
    settings.AI_BUDGET = {"TIERS": ["claude-haiku-4-5", OPUS]}

    assert lever(estimate(OPUS, input_tokens=200_000, output_tokens=0), "model") is not None
    assert lever(estimate(OPUS, input_tokens=200_000, output_tokens=1), "model") is None


def test_answers_of_nothing_cannot_be_shorter() -> None:
    assert "output" not in offered(estimate(output_tokens=0))
    assert "output" not in offered(estimate(output_tokens=1))


@pytest.mark.parametrize(("calls", "reconsider"), [(400_000, False), (400_001, True)])
def test_above_ten_thousand_dollars_a_month_it_is_to_be_reconsidered(
    calls: int, reconsider: bool
) -> None:
    """500 x $2 per million x 400,000 x 25 are $10,000."""
    of = estimate(calls_per_day=calls, days=25, input_tokens=500, output_tokens=0)

    assert of.reconsider is reconsider


# Usage that makes no sense -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"calls_per_day": 0}, "Calls a day must be a whole number from 1"),
        ({"calls_per_day": -1}, "Calls a day"),
        ({"calls_per_day": 1_000_000_001}, "to 1,000,000,000"),
        ({"input_tokens": 0}, "Input tokens must be a whole number from 1 on, not 0"),
        ({"output_tokens": -1}, "Output tokens must be a whole number from 0 on, not -1"),
        ({"cached_prefix_tokens": -1}, "Tokens of the cached prefix"),
        ({"cached_prefix_tokens": 1_001}, r"longer than the prompt .* \(1,000 tokens\)"),
        ({"days": 0}, "Days must be a whole number from 1 to 31"),
        ({"days": 32}, "Days"),
        ({"input_tokens": 1_000_000}, r"context window .* \(1,000,000 tokens\)"),
        ({"cache_hit_rate": "130%"}, "A share is from 0 to 1"),
    ],
)
def test_usage_that_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        estimate(**given)


@pytest.mark.parametrize("value", [1.0, True, "5", None])
@pytest.mark.parametrize("name", ["calls_per_day", "input_tokens", "output_tokens", "days"])
def test_counts_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match="whole number"):
        estimate(**{name: value})


def test_a_model_without_a_price_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnpricedModel, match="add a model rate"):
        estimate("claude-nonsense")


@pytest.mark.parametrize(
    ("value", "share"),
    [
        (0, "0"),
        (1, "1"),
        ("0.3", "0.3"),
        ("30%", "0.3"),
        (" 30 % ", "0.3"),
        ("100%", "1"),
        (Decimal("0.123456789"), "0.123456789"),
        (Fraction(1, 8), "0.125"),
        (Decimal("0E-999999999"), "0"),
        ("-0", "0"),
    ],
)
def test_a_share_is_read_exactly(value: Any, share: str) -> None:
    assert read_share(value) == Fraction(share)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "%",
        "a third",
        "nan",
        "inf",
        "-0.1",
        "1.1",
        "101%",
        "30",
        "0.1234567891",
        "1e-999999999",
        "1e999999999",
        Fraction(1, 3),
        2,
    ],
)
def test_what_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="A share is from 0 to 1"):
        read_share(value)


@pytest.mark.parametrize("value", [0.3, True, None])
def test_a_float_is_no_exact_share(value: Any) -> None:
    with pytest.raises(TypeError, match="A share is a Decimal, int or str"):
        read_share(value)


# For any usage -----------------------------------------------------------------------------------

models = st.sampled_from([OPUS, SONNET, HAIKU, "claude-haiku-4-5", "claude-sonnet-4-5"])
shares = st.integers(0, 10**9).map(lambda billionths: Fraction(billionths, 10**9))


@st.composite
def usages(draw: st.DrawFn) -> dict[str, Any]:
    tokens = draw(st.integers(1, 150_000))
    return {
        "calls_per_day": draw(st.integers(1, 100) | st.integers(1, 1_000_000_000)),
        "input_tokens": tokens,
        "output_tokens": draw(st.integers(0, 50_000)),
        "cache_hit_rate": draw(st.just(0) | shares),
        "cached_prefix_tokens": draw(st.just(0) | st.integers(0, tokens)),
        "batch": draw(st.booleans()),
        "days": draw(st.integers(1, 31)),
    }


@given(models, usages())
def test_without_a_cache_a_call_costs_its_price(model: str, usage: dict[str, Any]) -> None:
    usage.update(cache_hit_rate=0, cached_prefix_tokens=0)
    tokens = Usage(input_tokens=usage["input_tokens"], output_tokens=usage["output_tokens"])

    of = estimate(model, **usage)

    assert of.per_call_nanousd == ai_budget.price(model, tokens, NOW, usage["batch"])


@given(models, usages())
def test_the_figures_agree_up_to_their_rounding(model: str, usage: dict[str, Any]) -> None:
    of = estimate(model, **usage)

    assert 0 <= of.per_call_nanousd * of.calls_per_day - of.per_day_nanousd < of.calls_per_day
    assert 0 <= of.per_day_nanousd * of.days - of.per_month_nanousd < of.days


@given(models, usages())
def test_a_cached_prefix_never_costs_more_than_none(model: str, usage: dict[str, Any]) -> None:
    with_it = estimate(model, **usage)
    without = estimate(model, **{**usage, "cached_prefix_tokens": 0})

    assert with_it.per_month_nanousd <= without.per_month_nanousd


@given(models, usages())
def test_a_call_never_costs_less_than_if_all_of_the_prefix_were_read(
    model: str, usage: dict[str, Any]
) -> None:
    usage["cache_hit_rate"] = 0
    prefix = usage["cached_prefix_tokens"]
    best = Usage(
        input_tokens=usage["input_tokens"] - prefix,
        cache_read_tokens=prefix,
        output_tokens=usage["output_tokens"],
    )

    of = estimate(model, **usage)

    assert of.per_call_nanousd >= ai_budget.price(model, best, NOW, usage["batch"])


@given(models, usages())
def test_a_lever_that_is_offered_saves_what_it_says(model: str, usage: dict[str, Any]) -> None:
    of = estimate(model, **usage)

    for each in of.levers:
        if each.used:
            continue
        changed: dict[str, Any] = {
            "response_cache": {"cache_hit_rate": "20%"},
            "prompt_cache": {"cached_prefix_tokens": usage["input_tokens"] // 2},
            "batch": {"batch": True},
            "output": {"output_tokens": -(-usage["output_tokens"] * 3 // 4)},
            "model": {"model": each.detail},
        }[each.name]
        then = estimate(**{"model": model, **usage, **changed})
        assert each.saving_nanousd > 0
        assert then.per_month_nanousd == each.per_month_nanousd
        assert of.per_month_nanousd - each.saving_nanousd == each.per_month_nanousd


@given(models, usages())
def test_a_lever_in_use_saves_against_the_usage_without_it(
    model: str, usage: dict[str, Any]
) -> None:
    of = estimate(model, **usage)

    for each in of.levers:
        if each.used:
            name = {
                "response_cache": "cache_hit_rate",
                "prompt_cache": "cached_prefix_tokens",
                "batch": "batch",
            }[each.name]
            without = estimate(model, **{**usage, name: 0 if name != "batch" else False})
            assert each.saving_nanousd == without.per_month_nanousd - of.per_month_nanousd
            assert each.per_month_nanousd == of.per_month_nanousd
