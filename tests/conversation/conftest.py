"""The local API, and an empty cache, for tests of conversations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.core.cache import cache

from ai_budget.testing import AnthropicSimulator


@pytest.fixture
def api(anthropic_api: AnthropicSimulator) -> AnthropicSimulator:
    return anthropic_api


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    cache.clear()
    yield
    cache.clear()
