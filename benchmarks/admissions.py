"""What workers do with a ledger: take and settle, fill a limit, replay a trace, make calls.

Amounts are nano-dollars. Each call reserves twice what calls cost on average.
"""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import LimitReached
from ai_budget.ledger import base as ledgers
from ai_budget.policy.limits import Budget, Quota, Rules, limits_in_force
from ai_budget.values import (
    SITE,
    Amounts,
    Attempt,
    BalanceKey,
    Charge,
    Kind,
    Limit,
    Reservation,
    Settlement,
    Status,
)
from benchmarks.bare import Step
from benchmarks.trace import Arrival

MODEL = "claude-haiku-5-5"
MEAN = 1_000_000
FAR = 10**15
"""A limit that no run comes near to."""

PARAGRAPH = (
    "A budget says beforehand what may be spent, and on what. It is a plan and a promise: whoever "
    "keeps it can tell at any time how much is left, and whoever gave it need not ask. Money that "
    "is set aside for one thing is not there for another, until it is known what the thing cost; "
    "then what is left over comes back. So a budget that is kept in this way is never passed, and "
    "in the end hardly anything of it is left unused. "
)
"""About a hundred tokens, the least that ordinary prompts have."""

FLIGHT_SECONDS = 0.005
"""How long a call is on its way where limits fill up, and how soon a saturated one is asked."""

FILL_SECONDS = 30
"""How long a limit may take to fill up: one that stays saturated has leaked."""

Start = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Payer:
    """Whose limits a call takes from: a hot feature's and the site's, maybe a user's."""

    feature: str
    limit: int = FAR
    user: int | None = None
    user_limit: int | None = None

    @property
    def charge(self) -> Charge:
        return Charge(feature=self.feature, user_id=self.user)

    def limits(self) -> list[Limit]:
        """Return the limits of today as the policy says them: day and month of every scope."""
        rules = Rules(
            feature=Budget(name=self.feature, daily_limit=self.limit, monthly_limit=FAR),
            site=Budget(name=SITE, daily_limit=FAR, monthly_limit=FAR),
            quotas=() if self.user is None else (Quota(daily_limit=self.user_limit),),
        )
        at = ledgers.current().now()
        found = limits_in_force(self.charge, rules, at=at, zone=conf.TIME_ZONE)
        return [limit for limit in found if isinstance(limit, Limit)]


def reserve(limits: Sequence[Limit], charge: Charge) -> Reservation:
    ledger = ledgers.current()
    return ledger.reserve(limits, Amounts(nanousd=2 * MEAN), _attempt(limits, charge))


