"""FOCUS 1.2: https://focus.finops.org/focus-specification/v1-2/"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_django.fixtures import Settings

from ai_budget import money
from ai_budget.models import CallLog
from ai_budget.pricing import rates
from ai_budget.pricing.cost import price
from ai_budget.review import rollups
from ai_budget.review.focus import COLUMNS, focus_lines, split
from ai_budget.review.spans import Span
from ai_budget.values import Usage
from tests.factories import (
    HAIKU,
    OPUS,
    SONNET,
    CallLogFactory,
    FeatureBudgetFactory,
    ModelRateFactory,
    mark,
)
from tests.review.conftest import NOW

Status = CallLog.Status

NUMBERS = (
    "BilledCost",
    "EffectiveCost",
    "ListCost",
    "ContractedCost",
    "PricingQuantity",
    "ConsumedQuantity",
    "ListUnitPrice",
    "ContractedUnitPrice",
)
NULLABLE = {"ChargeClass", "x_Category"}


def exported(span: Span) -> list[dict[str, str]]:
    return list(csv.DictReader(focus_lines(span)))


def by_class(span: Span) -> dict[str, dict[str, str]]:
    return {row["SkuMeter"]: row for row in exported(span)}


# Splitting ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**70), st.lists(st.integers(0, 2**60), min_size=1, max_size=8))
def test_a_cost_is_split_to_the_nano_dollar_and_in_proportion(
    amount: int, weights: list[int]
) -> None:
    shares = split(amount, weights)

    assert sum(shares) == amount
    whole = sum(weights)
    for share, weight in zip(shares, weights, strict=True):
        if whole:
            # Each is its part of the whole, rounded down or up.
            assert amount * weight // whole <= share <= -(-amount * weight // whole)
        assert share >= 0


def test_what_is_left_over_goes_to_the_largest_remainders() -> None:
    assert split(10, [1, 1, 1]) == [4, 3, 3]
    assert split(100, [3333, 3333, 3334]) == [33, 33, 34]
    assert split(5, [0, 0]) == [3, 2]


# Rows --------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_row_says_what_was_used_and_at_which_price(october: Span) -> None:
    usage = Usage(
        input_tokens=1_000,
        cache_write_5m_tokens=200,
        cache_write_1h_tokens=30,
        cache_read_tokens=4_000,
        output_tokens=500,
        web_searches=2,
    )
    CallLogFactory.create(
        category="product",
        cost_nanousd=price(SONNET, usage, NOW),
        input_tokens=1_000,
        cache_write_5m_tokens=200,
        cache_write_1h_tokens=30,
        cache_read_tokens=4_000,
        output_tokens=500,
        web_searches=2,
    )
    table = rates.resolve(SONNET, at=NOW).standard[0].rates

    rows = by_class(october)

    assert list(rows) == [
        "uncached input",
        "cache write 5m",
        "cache write 1h",
        "cache read",
        "output",
        "web searches",
    ]
    output = rows["output"]
    per_token = money.to_usd(table.output) / 1_000_000
    assert Decimal(output["ContractedUnitPrice"]) == Decimal(output["ListUnitPrice"]) == per_token
    assert Decimal(output["BilledCost"]) == 500 * per_token
    assert output["PricingQuantity"] == output["ConsumedQuantity"] == "500"
    assert output["PricingUnit"] == output["ConsumedUnit"] == "Tokens"
    assert rows["web searches"]["PricingUnit"] == "Searches"
    assert Decimal(rows["web searches"]["BilledCost"]) == Decimal("0.02")
    assert {
        name: output[name]
        for name in output
        if not name.endswith(("Cost", "Price", "Quantity", "Unit"))
    } == {
        "BillingAccountId": "anthropic",
        "BillingAccountName": "Anthropic",
        "BillingCurrency": "USD",
        "BillingPeriodStart": "2026-10-01T00:00:00Z",
        "BillingPeriodEnd": "2026-11-01T00:00:00Z",
        "ChargeCategory": "Usage",
        "ChargeClass": "",
        "ChargeDescription": f"{SONNET}: output",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": "2026-10-15T00:00:00Z",
        "ChargePeriodEnd": "2026-10-16T00:00:00Z",
        "InvoiceIssuerName": "Anthropic",
        "PricingCategory": "Standard",
        "ProviderName": "Anthropic",
        "PublisherName": "Anthropic",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Claude API",
        "ServiceSubcategory": "Generative AI",
        "SkuId": f"anthropic/{SONNET}/output",
        "SkuMeter": "output",
        "SkuPriceId": f"anthropic/{SONNET}/output/standard",
        "SubAccountId": "chat",
        "SubAccountName": "chat",
        "Tags": '{"feature": "chat", "category": "product"}',
        "x_Batch": "false",
        "x_Category": "product",
        "x_Feature": "chat",
        "x_Model": SONNET,
        "x_TokenClass": "output",
    }


@pytest.mark.django_db
def test_batches_stand_apart_at_half_the_price(october: Span) -> None:
    usage = Usage(input_tokens=100, output_tokens=50, web_searches=1)
    for kind, batch in (("ask", False), ("batch", True)):
        cost = price(SONNET, usage, NOW, batch)
        CallLogFactory.create(kind=kind, cost_nanousd=cost, web_searches=1)

    rows = {
        row["SkuPriceId"].removeprefix(f"anthropic/{SONNET}/"): row for row in exported(october)
    }

    assert len(rows) == 6
    for name in ("BilledCost", "ContractedUnitPrice", "ListUnitPrice"):
        single = Decimal(rows["output/standard"][name])
        assert Decimal(rows["output/batch"][name]) * 2 == single
        searches = rows["web searches/standard"][name]
        assert rows["web searches/batch"][name] == searches
    assert rows["output/batch"]["x_Batch"] == "true"


@pytest.mark.django_db
def test_a_negotiated_price_stands_beside_the_published_one(october: Span) -> None:
    ModelRateFactory.create(
        model=SONNET, input_usd=0, output_usd=1, valid_from=NOW - timedelta(days=30)
    )
    rates.forget()
    CallLogFactory.create(cost_nanousd=50_000)
    listed = rates.published(SONNET, at=NOW)
    assert listed is not None

    output = by_class(october)["output"]

    assert Decimal(output["ContractedUnitPrice"]) == Decimal("0.000001")
    assert Decimal(output["ContractedCost"]) == Decimal("0.00005")
    per_token = money.to_usd(listed.standard[0].rates.output) / 1_000_000
    assert Decimal(output["ListUnitPrice"]) == per_token
    assert Decimal(output["ListCost"]) == per_token * 50


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("values", "token_class"),
    [
        ({"status": Status.ESTIMATED, "output_tokens": 9}, "estimated"),
        ({"requested_model": "claude-unheard-of"}, "other"),
        ({"input_tokens": 0, "output_tokens": 0}, "other"),
    ],
)
def test_what_has_no_tokens_with_a_price_is_priced_by_the_dollar(
    october: Span, values: dict[str, Any], token_class: str
) -> None:
    CallLogFactory.create(cost_nanousd=5, **values)

    (row,) = exported(october)

    assert row["SkuMeter"] == token_class
    assert (row["ConsumedQuantity"], row["ConsumedUnit"]) == ("1", "Requests")
    assert row["BilledCost"] == row["PricingQuantity"] == row["ListCost"] == "0.000000005"
    assert (row["PricingUnit"], row["ContractedUnitPrice"]) == ("USD", "1")


@pytest.mark.django_db
def test_answers_from_the_cache_and_what_is_in_flight_are_no_charges(october: Span) -> None:
    for status in (Status.CACHED, Status.RELEASED, Status.RESERVED):
        CallLogFactory.create(status=status)

    assert exported(october) == []


@pytest.mark.django_db
def test_days_and_months_are_those_of_the_zone(settings: Settings) -> None:
    settings.AI_BUDGET = {"TIME_ZONE": "Asia/Kathmandu"}
    CallLogFactory.create(reserved_at=datetime(2026, 9, 30, 18, 15, tzinfo=UTC))
    since = datetime(2026, 9, 30, 18, 15, tzinfo=UTC)

    row = exported(Span(since=since, until=since + timedelta(days=31)))[0]

    assert row["ChargePeriodStart"] == row["BillingPeriodStart"] == "2026-09-30T18:15:00Z"
    assert row["ChargePeriodEnd"] == "2026-10-01T18:15:00Z"
    assert row["BillingPeriodEnd"] == "2026-10-31T18:15:00Z"


# All of it ---------------------------------------------------------------------------------------


def random_calls(seed: int) -> list[CallLog]:
    dice = random.Random(seed)
    features = [FeatureBudgetFactory.create(name=name) for name in ("chat", "=cmd()", "dig,est")]
    rows = []
    for _ in range(150):
        tokens = [dice.choice([0, dice.randrange(10**6)]) for _ in range(5)]
        names = ("input", "cache_write_5m", "cache_write_1h", "cache_read", "output")
        rows.append(
            CallLogFactory.build(
                feature=dice.choice(features),
                category=dice.choice(["", "product"]),
                provider=dice.choice(["anthropic", "bedrock", "elsewhere"]),
                requested_model=dice.choice([SONNET, OPUS, HAIKU, "claude-unheard-of"]),
                kind=dice.choice(["ask", "batch", "router"]),
                status=dice.choice(list(Status)),
                web_searches=dice.choice([0, 0, 3]),
                reserved_at=datetime(2026, 10, 10, tzinfo=UTC)
                + timedelta(minutes=15 * dice.randrange(4 * 96)),
                **{f"{name}_tokens": count for name, count in zip(names, tokens, strict=True)},
            )
        )
        if rows[-1].status in (Status.SETTLED, Status.ESTIMATED):
            rows[-1].cost_nanousd = dice.choice([0, 1, dice.randrange(10**11)])
    CallLog.objects.bulk_create(rows)
    for row in rows:
        mark(row)
    rollups.add_up()
    return rows


@pytest.mark.django_db
@pytest.mark.parametrize("seed", range(3))
def test_the_rows_add_up_to_what_the_log_says(october: Span, seed: int) -> None:
    spent: dict[tuple[Any, ...], int] = defaultdict(int)
    tokens: dict[tuple[Any, ...], int] = defaultdict(int)
    for call in random_calls(seed):
        if call.status in (Status.SETTLED, Status.ESTIMATED):
            day = f"{call.day}T00:00:00Z"
            key = (day, call.feature_id, call.provider, call.model, call.kind == "batch")
            spent[key] += call.cost_nanousd or 0
            if call.status == Status.SETTLED:
                tokens[key] += call.output_tokens

    rows = exported(october)

    billed: dict[tuple[Any, ...], int] = defaultdict(int)
    output: dict[tuple[Any, ...], int] = defaultdict(int)
    for row in rows:
        key = (
            row["ChargePeriodStart"],
            json.loads(row["Tags"])["feature"],
            row["BillingAccountId"],
            row["x_Model"],
            row["x_Batch"] == "true",
        )
        billed[key] += money.parse_usd(row["BilledCost"])
        if row["SkuMeter"] == "output":
            output[key] += int(row["ConsumedQuantity"])
    assert {key: cost for key, cost in spent.items() if cost} == {
        key: cost for key, cost in billed.items() if cost
    }
    assert all(tokens[key] == count for key, count in output.items())


@pytest.mark.django_db
def test_every_row_keeps_the_rules_of_the_specification(october: Span) -> None:
    random_calls(1)

    rows = exported(october)

    assert len(rows) > 100
    for row in rows:
        assert tuple(row) == COLUMNS
        assert {name for name, value in row.items() if not value} <= NULLABLE
        for name in NUMBERS:
            assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", row[name]), (name, row[name])
        quantity = Decimal(row["PricingQuantity"])
        assert Decimal(row["ContractedUnitPrice"]) * quantity == Decimal(row["ContractedCost"])
        assert Decimal(row["ListUnitPrice"]) * quantity == Decimal(row["ListCost"])
        assert row["EffectiveCost"] == row["BilledCost"]
        for name in row:
            if name.endswith(("Start", "End")):
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row[name])
        assert set(json.loads(row["Tags"])) <= {"feature", "category"}
        assert not any(value.startswith(("=", "+", "@")) for value in row.values())
    # One price of one thing: a price belongs to one meter of one model.
    meters: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        meters[row["SkuPriceId"]].add(row["SkuId"])
    assert {len(ids) for ids in meters.values()} == {1}
    assert list(COLUMNS) == sorted(COLUMNS, key=lambda name: (name.startswith("x_"), name))
