"""Prices are remembered for the length of a process, so every test starts without memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ai_budget.pricing import rates


@pytest.fixture(autouse=True)
def fresh_rates(db: None) -> Iterator[None]:
    rates.forget()
    yield
    rates.forget()
