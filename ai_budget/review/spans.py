"""Which calls a figure is about: a range of time, and what to leave out of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ai_budget.values import SITE


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The calls reserved from ``since`` up to but not including ``until``, both aware.

    ``feature`` names a feature or a category, and is "*" for all of them; ``model`` is the one
    that answered, and empty for any. Those of one user or tag are read from the calls themselves.
    """

    since: datetime
    until: datetime
    feature: str = SITE
    model: str = ""
    user_id: Any = None
    tag: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.since >= self.until:
            raise ValueError("a span begins before it ends")

    @property
    def is_narrow(self) -> bool:
        """Whether it is of less than a budget is for."""
        return bool(self.model) or self.user_id is not None or self.tag is not None


def ever() -> Span:
    """Return the span of everything there is."""
    return Span(
        since=datetime(1970, 1, 2, tzinfo=UTC),
        until=datetime(9000, 1, 1, tzinfo=UTC),
    )
