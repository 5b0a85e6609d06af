"""What every ledger promises: one atomic step takes all limits of an attempt, or none."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import partial

from django.core.signals import setting_changed
from django.db import connections
from django.utils.module_loading import import_string

from ai_budget.conf import conf
from ai_budget.exceptions import (
    BudgetExceeded,
    LedgerUnavailable,
    LimitReached,
    QuotaExceeded,
    RateLimited,
    Refusal,
)
from ai_budget.ledger import journal as journals
from ai_budget.ledger.connection import ensure_durable, retry
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import CallLog
from ai_budget.scopes import OF_CALLERS, SITE
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Bucket,
    Difference,
    Limit,
    Measure,
    Part,
    Reservation,
    Settlement,
    Status,
)

SATURATED_RETRY_SECONDS = 2
"""How long to wait for calls in flight: about what an answer takes."""

SATURATED_DELAY_SECONDS = 0.2
"""How soon a call that waits for its turn asks again whether those in flight gave back."""


class Ledger(ABC):
    """The only gate: nothing is sent that was not reserved here first."""

    needs_redis = False
    """Whether the settings have to name a Redis."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the present in UTC, by the store's clock where it has one."""

    @property
    def alias(self) -> str:
        """The database of the journal."""
        return conf.LEDGER_DATABASE

    def ensure_durable(self) -> None:
        """Raise ``CallInsideTransaction`` where the caller could undo what is journaled."""
        ensure_durable(connections[self.alias])

    @abstractmethod
    def reserve(
        self, limits: Sequence[Limit | Bucket], amounts: Amounts, attempt: Attempt
    ) -> Reservation:
        """Take ``amounts`` from every limit at once and journal the attempt, durably.

        Raises ``BudgetExceeded``, ``QuotaExceeded`` or ``RateLimited`` with the numbers and takes
        nothing where one limit does not hold it; ``CallInsideTransaction`` where the caller's
        transaction could undo the journal; ``LedgerUnavailable`` where the store does not answer.
        """

    @abstractmethod
    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        """Book what the attempt cost and give back the rest, once, however often it is called.

        A true cost that comes after an estimate corrects it.
        """

    @abstractmethod
    def settle_parts(
        self, reservation: int, claim: Callable[[CallLog], Sequence[Part]]
    ) -> Sequence[Part]:
        """Book items of a reservation that was made for many, in one transaction; return them.

        ``reservation`` is the id of its row in the journal. ``claim`` is called inside the
        transaction with that row, which is locked, and returns the parts that nobody has booked
        yet; what it writes through the ledger's database is committed with them, or not at all.
        It may be called again after a deadlock, and then what it wrote before was undone.

        An item that cost something, or may have, has a row of its own from then on; one that was
        released has none. With the last one the reservation is over. Where there is no such
        reservation, or it was settled or released, ``claim`` is not called and nothing is booked.
        One that was estimated after its deadline is corrected by what its items cost in truth.

        Raises ``ValueError`` for more than the reservation has, and what ``claim`` raises;
        ``CallInsideTransaction`` and ``LedgerUnavailable`` as ``settle`` does.
        """

    def record(self, attempt: Attempt, settlement: Settlement) -> None:
        """Journal an answer that took nothing from any limit: one from the cache."""
        self.ensure_durable()
        connection = connections[self.alias]
        journals.insert_settled(connection, attempt, settlement)

    @abstractmethod
    def take(self, buckets: Sequence[Bucket], *, at: datetime) -> None:
        """Take one request from every bucket or from none, without a journal.

        Raises ``RateLimited`` where one is empty. ``at`` is the ledger's own ``now()``.
        """

    @abstractmethod
    def balances(self, keys: Iterable[BalanceKey]) -> Mapping[BalanceKey, Balances]:
        """Return what is spent and held now; keys that were never counted in are left out."""

    @abstractmethod
    def count_refusal(self, keys: Iterable[BalanceKey]) -> None:
        """Count one refused call, without a row of its own."""

    def settle_overdue(self, *, most: int = 1_000, aside: SetAside | None = None) -> int:
        """Book reservations past their deadline at their bound; return how many.

        One that will not settle holds up no other; raises ``LedgerUnavailable`` if none will.
        """
        now, aside = self.now(), aside or SetAside()
        find = partial(journals.overdue, self.alias, now, most=most, leave=aside.keys("call"))
        settled, failure = 0, None
        for row in retry(connections[self.alias], find):
            try:
                with aside.on_failure("call", row.pk):
                    self._settle_overdue(row)
                    settled += 1
            except LedgerUnavailable as error:
                failure = error
        if failure is not None and not settled:
            raise failure
        return settled

    def _settle_overdue(self, row: CallLog) -> None:
        self.settle(journals.reservation_of(row), journals.at_bound(row))

    @abstractmethod
    def differences(self, since: date) -> list[Difference]:
        """Return the balances from that day on that are not the sum of the journal.

        Calls may go on meanwhile: a balance that is only on its way is none.
        """

    @abstractmethod
    def rebuild(self, since: date, aside: SetAside | None = None) -> list[Difference]:
        """Make every balance from that day on the sum of the journal, while calls go on.

        Return what was wrong. A balance that cannot be written is set ``aside``.
        """

    @abstractmethod
    def tidy(self, aside: SetAside | None = None) -> None:
        """Drop what counts no more, and mend what a lost connection left behind.

        What nothing can be done with is set ``aside``, and holds up nothing else.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connections that are the ledger's own; it makes others when it is used."""

    def release(self, reservation: Reservation, settlement: Settlement) -> None:
        """Give everything back: the request never left."""
        self.settle(reservation, settlement)


