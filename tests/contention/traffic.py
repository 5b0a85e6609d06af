"""Eight processes that make calls without a pause, on a limit that is always tight."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from ai_budget.values import Amounts, Charge
from tests.contention.books import assert_all_over, booked, tick
from tests.contention.calls import Outcome, Wish, assert_never_over, make_for
from tests.contention.mixes import simple_limits
from tests.contention.processes import Workers
from tests.ledger.given import NOON

LIMIT = 60
SECONDS = 0.8
ENOUGH = 20
"""Calls that have to get through for a fault to have come in the middle."""

CALLER = Charge(feature="chat", user_id=7)


def traffic(cost: int = 0, ending: str = "settle") -> Wish:
    """A call that holds a sixth of the limit."""
    return Wish(
        charge=CALLER,
        category="",
        limits=simple_limits(CALLER, NOON, site=LIMIT),
        amounts=Amounts(nanousd=10),
        at=NOON,
        ending=ending,
        cost=cost,
    )


# Most cost nothing, as failed requests do: so the limit stays tight and is not used up at once.
_MOST = [traffic()] * 150 + [traffic(ending="release")] * 30 + [traffic(cost=1)] * 3
_SOME = [traffic(cost=1, ending="estimate"), traffic(ending="abandon")]


def run_through(workers: Workers, fault: Callable[[], object]) -> list[Outcome]:
    """Let the processes make calls, and something happen in the middle, again and again.

    On a busy machine a fault may last longer than the traffic: then there is more of it.
    """
    workers.at = NOON
    outcomes: list[Outcome] = []
    for seconds in (SECONDS, 4 * SECONDS, 16 * SECONDS):
        workers.begin(make_for, [(seconds, _MOST + _SOME, seed) for seed in range(Workers.COUNT)])
        for _ in range(3):
            time.sleep(seconds / 4)
            fault()
        outcomes += [outcome for done in workers.results() for outcome in done]
        if sum(outcome.error == "" for outcome in outcomes) > ENOUGH:
            break
    return outcomes


def assert_survived(outcomes: list[Outcome]) -> None:
    """Nothing was over at any moment, and nothing is left."""
    errors = Counter(outcome.error for outcome in outcomes)
    assert set(errors) <= {"", "BudgetExceeded", "LedgerUnavailable"}
    assert errors[""] > ENOUGH, errors
    assert_never_over(outcomes)
    tick(NOON)
    assert_all_over()
    assert booked() <= LIMIT
