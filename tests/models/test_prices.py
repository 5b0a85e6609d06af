"""A team's own price: one a date, never negative, never over before it began."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django.db import IntegrityError, transaction

from ai_budget.models import ModelRate
from tests.factories import ModelRateFactory

pytestmark = pytest.mark.django_db

FROM = datetime(2026, 5, 1, tzinfo=UTC)
PRICES = [
    "input_usd",
    "output_usd",
    "cache_write_5m_usd",
    "cache_write_1h_usd",
    "cache_read_usd",
    "web_search_usd",
]


@pytest.mark.parametrize("field", PRICES)
def test_a_price_is_not_negative(field: str) -> None:
    with pytest.raises(IntegrityError, match=f"ai_budget_rate_{field}_ok"), transaction.atomic():
        ModelRateFactory.create(**{field: "-0.000000001"})


@pytest.mark.parametrize("field", PRICES)
@pytest.mark.parametrize("price", [0, None])
def test_a_price_may_be_nothing_or_left_open(field: str, price: int | None) -> None:
    ModelRateFactory.create(**{field: price})


@pytest.mark.parametrize("length", [timedelta(0), timedelta(seconds=-1)])
def test_a_price_does_not_end_before_it_begins(length: timedelta) -> None:
    with (
        pytest.raises(IntegrityError, match="ai_budget_rate_ends_after_start"),
        transaction.atomic(),
    ):
        ModelRateFactory.create(valid_from=FROM, valid_until=FROM + length)


def test_a_model_has_one_price_from_a_date_on() -> None:
    ModelRateFactory.create(valid_from=FROM)

    with pytest.raises(IntegrityError), transaction.atomic():
        ModelRateFactory.create(valid_from=FROM, input_usd=2)


@pytest.mark.parametrize(
    "other",
    [
        {"valid_from": FROM + timedelta(days=1)},
        {"region": "eu"},
        {"provider": "bedrock"},
        {"speed": ModelRate.Speed.FAST},
        {"prompt_tokens_above": 200_000},
    ],
)
def test_another_price_of_a_model_stands_beside_it(other: dict[str, object]) -> None:
    ModelRateFactory.create(valid_from=FROM)

    ModelRateFactory.create(**{"valid_from": FROM, **other})

    assert ModelRate.objects.count() == 2


def test_a_price_is_called_by_its_model_and_date() -> None:
    rate: ModelRate = ModelRateFactory.build(model="claude-haiku-5-5", valid_from=FROM)

    assert str(rate) == "anthropic claude-haiku-5-5 from 2026-05-01"
