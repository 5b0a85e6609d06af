"""Whether the response cache of a feature is worth having."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from ai_budget import periods
from ai_budget.review.arithmetic import percent
from ai_budget.review.spans import Span
from ai_budget.review.sums import reading

ENOUGH_LOOKED_UP = 500
"""Calls after which a hit rate tells something."""

WORTH_CACHING_PERCENT = 20
"""The hit rate below which the response cache of a feature is not worth having."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caching:
    """How often a feature's answers were looked for in the response cache, and found."""

    feature: str
    looked_up: int = 0
    cached: int = 0
    saved_nanousd: int = 0

    @property
    def hit_rate(self) -> Decimal | None:
        """The percentage that was found."""
        return percent(self.cached, self.looked_up)

    @property
    def is_worthless(self) -> bool:
        """Whether too little is found, after enough calls to say so."""
        enough = self.looked_up >= ENOUGH_LOOKED_UP
        return enough and self.cached * 100 < self.looked_up * WORTH_CACHING_PERCENT


def caching_of(feature: str, *, since: datetime, using: str | None = None) -> Caching:
    """Return what the response cache of a feature, or of its category, did since then."""
    span = Span(since=since, until=periods.now() + timedelta(days=1), feature=feature)
    with reading(using) as now:
        statuses = now.by(span, "status")
    cached = statuses.get(("cached",))
    return Caching(
        feature=feature,
        looked_up=sum(figures.looked_up for figures in statuses.values()),
        cached=0 if cached is None else cached.cached,
        saved_nanousd=0 if cached is None else cached.saved_nanousd,
    )
