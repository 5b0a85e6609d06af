"""A clock that tests move, also while a call is on its way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ai_budget.testing import Reply
from ai_budget.testing.steps import Step


class Clock:
    """Stands still at ``at``, an aware moment."""

    def __init__(self) -> None:
        self.at = datetime(2026, 5, 4, 12, tzinfo=UTC)

    def moves_to(self, at: datetime, reply: Step | None = None) -> Callable[[dict[str, Any]], Step]:
        """Return a step of the local API: it is that late when the request arrives there."""

        def step(body: dict[str, Any]) -> Step:
            self.at = at
            return Reply() if reply is None else reply

        return step
