"""The ledger for many workers: balances in Redis, one script a step, the journal in the database.

What Redis holds is a cache of the journal that decides. It may lose it at any time: each hash
knows the server's run id that it was filled under, and one that is missing, or of another
run, is filled from the journal by one worker before the next call is admitted.

A call is written to the journal first, then taken in Redis, so nothing is ever held that the
journal does not know; it is booked in the journal first, then given back in Redis, so nothing
is ever free that the journal does not know to be free.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from importlib import resources
from typing import Any

import redis
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Value
from django.db.models.functions import Replace

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.ledger import journal as journals
from ai_budget.ledger.base import Breach, Ledger, bucket_breach, enforced, given_back
from ai_budget.ledger.clock import StoreClock
from ai_budget.ledger.connection import ensure_durable, retry
from ai_budget.ledger.journal import journal
from ai_budget.ledger.redis_client import connect, key_prefix
from ai_budget.models import CallLog, RateBucket, SpendWindow
from ai_budget.periods import Period
from ai_budget.policy.limits import balance_keys
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Bucket,
    Difference,
    Limit,
    Measure,
    Reservation,
    Settlement,
    Status,
)

log = logging.getLogger("ai_budget")

PATIENCE_SECONDS = 6.0
"""How long a call waits for the worker that fills a hash: longer than for a dead one."""

ASLEEP_SECONDS = 30.0
"""After which a worker that was stopped between journal and script may find its row released:
less than any reservation's time until its deadline."""

CLAIM_SECONDS = 4.0
"""After which a worker that fills a hash, and does not say that it lives, is taken for dead."""

LOOK_SECONDS = 10.0
"""How long after a refusal calls ask Redis before they write to the journal. Most sites have none
for hours, and save the question; one that is over a limit has many."""

KEPT = timedelta(days=3)
"""How long a hash is kept after its window: the tick looks for what was left behind."""

UNCHECKED = "unchecked"
"""What the journal says of a call that was let through while Redis was away."""

_CHUNK = 1_000
"""Fields that are sent at once; Lua unpacks some thousand."""

_LARGEST = 2**53
"""Up to which Lua's numbers are exact."""

_UNSENT = Settlement(
    status=Status.RELEASED, cost_nanousd=0, keep_call=False, error="never admitted"
)