def current() -> Ledger:
    """Return the ledger that the settings name."""
    path = conf.LEDGER
    ledger = _instances.get(path)
    if ledger is None:
        ledger = _instances[path] = import_string(path)()
    return ledger


_instances: dict[str, Ledger] = {}


def _forget_ledgers(*, setting: str, **kwargs: object) -> None:
    if setting in ("AI_BUDGET", "CACHES"):
        while _instances:
            _instances.popitem()[1].close()


setting_changed.connect(_forget_ledgers)


# Decisions that every ledger makes alike


@dataclass(frozen=True, kw_only=True, slots=True)
class Breach:
    """A limit that does not hold an attempt, and what it has.

    ``taken`` is what it holds already in its measure, ``held`` the part of it that is held by
    calls in flight. ``milliseconds`` is when a bucket will hold it; None if it never will.
    """

    limit: Limit | Bucket
    requested: int
    taken: int
    held: int = 0
    milliseconds: int | None = None


def breaches(
    limits: Iterable[Limit | Bucket], amounts: Amounts, balances: Mapping[BalanceKey, Balances]
) -> list[Breach]:
    """Return the windows that do not hold the amounts."""
    found = []
    for limit in limits:
        if isinstance(limit, Bucket) or limit.amount is None:
            continue
        balance = balances[limit.key]
        if limit.measure is Measure.NANOUSD:
            requested, taken, held = amounts.nanousd, balance.taken_nanousd, balance.held_nanousd
        else:
            requested, taken, held = amounts.calls_needed, balance.calls, 0
        if taken + requested > limit.amount:
            found.append(Breach(limit=limit, requested=requested, taken=taken, held=held))
    return found


def milliseconds(at: datetime) -> int:
    """Return a moment as buckets count it: since 1970, in UTC."""
    return int(at.timestamp() * 1000)


def drained(bucket: Bucket, used: int, since_ms: int, now_ms: int) -> int:
    """Return what is still used of a bucket after some time.

    What is used is kept as units times the bucket's milliseconds, so that every millisecond
    gives back ``amount`` of it: exact in integers, at any rate.
    """
    return max(0, used - max(0, now_ms - since_ms) * bucket.amount)


