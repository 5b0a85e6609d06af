"""Where prices come from, which row wins over which, and for how long they are remembered."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import OperationalError
from django.db.models.query import QuerySet
from genai_prices import data_snapshot
from pytest_django import Settings

from ai_budget import periods, price
from ai_budget.exceptions import UnpricedModel
from ai_budget.models import ModelRate
from ai_budget.money import parse_usd
from ai_budget.pricing import rates
from ai_budget.pricing.cost import cost
from ai_budget.pricing.rates import ModelRates, resolve
from ai_budget.pricing.usage import read_usage
from tests.factories import ModelRateFactory

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
OPUS, SONNET, HAIKU = "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"
MILLION = 1_000_000
INPUT, OUTPUT = {"input_tokens": MILLION}, {"output_tokens": MILLION}
FAST_INPUT = {**INPUT, "speed": "fast"}
PRICES = {"input_usd": None, "output_usd": None}


def add_rate(**fields: Any) -> ModelRate:
    """A row in force since yesterday that prices nothing, but for what is said."""
    given = {"model": SONNET, "valid_from": NOW - timedelta(days=1), **PRICES, **fields}
    row: ModelRate = ModelRateFactory.create(**given)
    rates.forget()
    return row


def usd(dollars: str) -> int:
    return parse_usd(dollars)


# By date -----------------------------------------------------------------------------------------


def test_a_row_wins_from_its_moment_on_in_the_middle_of_a_day() -> None:
    add_rate(input_usd="1.7", valid_from=NOW)

    assert price(SONNET, INPUT, at=NOW - timedelta(microseconds=1)) == usd("2")
    assert price(SONNET, INPUT, at=NOW) == usd("1.7")
    assert price(SONNET, INPUT, at=NOW + timedelta(days=400)) == usd("1.7")


def test_a_row_ends_at_its_moment() -> None:
    add_rate(input_usd="1.7", valid_until=NOW)

    assert price(SONNET, INPUT, at=NOW - timedelta(microseconds=1)) == usd("1.7")
    assert price(SONNET, INPUT, at=NOW) == usd("2")


def test_moments_are_asked_for_in_any_order() -> None:
    add_rate(input_usd="1.7", valid_from=NOW, valid_until=NOW + timedelta(hours=1))
    hours = [3, 0, -1, 1, 0, -30, 2, 0, 30]

    costs = [price(SONNET, INPUT, at=NOW + timedelta(hours=hour)) for hour in hours]

    assert costs == [usd("1.7") if hour == 0 else usd("2") for hour in hours]


def test_the_later_of_two_rows_wins() -> None:
    add_rate(input_usd="1.7", valid_from=NOW - timedelta(days=2))
    add_rate(input_usd="1.5", valid_from=NOW)

    assert price(SONNET, INPUT, at=NOW - timedelta(hours=1)) == usd("1.7")
    assert price(SONNET, INPUT, at=NOW) == usd("1.5")


def test_when_the_later_row_ends_the_earlier_one_is_in_force_again() -> None:
    add_rate(input_usd="1.7")
    add_rate(input_usd="1.5", valid_from=NOW, valid_until=NOW + timedelta(hours=1))

    assert price(SONNET, INPUT, at=NOW + timedelta(hours=1)) == usd("1.7")


# What a row covers -------------------------------------------------------------------------------


def test_empty_prices_are_the_librarys() -> None:
    add_rate(input_usd="1.7")

    assert price(SONNET, OUTPUT, at=NOW) == usd("10")
    assert price(SONNET, {"cache_read_input_tokens": MILLION}, at=NOW) == usd("0.10")


def test_empty_prices_are_those_of_the_row_before_where_it_has_some() -> None:
    add_rate(input_usd="1.7", valid_from=NOW - timedelta(days=2))
    add_rate(output_usd="8")

    assert price(SONNET, {**INPUT, **OUTPUT}, at=NOW) == usd("9.7")


@pytest.mark.parametrize(
    ("field", "usage"),
    [
        ("input_usd", INPUT),
        ("output_usd", OUTPUT),
        ("cache_write_5m_usd", {"cache_creation_input_tokens": MILLION}),
        ("cache_write_1h_usd", {"cache_creation": {"ephemeral_1h_input_tokens": MILLION}}),
        ("cache_read_usd", {"cache_read_input_tokens": MILLION}),
        ("web_search_usd", {"server_tool_use": {"web_search_requests": 1_000}}),
    ],
)
@pytest.mark.parametrize("dollars", ["0", "0.123456789", "7"])
def test_each_price_of_a_row_is_charged(field: str, usage: dict[str, Any], dollars: str) -> None:
    add_rate(**{field: dollars})

    assert price(SONNET, usage, at=NOW) == usd(dollars)


def test_a_discount_need_not_be_whole_nano_dollars_a_token() -> None:
    add_rate(input_usd="0.000000001")

    assert price(SONNET, {"input_tokens": 1}, at=NOW) == 1
    assert price(SONNET, INPUT, at=NOW) == 1
    assert price(SONNET, {"input_tokens": MILLION + 1}, at=NOW) == 2


def test_batches_and_us_inference_go_by_the_row() -> None:
    add_rate(input_usd="1.7")

    assert price(SONNET, {**INPUT, "inference_geo": "us"}, at=NOW, batch=True) == usd("0.935")


def test_a_row_is_for_its_own_model() -> None:
    add_rate(model="claude-opus-5", input_usd="1")

    assert price("claude-opus-5-5", INPUT, at=NOW) == usd("4")


@pytest.mark.parametrize(
    "name", ["claude-opus-4-5-20251101", "claude-opus-4-5@20251101", "claude-opus-4-5"]
)
def test_a_row_is_for_the_dated_names_of_its_model(name: str) -> None:
    add_rate(model="claude-opus-4-5", input_usd="1")

    assert price(name, INPUT, at=NOW) == usd("1")


@pytest.mark.parametrize("name", ["claude-opus-4-50", "claude-opus-4-5-turbo", "claude-opus-4-5-1"])
def test_a_row_is_not_for_names_that_only_begin_alike(name: str) -> None:
    add_rate(model="claude-opus-4-5", input_usd="1")

    with pytest.raises(UnpricedModel):
        price(name, INPUT, at=NOW)


def test_a_row_for_the_dated_name_wins_over_a_later_one_for_all_dates() -> None:
    add_rate(model="claude-opus-4-5-20251101", input_usd="1", valid_from=NOW - timedelta(days=9))
    add_rate(model="claude-opus-4-5", input_usd="3")

    assert price("claude-opus-4-5-20251101", INPUT, at=NOW) == usd("1")
    assert price("claude-opus-4-5", INPUT, at=NOW) == usd("3")


def test_a_row_is_for_its_own_provider() -> None:
    add_rate(provider="vertex", input_usd="1")

    assert price(SONNET, INPUT, at=NOW) == usd("2")
    assert price(SONNET, INPUT, at=NOW, provider="vertex") == usd("1")


def test_a_row_for_a_region_wins_there_over_a_later_one_for_everywhere() -> None:
    add_rate(
        provider="vertex", region="us-east5", input_usd="2.2", valid_from=NOW - timedelta(days=9)
    )
    add_rate(provider="vertex", input_usd="1.9")

    assert price(SONNET, INPUT, at=NOW, provider="vertex", region="us-east5") == usd("2.2")
    assert price(SONNET, INPUT, at=NOW, provider="vertex", region="europe-west1") == usd("1.9")
    assert price(SONNET, INPUT, at=NOW, provider="vertex") == usd("1.9")


# Bands and speeds --------------------------------------------------------------------------------


def test_a_row_for_long_prompts_leaves_short_ones_as_they_are() -> None:
    add_rate(prompt_tokens_above=500_000, input_usd="3")

    assert price(SONNET, {"input_tokens": 500_000}, at=NOW) == usd("1")
    assert price(SONNET, {"input_tokens": 500_001}, at=NOW) == 500_001 * 3_000


def test_a_row_for_short_prompts_leaves_the_librarys_tier_for_long_ones() -> None:
    add_rate(model=HAIKU, input_usd="0.05")

    assert price(HAIKU, {"input_tokens": 100_000}, at=NOW) == usd("0.005")
    assert price(HAIKU, {"input_tokens": 100_001}, at=NOW) == 100_001 * 500


def test_a_row_for_long_prompts_inherits_from_the_band_beneath() -> None:
    add_rate(model=HAIKU, prompt_tokens_above=500_000, input_usd="9")
    usage = {"input_tokens": 500_001, "output_tokens": MILLION}

    assert price(HAIKU, usage, at=NOW) == 500_001 * 9_000 + usd("2.50")


def test_a_fast_row_changes_only_fast_requests() -> None:
    add_rate(model=OPUS, speed=ModelRate.Speed.FAST, input_usd="6")

    assert price(OPUS, FAST_INPUT, at=NOW) == usd("6")
    assert price(OPUS, INPUT, at=NOW) == usd("4")
    assert price(OPUS, {**OUTPUT, "speed": "fast"}, at=NOW) == usd("40")


def test_a_standard_row_leaves_fast_requests_as_they_are() -> None:
    add_rate(model=OPUS, input_usd="3")

    assert price(OPUS, FAST_INPUT, at=NOW) == usd("8")


def test_a_fast_row_gives_fast_prices_to_a_model_without() -> None:
    add_rate(speed=ModelRate.Speed.FAST, input_usd="4", output_usd="20")

    assert price(SONNET, FAST_INPUT, at=NOW) == usd("4")
    assert price(SONNET, {"cache_creation_input_tokens": MILLION, "speed": "fast"}, at=NOW) == (
        usd("5")
    )


def test_half_a_fast_row_is_no_price() -> None:
    add_rate(speed=ModelRate.Speed.FAST, input_usd="4")

    with pytest.raises(UnpricedModel):
        price(SONNET, FAST_INPUT, at=NOW)


# Models the library does not know ----------------------------------------------------------------


def test_a_row_prices_an_unknown_model() -> None:
    add_rate(model="claude-nova-9", input_usd="1", output_usd="4")

    assert price("claude-nova-9", {**INPUT, **OUTPUT}, at=NOW) == usd("5")


def test_cache_prices_of_an_unknown_model_follow_from_its_input() -> None:
    add_rate(model="claude-nova-9", input_usd="1", output_usd="4")
    usage = {
        "cache_creation": {
            "ephemeral_5m_input_tokens": MILLION,
            "ephemeral_1h_input_tokens": MILLION,
        },
        "cache_read_input_tokens": MILLION,
    }

    assert price("claude-nova-9", usage, at=NOW) == usd("1.25") + usd("2") + usd("1")


def test_half_a_row_does_not_price_an_unknown_model() -> None:
    add_rate(model="claude-nova-9", input_usd="1")

    with pytest.raises(UnpricedModel):
        price("claude-nova-9", INPUT, at=NOW)


def test_an_unknown_model_is_unpriced_before_its_row() -> None:
    add_rate(model="claude-nova-9", input_usd="1", output_usd="4", valid_from=NOW)

    with pytest.raises(UnpricedModel):
        price("claude-nova-9", INPUT, at=NOW - timedelta(seconds=1))


def test_the_dearest_known_rate_may_be_that_of_a_row(settings: Settings) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNPRICED_MODEL": "allow"}
    add_rate(model="claude-nova-9", input_usd="300", output_usd="900")

    assert price("claude-nova-10", INPUT, at=NOW) == usd("300")


# The reference -----------------------------------------------------------------------------------


def test_a_reference_is_the_same_as_long_as_the_prices_are() -> None:
    first = resolve(SONNET, at=NOW).reference
    rates.forget()

    assert resolve(SONNET, at=NOW).reference == first


@pytest.mark.parametrize(
    "change",
    [
        {"input_usd": "1.7"},
        {"output_usd": "9"},
        {"cache_read_usd": "0.11"},
        {"web_search_usd": "9"},
        {"prompt_tokens_above": 500_000, "input_usd": "3"},
        {"speed": "fast", "input_usd": "4", "output_usd": "20"},
    ],
    ids=str,
)
def test_a_reference_changes_with_any_price(change: dict[str, Any]) -> None:
    before = resolve(SONNET, at=NOW).reference
    row = add_rate(**change)

    after = resolve(SONNET, at=NOW).reference

    assert after != before
    assert f"model rate {row.pk}" in after


def test_a_reference_tells_where_the_prices_are_from() -> None:
    assert resolve(SONNET, at=NOW).reference.startswith("genai-prices ")


# For how long ------------------------------------------------------------------------------------


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    later = periods.monotonic() + seconds
    monkeypatch.setattr(periods, "monotonic", lambda: later)


def test_a_row_that_was_added_elsewhere_is_seen_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert price(SONNET, INPUT, at=NOW) == usd("2")
    ModelRateFactory.create(
        model=SONNET, valid_from=NOW - timedelta(days=1), **{**PRICES, "input_usd": "1.7"}
    )

    pass_time(monkeypatch, 11)

    assert price(SONNET, INPUT, at=NOW) == usd("1.7")


@pytest.mark.parametrize(
    ("change", "dollars"),
    [
        ({"input_usd": "1.6"}, "1.6"),
        ({"valid_until": NOW}, "2"),
        ({"valid_from": NOW + timedelta(hours=1)}, "2"),
        ({"model": OPUS}, "2"),
        ({"provider": "vertex"}, "2"),
        ({"region": "us-east5"}, "2"),
    ],
    ids=str,
)
def test_a_row_that_was_changed_elsewhere_is_seen_within_seconds(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], dollars: str
) -> None:
    row = add_rate(input_usd="1.7")
    assert price(SONNET, INPUT, at=NOW) == usd("1.7")
    ModelRate.objects.filter(pk=row.pk).update(**change)

    pass_time(monkeypatch, 11)

    assert price(SONNET, INPUT, at=NOW) == usd(dollars)


def test_a_row_that_was_deleted_elsewhere_is_gone_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = add_rate(input_usd="1.7")
    assert price(SONNET, INPUT, at=NOW) == usd("1.7")
    row.delete()

    pass_time(monkeypatch, 11)

    assert price(SONNET, INPUT, at=NOW) == usd("2")


def test_a_change_in_this_process_is_seen_at_once_after_forgetting() -> None:
    row = add_rate(input_usd="1.7")
    price(SONNET, INPUT, at=NOW)
    ModelRate.objects.filter(pk=row.pk).update(input_usd="1.6")

    rates.forget()

    assert price(SONNET, INPUT, at=NOW) == usd("1.6")


def test_new_prices_of_the_library_are_seen_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert price(SONNET, INPUT, at=NOW) == usd("2")
    old = data_snapshot.get_snapshot()
    providers = [
        replace(
            provider,
            models=[
                replace(info, match=replace(info.match), prices=_doubled(info.get_prices(NOW)))
                for info in provider.models
                if info.id == SONNET
            ],
        )
        for provider in old.providers
        if provider.id == "anthropic"
    ]
    new = data_snapshot.DataSnapshot(providers=providers, from_auto_update=True)
    monkeypatch.setattr(data_snapshot, "get_snapshot", lambda: new)

    pass_time(monkeypatch, 11)

    assert price(SONNET, INPUT, at=NOW) == usd("4")


def _doubled(prices: Any) -> Any:
    return type(prices)(**{name: value * 2 for name, value in vars(prices).items()})


def test_a_table_that_cannot_be_read_changes_no_price(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_rate(input_usd="1.7")
    assert price(SONNET, INPUT, at=NOW) == usd("1.7")

    def fail(*args: Any) -> Any:
        raise OperationalError("gone away")

    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "ai_budget"):
        broken.setattr(QuerySet, "_fetch_all", fail)
        pass_time(broken, 11)
        assert price(SONNET, INPUT, at=NOW) == usd("1.7")
        assert price(SONNET, INPUT, at=NOW - timedelta(hours=20)) == usd("1.7")
    assert "cannot be read" in caplog.text

    pass_time(monkeypatch, 11)
    assert price(SONNET, INPUT, at=NOW) == usd("1.7")


def test_prices_are_known_before_the_table_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_rate(input_usd="1.7")

    def fail(*args: Any) -> Any:
        raise OperationalError("no such table")

    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "ai_budget"):
        broken.setattr(QuerySet, "_fetch_all", fail)
        assert price(SONNET, INPUT, at=NOW) == usd("2")

    assert price(SONNET, INPUT, at=NOW) == usd("1.7")


def test_what_a_slower_thread_resolved_by_old_rows_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = add_rate(input_usd="1.7")
    resolving, changed = threading.Event(), threading.Event()
    from_library = rates._from_library
    price(OPUS, INPUT, at=NOW)  # the rows are read

    def wait_in_the_middle(*args: Any) -> Any:
        if threading.current_thread() is slow:
            resolving.set()
            changed.wait(10)
        return from_library(*args)

    monkeypatch.setattr(rates, "_from_library", wait_in_the_middle)
    slow = threading.Thread(target=lambda: price(SONNET, INPUT, at=NOW))
    slow.start()
    assert resolving.wait(10)
    ModelRate.objects.filter(pk=row.pk).update(input_usd="1.6")
    pass_time(monkeypatch, 11)
    price(OPUS, INPUT, at=NOW)  # the rows are read again
    changed.set()
    slow.join()

    assert price(SONNET, INPUT, at=NOW) == usd("1.6")


def test_the_memory_of_prices_has_an_end() -> None:
    for day in range(30):
        price(SONNET, INPUT, at=NOW + timedelta(days=day))

    assert price(SONNET, INPUT, at=NOW) == usd("2")
    assert all(len(kept) <= 8 for kept in rates._known.resolved.values())


# Prices that were frozen -------------------------------------------------------------------------

USED = {
    "input_tokens": 1_234,
    "cache_creation": {"ephemeral_5m_input_tokens": 777, "ephemeral_1h_input_tokens": 555},
    "cache_read_input_tokens": 4_321,
    "output_tokens": 999,
    "server_tool_use": {"web_search_requests": 3},
}
"""Something of everything that has a price."""


@pytest.mark.parametrize(
    ("model", "used"),
    [
        (OPUS, USED),
        (OPUS, {**USED, "speed": "fast"}),
        (SONNET, {**USED, "inference_geo": "us"}),
        (HAIKU, {**USED, "input_tokens": 250_000}),
        ("claude-sonnet-4-5", {**USED, "input_tokens": 250_000, "inference_geo": "us"}),
    ],
    ids=["plain", "fast", "us", "long", "before there was US inference"],
)
@pytest.mark.parametrize("batch", [False, True])
def test_a_reference_costs_what_the_prices_cost_that_it_was_made_of(
    model: str, used: dict[str, Any], batch: bool
) -> None:
    given, usage = resolve(model, at=NOW), read_usage(used)

    frozen = ModelRates.of_reference(given.reference, provider="anthropic")

    assert cost(frozen, usage, at=NOW, batch=batch) == cost(given, usage, at=NOW, batch=batch)
    assert frozen.reference == given.reference


def test_a_reference_keeps_the_projects_own_prices() -> None:
    add_rate(input_usd="1.7", web_search_usd="12")
    given = resolve(SONNET, at=NOW)
    ModelRate.objects.all().delete()
    rates.forget()

    frozen = ModelRates.of_reference(given.reference, provider="anthropic")

    usage = read_usage({**INPUT, "server_tool_use": {"web_search_requests": 1_000}})
    assert cost(frozen, usage, at=NOW) == usd("13.7")


def test_a_reference_keeps_the_dearest_prices_of_a_model_that_has_none(settings: Settings) -> None:
    settings.AI_BUDGET = {**settings.AI_BUDGET, "UNPRICED_MODEL": "allow"}
    given = resolve("claude-of-tomorrow", at=NOW)

    frozen = ModelRates.of_reference(given.reference, provider="anthropic")

    assert frozen.standard == given.standard
    assert frozen.fast == given.fast


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "genai-prices",
        "genai-prices; claude-haiku-5-5",
        "genai-prices; claude-haiku-5-5; standard>0=1/2/3; 10; us=11/10",
        "genai-prices; claude-haiku-5-5; standard>0=a/b/c/d/e; 10; us=11/10",
        "genai-prices; claude-haiku-5-5; standard>0=1/2/3/4/5; 10; us=11",
        "genai-prices; claude-haiku-5-5; standard>0=1/2/3/4/5; ten; us=11/10",
    ],
)
def test_what_is_no_reference_is_refused(reference: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|literal|zip"):
        ModelRates.of_reference(reference, provider="anthropic")
