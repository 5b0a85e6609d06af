"""Fixtures for pytest: ``pytest_plugins = ["ai_budget.testing.pytest_plugin"]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ai_budget.testing.simulator import AnthropicSimulator


@pytest.fixture(scope="session")
def anthropic_api_server() -> Iterator[AnthropicSimulator]:
    """The local API of the whole run."""
    from ai_budget.testing.simulator import AnthropicSimulator

    with AnthropicSimulator() as api:
        yield api


@pytest.fixture
def anthropic_api(
    anthropic_api_server: AnthropicSimulator, settings: Any
) -> Iterator[AnthropicSimulator]:
    """The local API, empty, with the settings pointing at it. The test needs a database mark.

    Nothing is found in the caches of answers and prompts that was kept before the test.
    """
    from ai_budget.conf import conf
    from ai_budget.pricing import rates
    from ai_budget.savings.digest_keys import apart
    from ai_budget.testing.budgets import ledger_of_the_test, local_settings

    anthropic_api_server.reset()
    # A test that sets some keys, and not the address, must not call out.
    here = conf.default(BASE_URL=anthropic_api_server.base_url)
    with here, ledger_of_the_test(), apart():
        settings.AI_BUDGET = local_settings(anthropic_api_server)
        rates.forget()
        yield anthropic_api_server
        rates.forget()