def settle(reservation: Reservation) -> None:
    cost = random.randint(MEAN // 2, MEAN * 3 // 2)
    ledgers.current().settle(reservation, Settlement(status=Status.SETTLED, cost_nanousd=cost))


def _attempt(limits: Sequence[Limit], charge: Charge) -> Attempt:
    at = ledgers.current().now()
    return Attempt(
        call_id=uuid.uuid4(),
        number=0,
        charge=charge,
        category="",
        kind=Kind.ASK,
        requested_model=MODEL,
        model=MODEL,
        provider="anthropic",
        max_tokens=64,
        speed="",
        inference_geo="",
        decision="",
        rates="r" * 250,
        reserved_at=at,
        day=limits[0].window.first_day,
        deadline=at + timedelta(minutes=20),
    )


# Again and again


def admission(_: int, payer: Payer) -> Step:
    """Return one whole admission: reserve with its row in the journal, then settle."""
    limits = payer.limits()
    return lambda: settle(reserve(limits, payer.charge))


def scripts(number: int, payer: Payer) -> Step:
    """Return what an admission asks of Redis: the take and the settle script, and no journal."""
    from ai_budget.ledger.redis import RedisLedger
    from ai_budget.ledger.redis_wire import ask_for

    ledger = ledgers.current()
    assert isinstance(ledger, RedisLedger)
    limits, amounts = payer.limits(), Amounts(nanousd=2 * MEAN)
    attempt = _attempt(limits, payer.charge)
    asked = ask_for(limits, amounts)
    rows = itertools.count(10**12 * (number + 1))

    def run() -> None:
        row = next(rows)
        ledger._take(asked, amounts, attempt, row=str(row))
        reservation = Reservation(id=row, attempt=attempt, amounts=amounts, balances=())
        settlement = Settlement(status=Status.SETTLED, cost_nanousd=MEAN)
        ledger._give_back(asked.periods, reservation, settlement)

    return run


def call(_: int, base_url: str, feature: str) -> Step:
    """Return one real HTTP call, guarded where a feature is named."""
    import anthropic

    import ai_budget

    client = anthropic.Anthropic(api_key="local", base_url=base_url)
    if feature:
        client = ai_budget.guard(client, feature=feature)
    return lambda: _ask(client)


def _ask(client: Any) -> object:
    # Of different lengths, so that costs differ.
    prompt = f"Summarise in one sentence: {PARAGRAPH * random.randint(1, 4)}"
    messages = [{"role": "user", "content": prompt}]
    return client.messages.create(model=MODEL, max_tokens=64, messages=messages)


# Until a limit is full


def fill(start: Start, _: int, payer: Payer) -> int:
    """Take until the limit is exhausted; return the most that was ever taken of it."""
    limits = payer.limits()
    hot = limits[0].key
    most = 0
    start()
    ends = time.perf_counter() + FILL_SECONDS
    while time.perf_counter() < ends:
        try:
            reservation = reserve(limits, payer.charge)
        except LimitReached as refused:
            if refused.exhausted:
                break
            time.sleep(FLIGHT_SECONDS)
            continue
        most = max(most, ledgers.current().balances([hot])[hot].taken_nanousd)
        time.sleep(FLIGHT_SECONDS)
        settle(reservation)
    return most


def spend(start: Start, number: int, base_url: str, feature: str) -> int:
    """Call until the feature's budget is exhausted; return how often it was refused."""
    one = call(number, base_url, feature)
    refusals = 0
    start()
    ends = time.perf_counter() + FILL_SECONDS
    while time.perf_counter() < ends:
        try:
            one()
        except LimitReached as refused:
            refusals += 1
            if refused.exhausted:
                break
            time.sleep(FLIGHT_SECONDS)
    return refusals


# As clients come


@dataclass(kw_only=True, slots=True)
class Replayed:
    """What became of the arrivals that a worker got to in time."""

    outcomes: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)


def replay(
    start: Start,
    number: int,
    arrivals: Sequence[Arrival],
    payers: dict[int, Payer],
    workers: int,
    seconds: float,
) -> Replayed:
    """Decide this worker's share of the arrivals when they are due, or as soon as it can.

    Times are from when an arrival was due until it was settled or refused, so that those who
    queue for a busy ledger count their waiting.
    """
    limits = {client: payer.limits() for client, payer in payers.items()}
    replayed = Replayed()
    start()
    begun = time.perf_counter()
    for arrival in itertools.islice(arrivals, number, None, workers):
        early = begun + arrival.at - time.perf_counter()
        if early > 0:
            time.sleep(early)
        elif time.perf_counter() - begun > seconds:
            break
        try:
            settle(reserve(limits[arrival.client], payers[arrival.client].charge))
            replayed.outcomes["admitted"] += 1
        except LimitReached:
            replayed.outcomes["refused"] += 1
        replayed.milliseconds.append((time.perf_counter() - begun - arrival.at) * 1000)
    return replayed


# What is left behind


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """What a run left in the balances of its limits, once all its calls had ended."""

    spent: int
    held: int
    over: int
    open_rows: int


def left(payers: Iterable[Payer]) -> Left:
    """Read the balances of all limits, the site's and those of users too."""
    from ai_budget.models import CallLog

    amounts: dict[BalanceKey, int] = {}
    features = set()
    for payer in payers:
        features.add(payer.feature)
        for limit in payer.limits():
            if limit.amount is not None:
                amounts[limit.key] = limit.amount
    found = ledgers.current().balances(amounts)
    today = [
        balance
        for key, balance in found.items()
        if key.period is periods.Period.DAY and key.scope.startswith("feature:")
    ]
    rows = CallLog.objects.filter(feature__name__in=features, status=CallLog.Status.RESERVED)
    return Left(
        spent=sum(balance.spent_nanousd for balance in today),
        held=sum(balance.held_nanousd for balance in today),
        over=sum(max(0, found[key].taken_nanousd - amounts[key]) for key in found),
        open_rows=rows.count(),
    )
