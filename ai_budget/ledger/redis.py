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
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import redis
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Value
from django.db.models.functions import Replace

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.exceptions import CallInsideTransaction, LedgerUnavailable
from ai_budget.ledger import journal as journals
from ai_budget.ledger.base import Breach, Ledger, bucket_breach, enforced, given_back, milliseconds
from ai_budget.ledger.clock import StoreClock
from ai_budget.ledger.connection import (
    RowRefused,
    guest_transaction,
    lets_pass,
    patient_transaction,
    retry,
)
from ai_budget.ledger.kept import whole_since
from ai_budget.ledger.mirror import mirror, mirrored
from ai_budget.ledger.parts import PARTED, Chunk, book_parts
from ai_budget.ledger.redis_client import connect, key_prefix
from ai_budget.ledger.redis_hashes import Hash, Summed, add_up, compare, held_by
from ai_budget.ledger.redis_wire import (
    Asked,
    Step,
    ask_for,
    balances_of,
    breach_of,
    bucket_json,
    exact,
    source,
    text,
    texts,
)
from ai_budget.ledger.set_aside import SetAside
from ai_budget.models import CallLog, RateBucket, SpendWindow
from ai_budget.periods import Period
from ai_budget.values import (
    Amounts,
    Attempt,
    BalanceKey,
    Balances,
    Bucket,
    Difference,
    Limit,
    Part,
    Reservation,
    Settlement,
    Status,
)

log = logging.getLogger("ai_budget")

PATIENCE_SECONDS = 6.0
"""How long a call waits for the worker that fills a hash: longer than for a dead one."""

CLAIM_SECONDS = 4.0
"""After which a worker that fills a hash, and does not say that it lives, is taken for dead."""

LOOK_SECONDS = 10.0
"""How long after a refusal calls ask Redis before they write to the journal. Most sites have none
for hours, and save the question; one that is over a limit has many."""

FLIGHT_SECONDS = 1.0
"""How long a step may be on its way from the journal to Redis before it is taken for lost."""

KEPT = timedelta(days=3)
"""How long a hash is kept after its window: the tick looks for what was left behind."""

UNCHECKED = "unchecked"
"""What the journal says of a call that was let through while Redis was away."""

_CHUNK = 1_000
"""Fields that are sent at once; Lua unpacks some thousand."""

_UNSENT = Settlement(
    status=Status.RELEASED, cost_nanousd=0, keep_call=False, error="never admitted"
)


