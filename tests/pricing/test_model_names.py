"""A name is one of a known model only as a whole."""

from __future__ import annotations

import pytest

from ai_budget.exceptions import UnpricedModel
from ai_budget.models import ModelRate
from ai_budget.pricing import rates
from ai_budget.pricing.rates import resolve
from tests.factories import ModelRateFactory

pytestmark = pytest.mark.django_db

PROFILE = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/"


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        ("anthropic", "claude-haiku-4-5"),
        ("anthropic", "claude-haiku-4-5-20251001"),
        ("anthropic", "claude-haiku-4.5"),
        ("anthropic", "claude-4-5-haiku"),
        ("anthropic", "claude-opus-5-2026-07-01"),
        ("anthropic", "claude-3-7-sonnet-latest"),
        ("anthropic", "claude-sonnet-4-20250514"),
        ("anthropic", "claude-opus-4"),
        ("anthropic", "claude-mythos-5-1-20261001"),
        ("bedrock", "anthropic.claude-opus-5"),
        ("bedrock", "us.anthropic.claude-sonnet-4-5-20250929-v1:0"),
        ("bedrock", "us-gov.anthropic.claude-haiku-4-5-20251001-v1:0"),
        ("bedrock", "global.anthropic.claude-fable-5-1-v1:0"),
        ("bedrock", f"{PROFILE}us.anthropic.claude-opus-4-6-v1:0"),
        ("vertex", "claude-opus-4-5@20251101"),
        ("vertex", "claude-opus-4-1@20250805"),
        ("vertex", "claude-sonnet-5-5@default"),
    ],
)
def test_a_model_is_known_in_the_spellings_of_its_platform(provider: str, name: str) -> None:
    assert resolve(name, provider=provider).standard


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        ("anthropic", "claude-haiku-4-5\nERROR forged"),
        ("anthropic", "claude-haiku-4-5-turbo"),
        ("anthropic", "claude-haiku-4-55"),
        ("anthropic", "claude-haiku-4-5-2025100"),
        ("anthropic", "claude-haiku-4-5-20251001-beta"),
        ("anthropic", "xclaude-haiku-4-5"),
        ("anthropic", " claude-haiku-4-5"),
        ("anthropic", "claude-haiku-4-5 "),
        ("anthropic", "claude-haiku-4-5@٢٠٢٥١٠٠١"),
        ("bedrock", "my-claude-haiku-4-5-20251001"),
        ("bedrock", "us.anthropic.claude-haiku-4-5-20251001-v1:0/../x"),
        ("vertex", "claude-sonnet-4-5-mini"),
        ("vertex", "claude-opus-5-5@20260101\r\nX-Forged: 1"),
    ],
)
def test_whatever_is_left_over_makes_it_another_model(provider: str, name: str) -> None:
    with pytest.raises(UnpricedModel):
        resolve(name, provider=provider)


def test_every_model_of_the_library_is_known_by_its_own_id() -> None:
    from genai_prices import data_snapshot

    ids = [
        (ours, info.id)
        for ours, theirs in (("anthropic", "anthropic"), ("vertex", "google"))
        for provider in data_snapshot.get_snapshot().providers
        if provider.id == theirs
        for info in provider.models
        if info.id.startswith("claude")
    ]

    assert len(ids) > 30
    for provider_name, name in ids:
        assert resolve(name, provider=provider_name).standard


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("claude-next", True),
        ("claude-next-20270101", True),
        ("claude-next@20270101", True),
        ("claude-next-20270101-v1:0", True),
        ("claude-next-20270101-forged", False),
        ("claude-next-9", False),
        ("claude-next\n", False),
    ],
)
def test_a_rate_of_ones_own_is_for_the_whole_name_too(name: str, known: bool) -> None:
    row: ModelRate = ModelRateFactory.create(model="claude-next")
    rates.forget()

    if known:
        assert resolve(name, at=row.valid_from).source == f"model rate {row.pk}"
    else:
        with pytest.raises(UnpricedModel):
            resolve(name, at=row.valid_from)
