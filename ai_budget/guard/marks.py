"""The marks of one attempt for the API's prompt cache."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ai_budget.pricing.rates import ModelRates
from ai_budget.savings import prompt_cache
from ai_budget.savings.prompt_cache import Marking


def dearest(
    body: Mapping[str, Any], rates: ModelRates, *, mode: str, feature: str, at: datetime
) -> Marking | None:
    """Return the body with the marks that cost most, to tell beforehand what may be set aside.

    What "auto" would do is not asked, for it counts what it sees: it may mark anything.
    """
    if mode == "auto":
        return prompt_cache.mark_everywhere(body, rates=rates, feature=feature)
    return prompt_cache.mark(body, mode=mode, rates=rates, feature=feature, at=at)


class Marks:
    """The marks of one attempt: decided once for a body, however often it is tried."""

    def __init__(self, mode: str, feature: str, at: datetime, *, where: str = "") -> None:
        self._mode, self._feature, self._at, self._where = mode, feature, at, where
        self._of: Mapping[str, Any] | None = None
        self._marking: Marking | None = None
        self._taken_off = False

    def mark(self, body: Mapping[str, Any], rates: ModelRates) -> Marking | None:
        """Return the body with its marks; None where it is to stay as it is."""
        if self._taken_off:
            return None
        if self._of != body:
            self.cancel()
            self._of = body
            self._marking = prompt_cache.mark(
                body,
                mode=self._mode,
                rates=rates,
                feature=self._feature,
                at=self._at,
                where=self._where,
            )
        return self._marking

    def take_off(self) -> bool:
        """Leave the body without marks from now on; say whether there were any."""
        if self._marking is None or not self._marking.note:
            return False
        self._taken_off = True
        self.cancel()
        return True

    def cancel(self) -> None:
        """Give back what was set aside for them."""
        if self._marking is not None:
            self._marking.cancel()
        self._of = self._marking = None
