"""What a running month will have cost if it goes on as it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from ai_budget.periods import Window
from ai_budget.review.arithmetic import percent
from ai_budget.review.limits import Allowance

ENOUGH = timedelta(days=3)
"""How much of a month has to have passed before it says anything of the rest."""

_TICK = timedelta(microseconds=1)


def forecast(spent_nanousd: int, window: Window, *, now: datetime) -> int | None:
    """Return spend / elapsed x period in nano-dollars, rounded half up.

    None in the first three days, and of a window that is over.
    """
    elapsed = now - window.start
    if elapsed < ENOUGH or now >= window.end:
        return None
    passed, whole = elapsed // _TICK, (window.end - window.start) // _TICK
    return (2 * spent_nanousd * whole + passed) // (2 * passed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a budget has spent and will have spent at the end, beside what it was allowed."""

    name: str
    spent_nanousd: int
    forecast_nanousd: int
    budget_nanousd: int | None = None
    plan_nanousd: int | None = None

    @property
    def budget_used(self) -> Decimal | None:
        """The forecast as a percentage of the limit."""
        return percent(self.forecast_nanousd, self.budget_nanousd)

    @property
    def plan_used(self) -> Decimal | None:
        """The forecast as a percentage of the plan."""
        return percent(self.forecast_nanousd, self.plan_nanousd)

    @property
    def is_over_budget(self) -> bool:
        """Whether it will pass its limit."""
        return self.budget_nanousd is not None and self.forecast_nanousd > self.budget_nanousd

    @property
    def is_over_plan(self) -> bool:
        """Whether it will pass its plan."""
        return self.plan_nanousd is not None and self.forecast_nanousd > self.plan_nanousd


def forecasts(
    spent: Mapping[str, int],
    window: Window,
    *,
    now: datetime,
    allowed: Mapping[str, Allowance],
) -> tuple[Forecast, ...]:
    """Return the forecast of each budget that has spent anything, the dearest first."""
    found = []
    for name, cost in spent.items():
        expected = forecast(cost, window, now=now)
        if expected is None or not cost:
            continue
        own = allowed.get(name, Allowance())
        found.append(
            Forecast(
                name=name,
                spent_nanousd=cost,
                forecast_nanousd=expected,
                budget_nanousd=own.budget_nanousd,
                plan_nanousd=own.plan_nanousd,
            )
        )
    return tuple(sorted(found, key=lambda it: (-it.forecast_nanousd, it.name)))
