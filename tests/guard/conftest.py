"""The local API for tests of the guard, and guarded clients that do not wait between retries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anthropic
import pytest

import ai_budget
from ai_budget.testing import AnthropicSimulator, override_budget


@pytest.fixture
def api(anthropic_api: AnthropicSimulator) -> AnthropicSimulator:
    return anthropic_api


@pytest.fixture
def client(api: AnthropicSimulator) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="key", base_url=api.base_url) as bare:
        yield ai_budget.guard(bare, feature="chat")


@pytest.fixture
async def async_client(api: AnthropicSimulator) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(api_key="key", base_url=api.base_url) as bare:
        yield ai_budget.guard(bare, feature="chat")


@pytest.fixture
def shared() -> Iterator[None]:
    """The feature's answers are everybody's."""
    with override_budget("chat", cache_scope="shared"):
        yield


@pytest.fixture
def private() -> Iterator[None]:
    """Each caller has answers of their own."""
    with override_budget("chat", cache_scope="private"):
        yield