class RedisLedger(Ledger):
    """Balances as hashes in Redis, one a day and one a month; the journal as rows of CallLog."""

    needs_redis = True

    def __init__(self) -> None:
        self._clock = StoreClock(self._read_clock)
        self._scripts: dict[str, Any] = {}
        self._to_forget: set[Hash] = set()
        self._look_until = float("-inf")
        self._seen: set[Hash] = set()

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
        except LedgerUnavailable as error:
            if lets_pass(error):
                return periods.now()
            raise

    # Reserving

    def reserve(
        self, limits: Sequence[Limit | Bucket], amounts: Amounts, attempt: Attempt
    ) -> Reservation:
        connection = connections[self.alias]
        self.ensure_durable()
        asked = ask_for(limits, amounts)
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
        except LedgerUnavailable as error:
            if not lets_pass(error):
                raise
            return self._unchecked(connection, reservation)
        row = journals.insert(connection, attempt, amounts, note)
        reservation = replace(reservation, id=row)
        try:
            shadowed = self._take(asked, amounts, attempt, row=str(reservation.id))
        except LedgerUnavailable as error:
            self._look()
            if lets_pass(error):
                return self._unchecked(connection, reservation)
            # Whether Redis heard of it or not: the tick gives back what it holds.
            unsent = replace(_UNSENT, error="ledger unavailable")
            with suppress(LedgerUnavailable):
                journals.close_open(connection, reservation, unsent, self._time_of_booking())
            raise
        except Exception:
            self._look()
            with suppress(LedgerUnavailable):  # the tick releases it
                journals.delete_open(connection, row)
            raise
        if self._time_of_booking() >= attempt.deadline:
            # It slept, and the tick may have taken it for one that was never admitted.
            self.settle(reservation, _UNSENT)
            raise LedgerUnavailable("The worker slept while it reserved.") from None
        if shadowed and not note:
            self._note(connection, reservation, f"would refuse: {shadowed}")
        return reservation

    def _look(self) -> None:
        """Ask Redis first for a while: refusals then cost the database nothing."""
        self._look_until = periods.monotonic() + LOOK_SECONDS

    def _note(self, connection: BaseDatabaseWrapper, reservation: Reservation, note: str) -> None:
        decision = f"{note}; {reservation.attempt.decision}".strip("; ")
        journals.note_decision(connection, reservation.id, decision)

    def _take(self, asked: Asked, amounts: Amounts, attempt: Attempt, *, row: str) -> str:
        """Run the script; raise for what is enforced, return what shadow mode would refuse."""
        keys = [*map(self._key, asked.periods), *map(self._bucket_key, asked.buckets)]
        now = str(milliseconds(attempt.reserved_at)) if periods.is_overridden() else ""
        answer = self._run_ready("take", asked.periods, keys, [row, now, asked.json])
        found = [breach_of(breach, asked, amounts) for breach in answer[1:]]
        return _decided(answer[0], found, attempt.reserved_at)

    def _unchecked(self, connection: BaseDatabaseWrapper, reservation: Reservation) -> Reservation:
        """Let a call through that nobody has checked: its row tells, and Redis learns later."""
        log.error("Redis does not answer; a call is let through unchecked.")
        row = reservation.id
        if row:
            self._note(connection, reservation, UNCHECKED)
        else:
            decision = f"{UNCHECKED}; {reservation.attempt.decision}".strip("; ")
            noted = replace(reservation.attempt, decision=decision)
            row = journals.insert(connection, noted, reservation.amounts)
        self._mark_unchecked(connection, reservation.attempt.day)
        return replace(reservation, id=row, unchecked=True)

    def _mark_unchecked(self, connection: BaseDatabaseWrapper, day: date) -> None:
        """Leave word for the tick, should this worker not live to have the balances filled."""
        mark = SpendWindow(scope=UNCHECKED, period=Period.DAY, first_day=day)
        marks = SpendWindow.objects.using(self.alias)
        with patient_transaction(connection):
            marks.bulk_create([mark], ignore_conflicts=True)

    # Settling

    def settle(self, reservation: Reservation, settlement: Settlement) -> None:
        connection = connections[self.alias]
        self.ensure_durable()
        now = self._time_of_booking()
        touched = _hashes(reservation.balances)
        closed = journals.close_open(connection, reservation, settlement, now)
        if closed is None:
            # Somebody was first: the tick, at the bound. What is known corrects an estimate.
            if settlement.status is not Status.ESTIMATED:
                self._correct(connection, reservation.id, settlement, now, touched)
            return
        reservation, settlement = closed
        try:
            self._forget()
            known = self._give_back(touched, reservation, settlement)
            if reservation.unchecked and known < len(touched):
                self._to_forget.update(touched)
                self._forget()
        except LedgerUnavailable:
            if reservation.unchecked:
                self._to_forget.update(touched)
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
        touched: Sequence[Hash],
    ) -> None:
        """Write the truth over an estimate."""
        if not journals.is_estimate(connection, row):
            return
        with self._anew(touched):
            journals.correct_estimate(connection, row, settlement, now)

    def _give_back(
        self, touched: Sequence[Hash], reservation: Reservation, settlement: Settlement
    ) -> int:
        """Run the script; return in how many of the hashes the row was open."""
        changes = {
            bucket: change
            for bucket in reservation.buckets
            if (change := given_back(bucket, reservation.amounts, settlement)) is not None
        }
        step = Step(
            row=reservation.id,
            before=reservation.amounts,
            cost=settlement.cost_nanousd,
            back=0 if settlement.keep_call else reservation.amounts.calls,
        )
        return self._book(touched, step, changes)

    def _book(
        self,
        touched: Sequence[Hash],
        step: Step,
        changes: Mapping[Bucket, tuple[int, int]] | None = None,
    ) -> int:
        """Book a step that the journal knows; return in how many of the hashes it was new.

        One that lacks a step before it is dropped, unless that one was only on its way.
        """
        changes = changes or {}
        given = [
            {"back": back, "least": least, "amount": bucket.amount}
            for bucket, (back, least) in changes.items()
        ]
        now = str(milliseconds(periods.now())) if periods.is_overridden() else ""
        keys = list(map(self._key, touched))
        args = [*step.arguments(), str(len(keys)), now]
        found, *lost = self._run(
            "settle", [*keys, *map(self._bucket_key, changes)], [*args, json.dumps(given)]
        )
        give_up = periods.monotonic() + FLIGHT_SECONDS
        while lost and periods.monotonic() < give_up:
            time.sleep(random.uniform(0.005, 0.02))
            more, *lost = self._run("settle", keys, [*args, "[]"])
            found += more
        self._to_forget.update(touched[int(which) - 1] for which in lost)
        self._forget()
        return int(found)

    def settle_parts(
        self, reservation: int, claim: Callable[[CallLog], Sequence[Part]]
    ) -> Sequence[Part]:
        connection = connections[self.alias]
        self.ensure_durable()
        while True:
            row = journals.find(connection, reservation)
            if row is None or row.status not in PARTED:
                return ()
            touched = _hashes(journals.keys_of(row))
            if row.status == Status.ESTIMATED:
                chunk = self._correct_parts(connection, row, claim, touched)
            else:
                chunk = self._book_open_parts(connection, row, claim, touched)
            # Somebody booked or released the whole of it just now, unless it is there.
            if chunk is not None:
                return chunk.told()

    def _book_open_parts(
        self,
        connection: BaseDatabaseWrapper,
        row: CallLog,
        claim: Callable[[CallLog], Sequence[Part]],
        touched: Sequence[Hash],
    ) -> Chunk | None:
        chunk = self._journal_parts(connection, row, claim)
        if chunk is None or not chunk.parts:
            return chunk
        step = Step(
            row=row.pk, before=chunk.before, left=chunk.left, cost=chunk.cost, back=chunk.released
        )
        try:
            self._forget()
            known = self._book(touched, step)
            if UNCHECKED in row.decision and known < len(touched):
                self._to_forget.update(touched)
                self._forget()
        except LedgerUnavailable:
            # The journal has it, and what Redis holds is too much: it is filled anew.
            self._to_forget.update(touched)
            log.error("Redis does not answer; parts of call %s are booked later.", row.pk)
        return chunk

    def _correct_parts(
        self,
        connection: BaseDatabaseWrapper,
        row: CallLog,
        claim: Callable[[CallLog], Sequence[Part]],
        touched: Sequence[Hash],
    ) -> Chunk | None:
        with self._anew(touched):
            return self._journal_parts(connection, row, claim)

    def _journal_parts(
        self,
        connection: BaseDatabaseWrapper,
        row: CallLog,
        claim: Callable[[CallLog], Sequence[Part]],
    ) -> Chunk | None:
        """Book parts in the journal, unless the row's status is another one by now."""

        def step() -> Chunk | None:
            now = self._time_of_booking()
            with guest_transaction(connection) as cursor:
                return book_parts(connection, cursor, row.pk, claim, now, among=(row.status,))

        return retry(connection, step)

    @contextmanager
    def _anew(self, touched: Sequence[Hash]) -> Iterator[None]:
        """Have balances filled anew after what is booked inside: it is rare.

        They are claimed first, so that whoever dies between leaves them to be filled anew, too.
        """
        with suppress(LedgerUnavailable):
            for window in touched:
                # A claim that is not renewed makes the hash unknown, whatever becomes of this.
                self._claim(window, uuid.uuid4().hex, "anew", give_up=_patience())
        try:
            yield
        finally:
            self._to_forget.update(touched)
            with suppress(LedgerUnavailable):  # this worker's next call will, or the claims lapse
                self._forget()

    def _time_of_booking(self) -> datetime:
        """Return the time; the worker's own, if Redis cannot say: it decides nothing here."""
        try:
            return self.now()
        except LedgerUnavailable:
            return periods.now()

    def _settle_overdue(self, row: CallLog) -> None:
        reservation = journals.reservation_of(row)
        if UNCHECKED in row.decision:
            self.settle(replace(reservation, unchecked=True), journals.at_bound(row))
        elif self._is_open(reservation):
            self.settle(reservation, journals.at_bound(row))
        else:
            # Its worker died before it asked, so nothing was sent.
            self.settle(reservation, _UNSENT)

    def _is_open(self, reservation: Reservation) -> bool:
        day = next(key for key in reservation.balances if key.period is Period.DAY)
        window = Hash(day.period, day.first_day)
        answer = self._read([window], [[f"#{reservation.id}"]])
        return answer[0][0] is not None

    # Views, refusals, balances

    def take(self, buckets: Sequence[Bucket], *, at: datetime) -> None:
        buckets = [exact(bucket) for bucket in buckets]
        asked = [bucket_json(bucket, 1) for bucket in buckets]
        now = str(milliseconds(at)) if periods.is_overridden() else ""
        keys = [self._bucket_key(bucket) for bucket in buckets]
        answer = self._run("draw", keys, [now, json.dumps(asked)])
        found = [bucket_breach(buckets[int(which) - 1], 1, int(used)) for which, used in answer[1:]]
        _decided(answer[0], found, at)

    def count_refusal(self, keys: Iterable[BalanceKey]) -> None:
        refused = sorted(set(keys))
        if refused:
            days = [self._refused_key(key.first_day) for key in refused]
            kept = str(int(KEPT.total_seconds() * 1000))
            self._run("refuse", days, [kept, *(key.scope for key in refused)])

    def balances(self, keys: Iterable[BalanceKey]) -> Mapping[BalanceKey, Balances]:
        wanted: dict[Hash, list[BalanceKey]] = {}
        for key in sorted(set(keys)):
            wanted.setdefault(Hash(key.period, key.first_day), []).append(key)
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
                    found[key] = balances_of(spent, taken, calls)
        rest = [key for window in wanted if window not in live for key in wanted[window]]
        if rest:
            connection = connections[self.alias]
            found.update(retry(connection, lambda: _of_the_past(connection, rest)))
        return found

    # Filling hashes from the journal

    def _run_ready(
        self, script: str, windows: Sequence[Hash], keys: Sequence[str], args: Sequence[str]
    ) -> list[Any]:
        """Run a script on windows that count; fill those that do not."""
        self._forget()
        give_up = _patience()
        while True:
            answer: list[Any] = self._run(script, keys, args)
            if answer[0] != "unready":
                return answer
            self._load(windows[int(answer[1]) - 1], give_up=give_up)

    def _load(self, window: Hash, *, give_up: float, how: str = "missing") -> None:
        """Fill a hash from the journal, or wait for the worker that does."""
        connection = connections[self.alias]
        self.ensure_durable()  # an old snapshot of a transaction must not decide
        token = uuid.uuid4().hex
        while True:
            state = self._claim(window, token, how, give_up=give_up)
            if state == "ready" or (state == "go" and self._fill(connection, window, token)):
                return
            if periods.monotonic() > give_up:
                raise LedgerUnavailable(
                    "The balances in Redis are being filled from the journal; try again soon."
                ) from None

    def _claim(self, window: Hash, token: str, how: str, *, give_up: float) -> str:
        """Claim a hash, and wait while somebody else has it; return what the script says last."""
        args = [token, how, str(int(CLAIM_SECONDS * 1000))]
        while True:
            state = str(self._run("begin", [self._key(window)], args))
            if state != "wait" or periods.monotonic() > give_up:
                return state
            time.sleep(random.uniform(0.01, 0.05))

    def _fill(self, connection: BaseDatabaseWrapper, window: Hash, token: str) -> bool:
        """Write what the journal says; say whether the claim held."""
        log.info("Filling the balances of %s in Redis from the journal.", window.first_day)
        with self._alive(window, token):
            summed = retry(connection, lambda: add_up(connection, window))
            flat = [part for field in summed.fields().items() for part in field]
            for start in range(0, len(flat), 2 * _CHUNK):
                some = flat[start : start + 2 * _CHUNK]
                if self._run("load", [self._key(window)], [token, *some]) != "ok":
                    return False
        return self._finish(window, token)

    @contextmanager
    def _alive(self, window: Hash, token: str) -> Iterator[None]:
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

    def _finish(self, window: Hash, token: str) -> bool:
        ends = periods.midnight(window.until, conf.TIME_ZONE)
        kept = max(timedelta(), ends - self.now()) + KEPT
        args = [token, str(int(kept.total_seconds() * 1000))]
        return bool(self._run("finish", [self._key(window)], args) == "ok")

    def _forget(self) -> None:
        """Drop hashes that miss something, so that they are filled anew."""
        while self._to_forget:
            with suppress(KeyError):  # another thread was faster
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

    def rebuild(self, since: date, aside: SetAside | None = None) -> list[Difference]:
        found, aside = [], aside or SetAside()
        windows = self._live(since)
        for window in windows:
            with aside.on_failure("balances of", window):
                wrong = self._compared(window)
                if wrong:
                    self._load(window, give_up=_patience(), how="anew")
                found += wrong
        self._mirror(windows, aside)
        return found

    def _live(self, since: date) -> list[Hash]:
        """Return the days and months from that day on whose hashes may be there."""
        today = periods.day(self.now(), conf.TIME_ZONE).first_day
        # A zone that was changed may have left a day on either side.
        first = max(since, today - KEPT - timedelta(days=1))
        days = [first + timedelta(days=n) for n in range((today - first).days + 2)]
        months = {day.replace(day=1) for day in days}
        every = [Hash(Period.DAY, day) for day in days]
        return every + [Hash(Period.MONTH, month) for month in sorted(months)]

    def _compared(self, window: Hash) -> list[Difference]:
        """Compare a hash with the journal while calls go on; make them wait only in doubt."""
        connection = connections[self.alias]
        self.ensure_durable()
        dump = self._run("dump", [self._key(window)], [])
        if not dump:
            return []  # what has to be filled from the journal does not differ from it
        at = periods.now() if periods.is_overridden() else _moment(*dump[:2])
        kept = Summed.of(dict(zip(dump[2::2], dump[3::2], strict=True)))
        if retry(connection, lambda: compare(connection, window, kept, at=at)) == []:
            return []
        give_up = periods.monotonic() + FLIGHT_SECONDS
        while True:
            found = self._compared_still(connection, window)
            if found is not None:
                return found
            if periods.monotonic() > give_up:
                # A step was lost between journal and Redis, which holds too much.
                self._to_forget.add(window)
                self._forget()
                return []
            time.sleep(random.uniform(0.01, 0.05))

    def _compared_still(
        self, connection: BaseDatabaseWrapper, window: Hash
    ) -> list[Difference] | None:
        """Compare a hash while nobody takes from it: what is only on its way does not differ.

        Return None where parts of a row are: what was booked meanwhile counts afterwards.
        """
        token = uuid.uuid4().hex
        if self._claim(window, token, "keep", give_up=_patience()) != "go":
            return []
        found: list[Difference] | None = []
        try:
            with self._alive(window, token):
                kept = Summed.of(self._fields(window))
                step = functools.partial(compare, connection, window, kept, at=None)
                found = retry(connection, step)
        finally:
            held = self._finish(window, token)
        return found if held else []  # somebody has had it filled anew meanwhile

    def _fields(self, window: Hash) -> dict[str, str]:
        def read() -> dict[str, str]:
            found = self.client.hgetall(self._key(window))
            return {text(field): text(value) for field, value in found.items()}

        return dict(self._ask(read))

    def tidy(self, aside: SetAside | None = None) -> None:
        self.ensure_durable()  # rows that a transaction does not see are not gone
        aside = aside or SetAside()
        self._forget_unchecked()
        self._forget()
        today = periods.day(self.now(), conf.TIME_ZONE).first_day
        windows = self._live(today - KEPT)
        for window in windows:
            with aside.on_failure("balances of", window):
                self._close_left_behind(window)
        self._mirror(windows, aside)

    def _forget_unchecked(self) -> None:
        """Have balances filled anew that miss calls which were let through."""
        connection = connections[self.alias]
        marks = SpendWindow.objects.using(self.alias).filter(scope=UNCHECKED, period=Period.DAY)
        for mark in retry(connection, lambda: list(marks)):
            rows = CallLog.objects.using(self.alias).filter(
                day=mark.first_day, decision__contains=UNCHECKED
            )
            opened = rows.filter(status=Status.RESERVED)
            ended = rows.exclude(status=Status.RESERVED)
            still_open = retry(connection, opened.exists)
            month = mark.first_day.replace(day=1)
            self._to_forget |= {Hash(Period.DAY, mark.first_day), Hash(Period.MONTH, month)}
            self._forget()
            known = Replace("decision", Value(UNCHECKED), Value("checked later"))
            retry(connection, functools.partial(ended.update, decision=known))
            if not still_open:
                retry(connection, mark.delete)

    def _close_left_behind(self, window: Hash) -> None:
        """Give back what Redis holds for rows that the journal has closed.

        Where a step is missing, or a row, the hash is dropped: nothing tells what they cost.
        """
        key = self._key(window)
        found = self._ask(
            lambda: {
                int(text(field)[1:]): held_by(text(entry))
                for field, entry in self.client.hscan_iter(key, match="#*", count=_CHUNK)
            }
        )
        ids = list(found)
        behind: dict[int, Amounts] = {}
        for start in range(0, len(ids), _CHUNK):
            some = ids[start : start + _CHUNK]
            rows = retry(connections[self.alias], functools.partial(self._standings, some))
            if len(rows) < len(some):
                self._to_forget.add(window)
            for row, (status, cost, amounts) in rows.items():
                if status != Status.RESERVED:
                    back = amounts.calls if status == Status.RELEASED else 0
                    self._book([window], Step(row=row, before=amounts, cost=cost, back=back))
                elif amounts != found[row]:
                    behind[row] = amounts
        if behind and self._are_behind(window, behind):
            self._to_forget.add(window)
        self._forget()

    def _standings(self, ids: Sequence[int]) -> dict[int, tuple[str, int, Amounts]]:
        """Return the status, the cost and what was held of those rows that the journal has."""
        rows = CallLog.objects.using(self.alias).filter(pk__in=ids)
        columns = ("pk", "status", "cost_nanousd", "reserved_nanousd", "counted")
        return {
            pk: (status, cost or 0, Amounts(nanousd=reserved, calls=counted))
            for pk, status, cost, reserved, counted in rows.values_list(*columns)
        }

    def _are_behind(self, window: Hash, rows: Mapping[int, Amounts]) -> bool:
        """Say whether Redis still holds more for a row than the journal did a moment ago."""
        time.sleep(FLIGHT_SECONDS)
        fields = [f"#{row}" for row in rows]
        run, *entries = self._ask(lambda: self.client.hmget(self._key(window), ["run", *fields]))
        return run is not None and any(
            entry is not None and not _has_come_to(held_by(text(entry)), amounts)
            for entry, amounts in zip(entries, rows.values(), strict=True)
        )

    def _mirror(self, windows: Sequence[Hash], aside: SetAside) -> None:
        """Write balances and refusals to SpendWindow, where admin and reports read them."""
        for window in windows:
            with aside.on_failure("balances of", window):
                fields = self._fields(window)
                # One that is being filled says nothing yet.
                balances = Summed.of(fields).balances() if "run" in fields else {}
                refused = self._refusals(window) if window.period is Period.DAY else {}
                mirror(
                    connections[self.alias],
                    window.period,
                    window.first_day,
                    balances=balances,
                    refused=refused,
                    aside=aside,
                )

    def _refusals(self, window: Hash) -> dict[str, int]:
        """Take the refusals that were counted in a day since the last time."""
        found = self._run("collect", [self._refused_key(window.first_day)], [])
        return {scope: int(count) for scope, count in zip(found[::2], found[1::2], strict=True)}

    # Redis

    def close(self) -> None:
        self._scripts.clear()
        client = self.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def _key(self, window: Hash) -> str:
        return f"{self.prefix}:{window.period}:{window.first_day.isoformat()}"

    def _refused_key(self, day: date) -> str:
        return f"{self.prefix}:refused:{day.isoformat()}"

    def _bucket_key(self, bucket: Bucket) -> str:
        digest = RateBucket.key_for(bucket.scope, bucket.measure, bucket.seconds)
        return f"{self.prefix}:bucket:{digest}"

    def _read(
        self, windows: Sequence[Hash], fields: Sequence[Sequence[str]]
    ) -> list[list[str | None]]:
        keys = [self._key(window) for window in windows]
        answer = self._run_ready("read", windows, keys, [json.dumps(each) for each in fields])
        return answer[1:]

    def _read_clock(self) -> datetime:
        return _moment(*self._ask(lambda: self.client.time()))  # noqa: PLW0108 - it connects

    def _run(self, name: str, keys: Sequence[str], args: Sequence[str]) -> Any:
        def step() -> Any:
            script = self._scripts.get(name)
            if script is None:
                script = self._scripts[name] = self.client.register_script(source(name))
            return texts(script(keys=keys, args=args))

        return self._ask(step)

    def _ask(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (redis.RedisError, OSError) as error:
            if isinstance(error, redis.DataError) or _OF_A_SCRIPT.match(str(error)):
                raise RowRefused("The ledger's Redis does not take what it was sent.") from None
            raise LedgerUnavailable(
                f"The ledger's Redis did not answer ({type(error).__name__}). Nothing was sent "
                "unless it was reserved before."
            ) from None


_OF_A_SCRIPT = re.compile(r"(?:ERR )?(?:user_script:|Error running script)")
"""How an error begins that a script met in its arguments, or in what a key holds."""


def _of_the_past(
    connection: BaseDatabaseWrapper, keys: Sequence[BalanceKey]
) -> dict[BalanceKey, Balances]:
    """Return what balances hold that Redis keeps no more: by the journal, or as it was copied."""
    whole = whole_since(connection.alias)
    purged = [key for key in keys if whole is not None and key.first_day < whole]
    summed = journals.balances_of(connection, set(keys).difference(purged))
    counted = {key: it for key, it in summed.items() if it != Balances()}
    return {**counted, **mirrored(connection, purged)}


def _hashes(keys: Iterable[BalanceKey]) -> list[Hash]:
    """Return the days and months that balances are in."""
    return sorted({Hash(key.period, key.first_day) for key in keys})


def _has_come_to(held: Amounts, known: Amounts) -> bool:
    """Say whether what is held for a row is what was known of it, or has become less since."""
    return held.calls < known.calls or held == known


def _patience() -> float:
    """Return when to give up waiting that begins now, by the monotonic clock."""
    return periods.monotonic() + PATIENCE_SECONDS


def _decided(word: str, found: Iterable[Breach | None], at: datetime) -> str:
    """Raise what a script refused for; return what shadow mode would have refused."""
    shadowed = enforced([breach for breach in found if breach is not None], at)
    if word == "refused":
        raise LedgerUnavailable("Redis refuses, and nobody can tell why.") from None
    return shadowed


def _moment(seconds: Any, microseconds: Any) -> datetime:
    """Return the server's time."""
    return datetime.fromtimestamp(int(seconds), UTC) + timedelta(microseconds=int(microseconds))
