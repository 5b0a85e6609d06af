"""For test suites: a local Anthropic API over HTTP, budgets for a test, and a clock to set.

Nothing here needs a key, and nothing leaves the machine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ai_budget.testing.batches import Pace
    from ai_budget.testing.budgets import BudgetTestMixin, freeze, override_budget
    from ai_budget.testing.simulator import AnthropicSimulator
    from ai_budget.testing.steps import (
        Canceled,
        CutBeforeResponse,
        CutStream,
        Errored,
        Expired,
        Fail,
        Hang,
        Reply,
        Results,
        StreamError,
        TruncateCleanly,
    )

_HOMES = {
    "AnthropicSimulator": "simulator",
    "BudgetTestMixin": "budgets",
    "Canceled": "steps",
    "CutBeforeResponse": "steps",
    "CutStream": "steps",
    "Errored": "steps",
    "Expired": "steps",
    "Fail": "steps",
    "Hang": "steps",
    "Pace": "batches",
    "Reply": "steps",
    "Results": "steps",
    "StreamError": "steps",
    "TruncateCleanly": "steps",
    "freeze": "budgets",
    "override_budget": "budgets",
}

__all__ = [
    "AnthropicSimulator",
    "BudgetTestMixin",
    "Canceled",
    "CutBeforeResponse",
    "CutStream",
    "Errored",
    "Expired",
    "Fail",
    "Hang",
    "Pace",
    "Reply",
    "Results",
    "StreamError",
    "TruncateCleanly",
    "freeze",
    "override_budget",
]


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(f"{__name__}.{home}"), name)