def bucket_breach(bucket: Bucket, requested: int, used: int) -> Breach | None:
    """Return the breach of a bucket of which so much is used now, or None if it holds."""
    room = bucket.amount * bucket.milliseconds
    wanted = requested * bucket.milliseconds
    over = used + wanted - room
    if over <= 0:
        return None
    fits = wanted <= room and bucket.amount > 0
    return Breach(
        limit=bucket,
        requested=requested,
        taken=-(-used // bucket.milliseconds),
        milliseconds=-(-over // bucket.amount) if fits else None,
    )


def given_back(bucket: Bucket, amounts: Amounts, settlement: Settlement) -> tuple[int, int] | None:
    """Return how much less of a bucket is used after settling, and the least that is used.

    In units times milliseconds, as ``drained`` says; None where nothing changes. What is left
    for the whole organisation is known better by Anthropic, whose headers tell it: others may
    use the same key. Only the less counts, for it does not know of calls in flight.
    """
    back = 0
    tokens = 0 if settlement.status is Status.RELEASED else settlement.tokens
    if bucket.measure is Measure.TOKENS and tokens is not None:
        back = amounts.tokens - tokens
    elif bucket.measure is Measure.REQUESTS and not settlement.keep_call:
        back = 1
    least = 0
    for level in settlement.levels if bucket.scope == SITE else ():
        if level.measure is bucket.measure:
            left = level.remaining * bucket.milliseconds + level.milliseconds_ago * bucket.amount
            least = max(least, bucket.amount * bucket.milliseconds - left)
    return (back * bucket.milliseconds, least) if back or least else None


def enforced(found: Sequence[Breach], at: datetime) -> str:
    """Raise for a breach that is enforced; return what shadow mode would have refused."""
    hard = [breach for breach in found if breach.limit.enforce]
    if hard:
        raise refusal(hard, at) from None
    return ", ".join(f"{breach.limit.scope} {_period(breach.limit)}" for breach in found)


def refusal(found: Sequence[Breach], at: datetime) -> LimitReached:
    """Return the error for the breach that lasts longest: the one that the caller waits for."""
    worst = max(found, key=lambda breach: _lasting(breach, at))
    error = _refusal(worst, at)
    if isinstance(worst.limit, Bucket):
        return RateLimited(error)
    of_caller = error.scope.startswith(OF_CALLERS)
    return QuotaExceeded(error) if of_caller else BudgetExceeded(error)


def _lasting(breach: Breach, at: datetime) -> tuple[bool, datetime]:
    error = _refusal(breach, at)
    return error.exhausted, error.resets_at


def _period(limit: Limit | Bucket) -> str:
    if isinstance(limit, Limit):
        return limit.window.period
    return "minute" if limit.seconds == 60 else f"{limit.seconds} seconds"


def _refusal(breach: Breach, at: datetime) -> Refusal:
    limit = breach.limit
    amount = limit.amount or 0
    if isinstance(limit, Bucket):
        never = breach.milliseconds is None
        seconds = (limit.milliseconds if never else breach.milliseconds or 0) / 1000
        resets_at = at + timedelta(seconds=seconds)
        delay = None if never else seconds
        exhausted = True
    else:
        resets_at = limit.window.end
        seconds = max(0.0, (resets_at - at).total_seconds())
        exhausted = breach.taken - breach.held + breach.requested > amount
        fits = breach.requested <= amount
        delay = (seconds if fits else None) if exhausted else SATURATED_DELAY_SECONDS
    until_reset = max(1, math.ceil(seconds))
    return Refusal(
        scope=limit.scope,
        period=_period(limit),
        measure=limit.measure,
        limit=amount,
        spent=breach.taken - breach.held,
        held=breach.held,
        requested=breach.requested,
        exhausted=exhausted,
        resets_at=resets_at,
        retry_after=until_reset if exhausted else min(SATURATED_RETRY_SECONDS, until_reset),
        delay=delay,
    )
