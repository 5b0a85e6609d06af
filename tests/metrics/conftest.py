"""A local API, and what is heard of the calls to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

import ai_budget
from ai_budget.metrics.log import log
from ai_budget.testing import AnthropicSimulator


@pytest.fixture
def api(anthropic_api: AnthropicSimulator) -> AnthropicSimulator:
    return anthropic_api


@pytest.fixture
def client(api: AnthropicSimulator) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="key", base_url=api.base_url) as bare:
        yield ai_budget.guard(bare, feature="chat")


class Lines(logging.Handler):
    """The lines that were written, each as the fields that are ours, without their prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for record in self.records:
            yield {
                name.removeprefix("ai_budget_"): value
                for name, value in vars(record).items()
                if name.startswith("ai_budget_")
            }

    @property
    def statuses(self) -> list[str]:
        return [line["status"] for line in self]

    @property
    def only(self) -> dict[str, Any]:
        (line,) = self
        return line


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Somebody listens to the log of calls."""
    handler = Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.setLevel(level)
    log.removeHandler(handler)
