from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from ai_budget import periods
from ai_budget.review.spans import Span

NOW = datetime(2026, 10, 15, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    with periods.override_clock(lambda: NOW):
        yield


@pytest.fixture
def october() -> Span:
    return Span(since=datetime(2026, 10, 1, tzinfo=UTC), until=datetime(2026, 11, 1, tzinfo=UTC))