@dataclass(frozen=True, slots=True, order=True)
class _Period:
    """One calendar day or month, which is one hash."""

    period: Period
    first_day: date

    @property
    def until(self) -> date:
        return journals.day_after(BalanceKey("", self.period, self.first_day))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moment:
    """A moment by both of the worker's clocks: one may be set, the other stops in a sleep."""

    monotonic: float
    clock: datetime

    @classmethod
    def now(cls) -> _Moment:
        return cls(monotonic=periods.monotonic(), clock=periods.now())

    def seconds_ago(self) -> float:
        """Return how long it is ago by the clock that says more."""
        by_clock = (periods.now() - self.clock).total_seconds()
        return max(periods.monotonic() - self.monotonic, by_clock)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What an attempt asks of Redis, in the order of the keys."""

    periods: Sequence[_Period]
    buckets: Sequence[Bucket]
    checks: Sequence[Sequence[Limit]]
    json: str


class RedisLedger(Ledger):
    """Balances as hashes in Redis, one a day and one a month; the journal as rows of CallLog."""

    needs_redis = True

    def __init__(self) -> None:
        self._clock = StoreClock(self._read_clock)
        self._scripts: dict[str, Any] = {}
        self._to_forget: set[_Period] = set()
        self._look_until = float("-inf")
        self._seen: set[_Period] = set()

    @property
    def alias(self) -> str:
        """The database of the journal."""
        return conf.LEDGER_DATABASE

    @functools.cached_property
    def client(self) -> Any:
        """The connection to Redis, made when it is first used."""
        return connect()

    @functools.cached_property
    def prefix(self) -> str:
        """What all its keys begin with."""
        # Braces keep all keys of a site in one slot of a cluster.
        return f"{{ai_budget:{key_prefix()}}}"

    def now(self) -> datetime:
        if periods.is_overridden():
            return periods.now()
        try:
            return self._clock.now()
        except LedgerUnavailable:
            if conf.ON_LEDGER_FAILURE == "allow":
                return periods.now()
            raise

    def ensure_durable(self) -> None:
        ensure_durable(connections[self.alias])

    # Reserving

    def reserve(
        self, limits: Sequence[Limit | Bucket], amounts: Amounts, attempt: Attempt
    ) -> Reservation:
        connection = connections[self.alias]
        ensure_durable(connection)
        asked = _asked(limits, amounts)
        reservation = Reservation(
            id=0,
            attempt=attempt,
            amounts=amounts,
            balances=tuple({limit.key for limit in limits if isinstance(limit, Limit)}),
            buckets=tuple(asked.buckets),
        )
        note = ""
        try:
            # A hash that is filled now would count rows that nobody has admitted yet.
            new = not self._seen.issuperset(asked.periods)
            if new or periods.monotonic() < self._look_until:
                shadowed = self._take(asked, amounts, attempt, row="")
                note = f"would refuse: {shadowed}" if shadowed else ""
                self._seen = set(asked.periods)
        except LedgerUnavailable:
            if conf.ON_LEDGER_FAILURE != "allow":
                raise
            return self._unchecked(connection, reservation)
        started = _Moment.now()
        reservation = replace(reservation, id=_write(connection, attempt, amounts, note))
        try:
            shadowed = self._take(asked, amounts, attempt, row=str(reservation.id))
        except LedgerUnavailable:
            self._look()
            if conf.ON_LEDGER_FAILURE == "allow":
                return self._unchecked(connection, reservation)
            # Whether Redis heard of it or not: the tick gives back what it holds.
            _release(connection, reservation.id, self._time_of_booking())
            raise
        except Exception:
            self._look()
            _delete(connection, reservation.id)
            raise
        if started.seconds_ago() > ASLEEP_SECONDS:
            # The tick may have taken it for one that was never admitted.
            self.settle(reservation, _UNSENT)
            raise LedgerUnavailable("The worker slept while it reserved.") from None
        if shadowed and not note:
            self._note(connection, reservation, f"would refuse: {shadowed}")
        return reservation

    def _look(self) -> None:
        """Ask Redis first for a while: refusals then cost the database nothing."""
        self._look_until = periods.monotonic() + LOOK_SECONDS

    def _note(self, connection: BaseDatabaseWrapper, reservation: Reservation, note: str) -> None:
        decision = f"{note}; {reservation.attempt.decision}".strip("; ")[:200]
        rows = CallLog.objects.using(self.alias).filter(pk=reservation.id)
        retry(connection, lambda: rows.update(decision=decision))

    def _take(self, asked: _Asked, amounts: Amounts, attempt: Attempt, *, row: str) -> str:
        """Run the script; raise for what is enforced, return what shadow mode would refuse."""
        keys = [*map(self._key, asked.periods), *map(self._bucket_key, asked.buckets)]
        now = str(_milliseconds(attempt.reserved_at)) if periods.is_overridden() else ""
        answer = self._run_ready("take", asked.periods, keys, [row, now, asked.json])
        found = [_breach(breach, asked, amounts) for breach in answer[1:]]
        return enforced([breach for breach in found if breach is not None], attempt.reserved_at)

    def _unchecked(self, connection: BaseDatabaseWrapper, reservation: Reservation) -> Reservation:
        """Let a call through that nobody has checked: its row tells, and Redis learns later."""
        log.error("Redis does not answer; a call is let through unchecked.")
        row = reservation.id
        if row:
            self._note(connection, reservation, UNCHECKED)
        else:
            decision = f"{UNCHECKED}; {reservation.attempt.decision}".strip("; ")
            noted = replace(reservation.attempt, decision=decision)
            row = _write(connection, noted, reservation.amounts, "")
        return replace(reservation, id=row, unchecked=True)

    # Settling

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        connection = connections[self.alias]
        ensure_durable(connection)
        now = self._time_of_booking()
        touched = sorted({_Period(key.period, key.first_day) for key in reservation.balances})
        booked = retry(connection, lambda: _close(connection, reservation.id, settlement, now))
        if not booked:
            # Somebody was first: the tick, at the bound. What is known corrects an estimate.
            if settlement.status is not Status.ESTIMATED:
                self._correct(connection, reservation.id, settlement, now, touched)
            return
        if reservation.unchecked:
            self._to_forget.update(touched)
        try:
            self._forget()
            self._give_back(touched, reservation, settlement)
        except LedgerUnavailable:
            # The journal has it. The tick gives back what Redis still holds.
            log.error(
                "Redis does not answer; ai_budget_tick will give back what call %s held.",
                reservation.id,
            )

    def _correct(
        self,
        connection: BaseDatabaseWrapper,
        row: int,
        settlement: Settlement,
        now: datetime,
        touched: Sequence[_Period],
    ) -> None:
        """Write the truth over an estimate, and have the balances filled anew: it is rare.

        They are claimed first, so that whoever dies between leaves them to be filled anew, too.
        """
        estimates = CallLog.objects.using(self.alias).filter(pk=row, status=Status.ESTIMATED)
        if not retry(connection, estimates.exists):
            return
        with suppress(LedgerUnavailable):
            for window in touched:
                self._hold(window)
        retry(connection, lambda: _write_truth(connection, row, settlement, now))
        self._to_forget.update(touched)
        with suppress(LedgerUnavailable):  # this worker's next call will, or the claims lapse
            self._forget()

    def _hold(self, window: _Period) -> None:
        """Claim a hash, whoever else does: a claim that is not renewed makes it unknown."""
        give_up = periods.monotonic() + PATIENCE_SECONDS
        token = uuid.uuid4().hex
        while self._claim(window, token, "anew") != "go" and periods.monotonic() < give_up:
            time.sleep(random.uniform(0.01, 0.05))

    def _give_back(
        self, touched: Sequence[_Period], reservation: Reservation, settlement: Settlement
    ) -> None:
        changes = {
            bucket: change
            for bucket in reservation.buckets
            if (change := given_back(bucket, reservation.amounts, settlement)) is not None
        }
        given = [
            {"back": back, "least": least, "amount": _exact(bucket)}
            for bucket, (back, least) in changes.items()
        ]
        now = str(_milliseconds(periods.now())) if periods.is_overridden() else ""
        keep = "1" if settlement.keep_call else "0"
        self._run(
            "settle",
            [*map(self._key, touched), *map(self._bucket_key, changes)],
            [
                str(reservation.id),
                str(settlement.cost_nanousd),
                keep,
                str(len(touched)),
                now,
                json.dumps(given),
            ],
        )

    def _time_of_booking(self) -> datetime:
        """Return the time; the worker's own, if Redis cannot say: it decides nothing here."""
        try:
            return self.now()
        except LedgerUnavailable:
            return periods.now()

    def settle_overdue(self, *, most: int = 1_000) -> int:
        connection = connections[self.alias]
        now = self.now()
        rows = retry(connection, lambda: journals.overdue(self.alias, now, most=most))
        settled, failure = 0, None
        for row in rows:
            reservation = journals.reservation_of(row)
            try:
                if UNCHECKED in row.decision:
                    self.settle(replace(reservation, unchecked=True), journals.at_bound(row))
                elif self._is_open(reservation):
                    self.settle(reservation, journals.at_bound(row))
                else:
                    # Its worker died before it asked, so nothing was sent.
                    self.settle(reservation, _UNSENT)
                settled += 1
            except LedgerUnavailable as error:
                failure = error  # one row that will not settle holds up no other
        if failure is not None and not settled:
            raise failure
        return settled

    def _is_open(self, reservation: Reservation) -> bool:
        day = next(key for key in reservation.balances if key.period is Period.DAY)
        window = _Period(day.period, day.first_day)
        answer = self._read([window], [[f"#{reservation.id}"]])
        return answer[0][0] is not None

    # Views, refusals, balances

    def take(self, buckets: Sequence[Bucket], *, at: datetime) -> None:
        asked = [_bucket_json(bucket, 1) for bucket in buckets]
        now = str(_milliseconds(at)) if periods.is_overridden() else ""
        keys = [self._bucket_key(bucket) for bucket in buckets]
        answer = self._run("draw", keys, [now, json.dumps(asked)])
        found = [bucket_breach(buckets[int(which) - 1], 1, int(used)) for which, used in answer[1:]]
        enforced([breach for breach in found if breach is not None], at)

    def count_refusal(self, keys: Iterable[BalanceKey]) -> None:
        refused = sorted(set(keys))
        if refused:
            days = [self._refused_key(key.first_day) for key in refused]
            kept = str(int(KEPT.total_seconds() * 1000))
            self._run("refuse", days, [kept, *(key.scope for key in refused)])

    def balances(self, keys: Iterable[BalanceKey]) -> Mapping[BalanceKey, Balances]:
        wanted: dict[_Period, list[BalanceKey]] = {}
        for key in sorted(set(keys)):
            wanted.setdefault(_Period(key.period, key.first_day), []).append(key)
        today = periods.day(self.now(), conf.TIME_ZONE).first_day
        found: dict[BalanceKey, Balances] = {}
        live = [window for window in wanted if window.until + KEPT > today]
        fields = [
            [f"{kind} {key.scope}" for key in wanted[window] for kind in "stc"] for window in live
        ]
        try:
            answers = self._read(live, fields) if live else []
        except CallInsideTransaction:
            # What the caller's transaction sees may be old: good enough to read, not to decide.
            live, answers = [], []
        for window, values in zip(live, answers, strict=True):
            for key, spent, taken, calls in zip(
                wanted[window], values[::3], values[1::3], values[2::3], strict=True
            ):
                if taken is not None or calls is not None:
                    found[key] = _balances(spent, taken, calls)
        rest = [key for window in wanted if window not in live for key in wanted[window]]
        if rest:
            connection = connections[self.alias]
            summed = retry(connection, lambda: journals.balances_of(connection, rest))
            found.update({key: it for key, it in summed.items() if it != Balances()})
        return found

    # Filling hashes from the journal

    def _run_ready(
        self, script: str, windows: Sequence[_Period], keys: Sequence[str], args: Sequence[str]
    ) -> list[Any]:
        """Run a script on windows that count; fill those that do not."""
        self._forget()
        give_up = periods.monotonic() + PATIENCE_SECONDS
        while True:
            answer: list[Any] = self._run(script, keys, args)
            if answer[0] != "unready":
                return answer
            self._load(windows[int(answer[1]) - 1], give_up=give_up)

    def _load(self, window: _Period, *, give_up: float, how: str = "missing") -> None:
        """Fill a hash from the journal, or wait for the worker that does."""
        connection = connections[self.alias]
        ensure_durable(connection)  # an old snapshot of a transaction must not decide
        token = uuid.uuid4().hex
        while (state := self._claim(window, token, how)) != "ready":
            if state == "go" and self._fill(connection, window, token):
                return
            if periods.monotonic() > give_up:
                raise LedgerUnavailable(
                    "The balances in Redis are being filled from the journal; try again soon."
                ) from None
            time.sleep(random.uniform(0.01, 0.05))

    def _claim(self, window: _Period, token: str, how: str) -> str:
        args = [token, how, str(int(CLAIM_SECONDS * 1000))]
        return str(self._run("begin", [self._key(window)], args))

    def _fill(self, connection: BaseDatabaseWrapper, window: _Period, token: str) -> bool:
        """Write what the journal says; say whether the claim held."""
        log.info("Filling the balances of %s in Redis from the journal.", window.first_day)
        with self._alive(window, token):
            summed = retry(connection, lambda: _summed(connection, window))
            flat = [text for field in summed.fields().items() for text in field]
            for start in range(0, len(flat), 2 * _CHUNK):
                part = flat[start : start + 2 * _CHUNK]
                if self._run("load", [self._key(window)], [token, *part]) != "ok":
                    return False
        return self._finish(window, token)

    @contextmanager
    def _alive(self, window: _Period, token: str) -> Iterator[None]:
        """Renew a claim now and then: adding up a busy month may take a while."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(CLAIM_SECONDS / 3):
                with suppress(LedgerUnavailable):
                    self._run("renew", [self._key(window)], [token])

        thread = threading.Thread(target=renew, name="ai_budget_claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _finish(self, window: _Period, token: str) -> bool:
        ends = periods.midnight(window.until, conf.TIME_ZONE)
        kept = max(timedelta(), ends - self.now()) + KEPT
        args = [token, str(int(kept.total_seconds() * 1000))]
        return bool(self._run("finish", [self._key(window)], args) == "ok")

    def _forget(self) -> None:
        """Drop hashes that miss something, so that they are filled anew."""
        while self._to_forget:
            window = self._to_forget.pop()
            try:
                self._drop(self._key(window))
            except LedgerUnavailable:
                self._to_forget.add(window)
                raise

    def _drop(self, key: str) -> None:
        self._ask(lambda: self.client.unlink(key))

    # Comparing and mending

    def differences(self, since: date) -> list[Difference]:
        return [it for window in self._live(since) for it in self._compared(window)]

    def rebuild(self, since: date) -> list[Difference]:
        found = []
        for window in self._live(since):
            wrong = self._compared(window)
            if wrong:
                give_up = periods.monotonic() + PATIENCE_SECONDS
                self._load(window, give_up=give_up, how="anew")
            found += wrong
        self._mirror(self._live(since))
        return found

    def _live(self, since: date) -> list[_Period]:
        """Return the days and months from that day on whose hashes may be there."""
        today = periods.day(self.now(), conf.TIME_ZONE).first_day
        # A zone that was changed may have left a day on either side.
        first = max(since, today - KEPT - timedelta(days=1))
        days = [first + timedelta(days=n) for n in range((today - first).days + 2)]
        months = {day.replace(day=1) for day in days}
        every = [_Period(Period.DAY, day) for day in days]
        return every + [_Period(Period.MONTH, month) for month in sorted(months)]

    def _compared(self, window: _Period) -> list[Difference]:
        """Hold a hash still, compare it with the journal, and let it go on."""
        connection = connections[self.alias]
        ensure_durable(connection)
        token = uuid.uuid4().hex
        give_up = periods.monotonic() + PATIENCE_SECONDS
        while (state := self._claim(window, token, "keep")) != "go":
            if state == "missing" or periods.monotonic() > give_up:
                return []  # what is filled from the journal does not differ from it
            time.sleep(random.uniform(0.01, 0.05))
        try:
            with self._alive(window, token):
                summed = retry(connection, lambda: _summed(connection, window))
                kept = _Summed.of(self._fields(window))
                return _differences(connection, window, kept, summed)
        finally:
            self._finish(window, token)

    def _fields(self, window: _Period) -> dict[str, str]:
        def read() -> dict[str, str]:
            found = self.client.hgetall(self._key(window))
            return {_text(field): _text(value) for field, value in found.items()}

        return dict(self._ask(read))

    def tidy(self) -> None:
        self._forget_unchecked()
        self._forget()
        today = periods.day(self.now(), conf.TIME_ZONE).first_day
        windows = self._live(today - KEPT)
        for window in windows:
            self._close_left_behind(window)
        self._mirror(windows)

    def _forget_unchecked(self) -> None:
        """Have balances filled anew that miss calls which were let through."""
        if conf.ON_LEDGER_FAILURE != "allow":
            return
        connection = connections[self.alias]
        rows = (
            CallLog.objects.using(self.alias)
            .filter(reserved_at__gte=self.now() - KEPT, decision__contains=UNCHECKED)
            .exclude(status=Status.RESERVED)
        )
        found = retry(connection, lambda: list(rows.values_list("pk", "day")))
        for _, day in found:
            self._to_forget |= {_Period(Period.DAY, day), _Period(Period.MONTH, day.replace(day=1))}
        self._forget()
        known = Replace("decision", Value(UNCHECKED), Value("checked later"))
        done = CallLog.objects.using(self.alias).filter(pk__in=[pk for pk, _ in found])
        retry(connection, lambda: done.update(decision=known))

    def _close_left_behind(self, window: _Period) -> None:
        """Give back what Redis holds for rows that the journal has closed."""
        key = self._key(window)
        found = self._ask(
            lambda: [
                _text(field) for field, _ in self.client.hscan_iter(key, match="#*", count=_CHUNK)
            ]
        )
        ids = [int(field[1:]) for field in found]
        for start in range(0, len(ids), _CHUNK):
            some = ids[start : start + _CHUNK]
            closed = retry(connections[self.alias], functools.partial(self._closed, some))
            for row, cost, keep in closed:
                self._run("settle", [key], [str(row), str(cost), keep, "1", "", "[]"])

    def _closed(self, ids: Sequence[int]) -> list[tuple[int, int, str]]:
        """Return which of these rows the journal has closed, at what cost; gone ones at none."""
        rows = CallLog.objects.using(self.alias).filter(pk__in=ids)
        known = {
            pk: (status, cost)
            for pk, status, cost in rows.values_list("pk", "status", "cost_nanousd")
        }
        closed = []
        for pk in ids:
            status, cost = known.get(pk, (Status.RELEASED, 0))
            if status != Status.RESERVED:
                closed.append((pk, cost or 0, "0" if status == Status.RELEASED else "1"))
        return closed

    def _mirror(self, windows: Sequence[_Period]) -> None:
        """Write balances and refusals to SpendWindow, where admin and reports read them."""
        for window in windows:
            fields = self._fields(window)
            # One that is being filled says nothing yet.
            balances = _Summed.of(fields).balances() if "run" in fields else {}
            refused = self._refusals(window) if window.period is Period.DAY else {}
            _write_windows(connections[self.alias], window, balances, refused)

    def _refusals(self, window: _Period) -> dict[str, int]:
        """Take the refusals that were counted in a day since the last time."""
        found = self._run("collect", [self._refused_key(window.first_day)], [])
        return {scope: int(count) for scope, count in zip(found[::2], found[1::2], strict=True)}

    # Redis

    def close(self) -> None:
        client = self.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def _key(self, window: _Period) -> str:
        return f"{self.prefix}:{window.period}:{window.first_day.isoformat()}"

    def _refused_key(self, day: date) -> str:
        return f"{self.prefix}:refused:{day.isoformat()}"

    def _bucket_key(self, bucket: Bucket) -> str:
        digest = RateBucket.key_for(bucket.scope, bucket.measure, bucket.seconds)
        return f"{self.prefix}:bucket:{digest}"

    def _read(
        self, windows: Sequence[_Period], fields: Sequence[Sequence[str]]
    ) -> list[list[str | None]]:
        keys = [self._key(window) for window in windows]
        answer = self._run_ready("read", windows, keys, [json.dumps(each) for each in fields])
        return answer[1:]

    def _read_clock(self) -> datetime:
        def read() -> tuple[int, int]:
            seconds, microseconds = self.client.time()
            return int(seconds), int(microseconds)

        seconds, microseconds = self._ask(read)
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=microseconds)

    def _run(self, name: str, keys: Sequence[str], args: Sequence[str]) -> Any:
        def step() -> Any:
            script = self._scripts.get(name)
            if script is None:
                script = self._scripts[name] = self.client.register_script(_source(name))
            return _texts(script(keys=keys, args=args))

        return self._ask(step)

    def _ask(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (redis.RedisError, OSError) as error:
            raise LedgerUnavailable(
                f"The ledger's Redis did not answer ({type(error).__name__}). Nothing was sent "
                "unless it was reserved before."
            ) from None


# Sums of a window, as they come from the journal and from Redis


@dataclass(slots=True)
class _Summed:
    """What one window holds: balances by scope, and rows that are open."""

    spent: dict[str, int]
    taken: dict[str, int]
    calls: dict[str, int]
    open_rows: dict[int, str]

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> _Summed:
        """Read the fields of a hash."""
        summed = cls({}, {}, {}, {})
        by_kind = {"s ": summed.spent, "t ": summed.taken, "c ": summed.calls}
        for field, value in fields.items():
            if field[:2] in by_kind:
                by_kind[field[:2]][field[2:]] = int(value)
            elif field.startswith("#"):
                summed.open_rows[int(field[1:])] = value
        return summed

    def fields(self) -> dict[str, str]:
        """Return the fields of a hash."""
        return {
            **{f"s {scope}": str(value) for scope, value in self.spent.items()},
            **{f"t {scope}": str(value) for scope, value in self.taken.items()},
            **{f"c {scope}": str(value) for scope, value in self.calls.items()},
            **{f"#{row}": value for row, value in self.open_rows.items()},
        }

    def add(self, scope: str, *, spent: int = 0, held: int = 0, calls: int = 0) -> None:
        self.spent[scope] = self.spent.get(scope, 0) + spent
        self.taken[scope] = self.taken.get(scope, 0) + spent + held
        self.calls[scope] = self.calls.get(scope, 0) + calls

    def balances(self) -> dict[str, Balances]:
        scopes = {*self.spent, *self.taken, *self.calls}
        return {
            scope: Balances(
                spent_nanousd=self.spent.get(scope, 0),
                held_nanousd=self.taken.get(scope, 0) - self.spent.get(scope, 0),
                calls=self.calls.get(scope, 0),
            )
            for scope in scopes
        }


def _summed(connection: BaseDatabaseWrapper, window: _Period) -> _Summed:
    """Add up the journal for one window."""
    summed = _Summed({}, {}, {}, {})
    for entry in journals.entries(connection, since=window.first_day, until=window.until):
        it = entry.balances
        keys = balance_keys(entry.charge, entry.category, entry.day)
        scopes = [key.scope for key in keys if key.period is window.period]
        for scope in scopes:
            summed.add(scope, spent=it.spent_nanousd, held=it.held_nanousd, calls=it.calls)
        if entry.row:
            summed.open_rows[entry.row] = _open_row(it.held_nanousd, it.calls, scopes)
    return summed


def _open_row(amount: int, calls: int, scopes: Sequence[str]) -> str:
    return json.dumps([str(amount), str(calls), list(scopes)])


def _differences(
    connection: BaseDatabaseWrapper, window: _Period, kept: _Summed, summed: _Summed
) -> list[Difference]:
    """Compare a hash that was held still with a journal that went on.

    Rows that are on their way are seen as the journal sees them: those that it has closed are
    closed, and those that Redis was not asked about yet are left out.
    """
    on_their_way = [row for row in kept.open_rows if row not in summed.open_rows]
    rows = CallLog.objects.using(connection.alias).filter(pk__in=on_their_way)
    closed = {
        pk: (status, cost or 0)
        for pk, status, cost in retry(
            connection, lambda: list(rows.values_list("pk", "status", "cost_nanousd"))
        )
    }
    for row in on_their_way:
        amount, calls, scopes, *_ = json.loads(kept.open_rows[row])
        status, cost = closed.get(row, (Status.RELEASED, 0))
        gone = int(calls) if status == Status.RELEASED else 0
        for scope in scopes:
            kept.add(scope, spent=cost, held=-int(amount), calls=-gone)
    for row in summed.open_rows.keys() - kept.open_rows.keys():
        amount, calls, scopes = json.loads(summed.open_rows[row])
        for scope in scopes:
            summed.add(scope, held=-int(amount), calls=-int(calls))
    ours, theirs, nothing = kept.balances(), summed.balances(), Balances()
    return [
        Difference(
            key=BalanceKey(scope, window.period, window.first_day),
            kept=ours.get(scope, nothing),
            journal=theirs.get(scope, nothing),
        )
        for scope in sorted({*ours, *theirs})
        if ours.get(scope, nothing) != theirs.get(scope, nothing)
    ]


# The journal's rows


def _write(connection: BaseDatabaseWrapper, attempt: Attempt, amounts: Amounts, note: str) -> int:
    """Write the row of an attempt, once."""
    tried = False

    def step() -> int:
        nonlocal tried
        again, tried = tried, True
        # A connection that was lost may have committed before.
        row = journals.row_of(connection.alias, attempt) if again else None
        if row is not None:
            return row
        rows = journal(connection)
        # A statement by itself is a transaction, and half the way there and back.
        with connection.cursor() as cursor:
            return rows.write(cursor, rows.prepare(attempt, amounts), note)

    return retry(connection, step)


def _release(connection: BaseDatabaseWrapper, row: int, now: datetime) -> None:
    """Close the row of a call that was not sent, for want of Redis."""
    settlement = replace(_UNSENT, error="ledger unavailable")
    with suppress(LedgerUnavailable):  # the tick releases it
        retry(connection, lambda: _close(connection, row, settlement, now))


def _delete(connection: BaseDatabaseWrapper, row: int) -> None:
    """Delete the row of a call that was refused in the race: it never was one."""
    rows = CallLog.objects.using(connection.alias).filter(pk=row, status=Status.RESERVED)
    with suppress(LedgerUnavailable):  # the tick releases it
        retry(connection, lambda: rows._raw_delete(connection.alias))


def _close(
    connection: BaseDatabaseWrapper, row: int, settlement: Settlement, now: datetime
) -> bool:
    """Close an open row; say whether it was open."""
    with connection.cursor() as cursor:
        return journal(connection).close(cursor, row, settlement, now, Status.RESERVED)


def _write_truth(
    connection: BaseDatabaseWrapper, row: int, settlement: Settlement, now: datetime
) -> None:
    """Write over an estimate what the call cost in truth."""
    with connection.cursor() as cursor:
        journal(connection).close(cursor, row, settlement, now, Status.ESTIMATED)


def _write_windows(
    connection: BaseDatabaseWrapper,
    window: _Period,
    balances: Mapping[str, Balances],
    refused: Mapping[str, int],
) -> None:
    """Bring the rows of one window to what Redis holds."""
    rows = SpendWindow.objects.using(connection.alias)

    def step() -> None:
        there = {
            row.scope: row for row in rows.filter(period=window.period, first_day=window.first_day)
        }
        changed = []
        for scope in {*balances, *refused}:
            row = there.get(scope) or SpendWindow(
                scope=scope, period=window.period, first_day=window.first_day
            )
            it = balances.get(scope, Balances())
            before = (row.spent_nanousd, row.held_nanousd, row.calls)
            row.spent_nanousd, row.held_nanousd, row.calls = (
                it.spent_nanousd,
                it.held_nanousd,
                it.calls,
            )
            row.refused += refused.get(scope, 0)
            if before != (row.spent_nanousd, row.held_nanousd, row.calls) or refused.get(scope):
                changed.append(row)
        targets = ["key"] if connection.features.supports_update_conflicts_with_target else None
        with transaction.atomic(using=connection.alias):
            rows.bulk_create(
                changed,
                update_conflicts=True,
                update_fields=["spent_nanousd", "held_nanousd", "calls", "refused"],
                unique_fields=targets,
                batch_size=500,
            )

    retry(connection, step)


# What travels to the scripts and back


def _asked(limits: Sequence[Limit | Bucket], amounts: Amounts) -> _Asked:
    by_period: dict[_Period, list[Limit]] = {}
    buckets = [limit for limit in limits if isinstance(limit, Bucket)]
    for limit in limits:
        if isinstance(limit, Limit):
            key = limit.key
            by_period.setdefault(_Period(key.period, key.first_day), []).append(limit)
    windows = sorted(by_period)
    checks = [[it for it in by_period[window] if it.amount is not None] for window in windows]
    asked = {
        "amount": str(amounts.nanousd),
        "calls": str(amounts.calls),
        "windows": [
            {
                "scopes": list(dict.fromkeys(limit.scope for limit in by_period[window])),
                "checks": [_check_json(limit, amounts) for limit in limited],
            }
            for window, limited in zip(windows, checks, strict=True)
        ],
        "buckets": [_bucket_json(bucket, bucket.takes(amounts)) for bucket in buckets],
    }
    return _Asked(periods=windows, buckets=buckets, checks=checks, json=json.dumps(asked))


def _check_json(limit: Limit, amounts: Amounts) -> list[Any]:
    amount = limit.amount or 0
    money = limit.measure is Measure.NANOUSD
    requested = amounts.nanousd if money else amounts.calls
    field = f"{'t' if money else 'c'} {limit.scope}"
    return [field, str(amount - requested), str(amount), int(limit.enforce)]


def _bucket_json(bucket: Bucket, wanted: int) -> dict[str, int]:
    amount = _exact(bucket)
    return {
        "wanted": wanted * bucket.milliseconds,
        "amount": amount,
        "full": amount * bucket.milliseconds,
        "enforced": int(bucket.enforce),
    }


def _exact(bucket: Bucket) -> int:
    """Return a bucket's amount, or the most that Lua can count exactly."""
    return min(bucket.amount, _LARGEST // (2 * bucket.milliseconds))


def _breach(found: Sequence[Any], asked: _Asked, amounts: Amounts) -> Breach | None:
    if found[0] == "b":
        bucket = asked.buckets[int(found[1]) - 1]
        return bucket_breach(bucket, bucket.takes(amounts), int(found[2]))
    limit = asked.checks[int(found[1]) - 1][int(found[2]) - 1]
    money = limit.measure is Measure.NANOUSD
    requested = amounts.nanousd if money else amounts.calls
    taken, spent, mine = int(found[3]), int(found[4]), int(found[5])
    if mine:
        taken -= requested
    return Breach(limit=limit, requested=requested, taken=taken, held=taken - spent if money else 0)


def _balances(spent: str | None, taken: str | None, calls: str | None) -> Balances:
    booked = int(spent or 0)
    return Balances(
        spent_nanousd=booked, held_nanousd=int(taken or 0) - booked, calls=int(calls or 0)
    )


def _texts(answer: Any) -> Any:
    if isinstance(answer, (list, tuple)):
        return [_texts(each) for each in answer]
    return _text(answer) if isinstance(answer, bytes) else answer


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


@functools.lru_cache(maxsize=16)
def _source(name: str) -> str:
    folder = resources.files("ai_budget.ledger") / "lua"
    return "".join((folder / f"{part}.lua").read_text() for part in ("prelude", name))
