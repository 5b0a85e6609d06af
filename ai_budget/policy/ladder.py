"""Which model answers now: the circuit breaker between full service and none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ai_budget.policy.limits import Rung
from ai_budget.values import BalanceKey, Balances, Limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The model that answers, and why, in a few words."""

    model: str
    percent: int = 0
    reason: str = ""


def percent_used(limits: Iterable[Limit], balances: Mapping[BalanceKey, Balances]) -> int:
    """Return the highest share of a limit that is spent or held, in whole percent."""
    nothing = Balances()
    return max(
        (
            100
            if limit.amount == 0
            else balances.get(limit.key, nothing).taken_nanousd * 100 // limit.amount
            for limit in limits
            if limit.amount is not None
        ),
        default=0,
    )


def choose_model(
    requested: str, rungs: Sequence[Rung], percent: int, *, takes: Callable[[str], bool]
) -> Choice:
    """Return the model of the highest rung that is reached and whose model takes the request.

    A request for the model of a rung stands on that rung already: the ones before it are dearer.
    ``takes`` says whether a model accepts the request's parameters and has a price.
    """
    own = max((rung.at_percent for rung in rungs if rung.model == requested), default=0)
    reached = sorted(
        (rung for rung in rungs if own < rung.at_percent <= percent),
        key=lambda rung: rung.at_percent,
        reverse=True,
    )
    for rung in reached:
        if takes(rung.model):
            reason = f"rung {rung.at_percent} % at {percent} %"
            return Choice(model=rung.model, percent=percent, reason=reason)
    return Choice(model=requested, percent=percent)
