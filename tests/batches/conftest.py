"""The local API for tests of batches."""

from __future__ import annotations

import pytest

from ai_budget.testing import AnthropicSimulator


@pytest.fixture
def api(anthropic_api: AnthropicSimulator) -> AnthropicSimulator:
    return anthropic_api
