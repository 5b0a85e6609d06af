"""How an attempt comes to be reserved: decided, bounded, taken from every limit at once.

Nothing here waits and nothing knows sync from async: ``Opening.reserve`` returns the attempt, or
what to do before it is asked again. It raises once nothing can help any more.
"""

from __future__ import annotations

import json
import logging
import random
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial
from typing import Any

from django.db import connections
from django.views.decorators.debug import sensitive_variables

from ai_budget import periods, signals
from ai_budget.conf import conf
from ai_budget.exceptions import (
    AIBudgetError,
    FeatureDisabled,
    LedgerUnavailable,
    LimitReached,
    UnboundedCall,
)
from ai_budget.guard.answers import Asking, Setting, place_of, setting_of
from ai_budget.guard.attempt import OpenAttempt
from ai_budget.guard.body import LARGE_BODY, is_larger_than
from ai_budget.guard.charge import HELPERS, OpenCall, Payer, current_call, current_payer
from ai_budget.guard.deciding import (
    Counted,
    Decision,
    Marker,
    Outgoing,
    bound_of,
    completed,
    decide,
    ensure_readable,
    tokens_of,
)
from ai_budget.guard.marks import Marks
from ai_budget.guard.refusals import count_refusal
from ai_budget.guard.rules import create_if_new, read_rules
from ai_budget.guard.telling import tell, tell_recorded, tell_settled
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.base import Ledger, breaches, enforced
from ai_budget.ledger.connection import retry
from ai_budget.models import CallLog
from ai_budget.policy.limits import (
    Rules,
    ensure_enabled,
    ladder_limits,
    limits_in_force,
    only_counting,
)
from ai_budget.pricing.bound import NESTED_TOO_DEEPLY, count_request
from ai_budget.savings.response_cache import Kept
from ai_budget.values import (
    Amounts,
    Attempt,
    Balances,
    Bucket,
    Charge,
    Kind,
    Limit,
    Measure,
    Settlement,
    Status,
)

log = logging.getLogger("ai_budget")

LONGEST_STREAM = timedelta(hours=1)
"""How long a stream may run before its reservation counts as abandoned."""

LONGEST_WAIT = 86_400.0
"""Seconds of a timeout that count; some set it to infinity."""

APART_SECONDS = 0.1
"""How much longer than it must a call may wait, so that those that wait do not meet."""

HOPEFUL_BYTES = 10
"""Bytes of text that a token may have at best. Prose has three to five; so a count that would
not even help at ten is hopeless, and asking for it is for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """Wait so many seconds, then try again."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Let the API count this prompt, tell the result to ``Opening.learn``, then try again."""

    request: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The answer is there already, as the JSON of a message: send nothing."""

    message: str = field(repr=False)


Step = OpenAttempt | Found | Pause | Count
"""What comes of trying to reserve an attempt."""


class Opening:
    """One attempt that is to be reserved, and what has been tried for it so far.

    ``fixed`` is what the guarded client itself says about who pays, ``asker`` the thread or task
    that waits for the answer.
    """

    def __init__(self, outgoing: Outgoing, fixed: Payer, *, asker: int) -> None:
        self._asker = asker
        self._outgoing = outgoing
        self._fixed = fixed
        self._counting: Count | None = None
        self._counted: Counted | None = None
        self._asking: Asking | None = None
        self._marks: Marks | None = None
        self._started = periods.monotonic()

    @sensitive_variables()
    def reserve(self) -> Step:
        """Decide anew and reserve; return the attempt with the body that is to be sent.

        Where the answer is in the cache return that; where a limit says no and something may
        help, or somebody else asks the same just now, return what to do. Raises the errors of
        ``ai_budget.exceptions`` otherwise, and then nothing is reserved, and a refusal by a
        limit or by a paused budget is counted.
        """
        if self._asking is not None and isinstance(waiting := self._asking.answer(), float):
            return Pause(seconds=waiting)
        charge = self._fixed.over(current_payer()).charge()
        try:
            return self._reserve_readable(charge)
        except BaseException as error:
            self.give_up()
            if isinstance(error, AIBudgetError):
                tell(signals.call_refused, sender=Opening, charge=charge, error=error)
            raise

    def give_up(self) -> None:
        """Leave the question to others, and take the marks off: nothing will be sent."""
        if self._asking is not None:
            self._asking.give_up()
        if self._marks is not None:
            self._marks.cancel()

    def learn(self, tokens: int | None) -> None:
        """Take what the API counted; None where it did not."""
        if self._counting is not None and tokens is not None:
            self._counted = Counted(request=self._counting.request, tokens=tokens)

    def _reserve_readable(self, charge: Charge) -> Step:
        try:
            return self._reserve(charge)
        except RecursionError:
            # Nothing was reserved: all that walks a body comes before.
            raise UnboundedCall(NESTED_TOO_DEEPLY) from None

    def _reserve(self, charge: Charge) -> Step:
        outgoing = self._outgoing
        ensure_readable(outgoing)
        ledger = ledgers.current()
        ledger.ensure_durable()
        at = ledger.now()
        rules = read_rules(charge, at=at)
        try:
            ensure_enabled(rules)
            found = self._find(charge, rules, ledger=ledger, at=at)
            if found is not None:
                return found
        except FeatureDisabled:
            count_refusal(ledger, charge, at)
            raise
        limits = limits_in_force(charge, rules, at=at, zone=conf.TIME_ZONE)
        try:
            self._ensure_room(limits, ledger=ledger, at=at)
        except LimitReached as error:
            return self._wait_or_refuse(error, charge, ledger=ledger, at=at)
        decision = decide(
            outgoing,
            charge,
            rules,
            ledger=ledger,
            at=at,
            limits=limits,
            counted=self._counted,
            mark=self._marker(rules, at),
        )
        try:
            attempt = _take(
                decision,
                outgoing,
                charge,
                cache_checked=self._asking is not None,
                ledger=ledger,
                at=at,
            )
        except LimitReached as error:
            remedy = self._unmark(error) or self._count(error, decision, at)
            return remedy or self._wait_or_refuse(error, charge, ledger=ledger, at=at)
        attempt.asking = self._asking
        return attempt

    def _ensure_room(
        self, limits: Sequence[Limit | Bucket], *, ledger: Ledger, at: datetime
    ) -> None:
        """Refuse a large request that is sure to be refused, before its bound is worked out.

        To look at the balances costs a round trip, to work out a bound takes as long as the body
        is large: so a small one is not looked at twice.
        """
        if not is_larger_than(LARGE_BODY, self._outgoing.body):
            return
        keys = {limit.key for limit in limits if isinstance(limit, Limit)}
        with suppress(LedgerUnavailable):  # the reservation says what that means
            balances = defaultdict(Balances, ledger.balances(keys))
            enforced(breaches(limits, Amounts(nanousd=1, calls=0), balances), at)

    def _wait_or_refuse(
        self, error: LimitReached, charge: Charge, *, ledger: Ledger, at: datetime
    ) -> Pause:
        """Return how long to wait for a limit; where that does not help count and raise it."""
        pause = self._wait(error)
        if pause is None:
            count_refusal(ledger, charge, at, scope=error.scope)
            raise error from None
        return pause

    def _find(
        self, charge: Charge, rules: Rules, *, ledger: Ledger, at: datetime
    ) -> Found | Pause | None:
        """Return the answer from the cache, or how long to wait for it; None says to ask."""
        setting = setting_of(current_call(), rules.feature)
        if setting is None and self._asking is None:
            return None
        body, notes = completed(self._outgoing.body, rules)
        self._ask_for(body, setting, charge, rules, at)
        if self._asking is None or setting is None:
            return None
        answer = self._asking.answer()
        if answer is None or isinstance(answer, float):
            return None if answer is None else Pause(seconds=answer)
        notes.append(f"response cache, {setting.scope}")
        self._book_found(answer, body, notes, charge, rules, ledger=ledger, at=at)
        return Found(message=answer.message)

    def _ask_for(
        self,
        body: Mapping[str, Any],
        setting: Setting | None,
        charge: Charge,
        rules: Rules,
        at: datetime,
    ) -> None:
        """Have the question that is asked now; while a call waits its feature may be changed."""
        around, place = self._outgoing.around, None
        # What is no number is refused with the bound, which says why.
        if setting is not None and around is not None and isinstance(body["max_tokens"], int):
            place = place_of(
                body,
                around(),
                charge,
                rules,
                scope=setting.scope,
                stream=self._outgoing.stream,
            )
        if self._asking is not None and self._asking.place == place:
            return
        if self._asking is not None:
            self._asking.give_up()
        self._asking = None
        if place is not None and setting is not None:
            self._asking = Asking(
                place, setting, max_tokens=body["max_tokens"], at=at, asker=self._asker
            )

    def _book_found(
        self,
        kept: Kept,
        body: Mapping[str, Any],
        notes: list[str],
        charge: Charge,
        rules: Rules,
        *,
        ledger: Ledger,
        at: datetime,
    ) -> None:
        """Journal an answer from the cache; it costs a call where the feature says so."""
        outgoing, call = self._outgoing, current_call()
        attempt, counts = _attempt_of(
            outgoing,
            charge,
            rules,
            body,
            model=kept.model,
            notes=notes,
            cache_checked=True,
            at=at,
        )
        helps = attempt.kind in HELPERS
        settlement = Settlement(
            status=Status.CACHED,
            cost_nanousd=0,
            # What a router did not cost again was never saved on the call itself.
            saved_nanousd=0 if helps else kept.cost_nanousd,
            saved_reason="" if helps else "response cache",
            stop_reason=str(json.loads(kept.message).get("stop_reason") or ""),
            latency_ms=max(0, round((periods.monotonic() - self._started) * 1000)),
        )
        counts = counts and not helps
        if counts and rules.feature.cache_counts:
            limits = limits_in_force(charge, rules, at=at, zone=conf.TIME_ZONE)
            try:
                reservation = ledger.reserve(
                    [only_counting(it) for it in limits if isinstance(it, Limit)],
                    Amounts(nanousd=0),
                    attempt,
                )
            except LimitReached as error:
                count_refusal(ledger, charge, at, scope=error.scope)
                raise
            record = partial(ledger.settle, reservation, settlement)
            told = partial(tell_settled, reservation, settlement)
        else:
            record = partial(ledger.record, attempt, settlement)
            told = partial(tell_recorded, attempt, settlement)
        try:
            record()
        except LedgerUnavailable as error:
            # It costs nothing, and the tick closes what is open.
            log.error("An answer from the cache could not be booked: %s", error)
        else:
            create_if_new(rules.feature)
            told(sender=Opening, context=copy_context())
        if call is not None:
            call.cached = True
            _note_attempt(call, attempt, counts=counts)

    def _marker(self, rules: Rules, at: datetime) -> Marker | None:
        """Return what marks the body for the API's prompt cache, in the feature's way."""
        mode, call = rules.feature.prompt_cache, current_call()
        helps = call is not None and call.kind in HELPERS
        if mode == "off" or helps:
            return None
        if self._marks is None:
            around = self._outgoing.around
            where = "" if around is None else around().account
            self._marks = Marks(mode, rules.feature.name, at, where=where)
        return self._marks.mark

    def _unmark(self, error: LimitReached) -> Pause | None:
        """Take the marks off, if without them the request may fit: writing costs more."""
        if error.measure != Measure.NANOUSD or self._marks is None:
            return None
        return Pause(seconds=0) if self._marks.take_off() else None

    def _wait(self, error: LimitReached) -> Pause | None:
        """Return how long to wait for a limit, if that may help. Others need not wait along."""
        pause = _pause(error)
        if pause is not None and self._asking is not None:
            self._asking.give_up()
        return pause

    def _count(self, error: LimitReached, decision: Decision, at: datetime) -> Count | None:
        """Return the count to ask for, if what it would say may well let the prompt pass now.

        Who waits and whose bound no waiting would let pass is helped by one that passes later.
        Where even a hopeful count would not help none is asked for: a flood of refusals must
        not become a flood of requests.
        """
        if self._counting is not None or error.measure not in (Measure.NANOUSD, Measure.TOKENS):
            return None
        request = count_request(decision.body)
        if request is None:
            return None
        least = bound_of(
            decision.body,
            decision.rates,
            self._outgoing,
            decision.rules,
            at=at,
            counted=_text_bytes(request) // HOPEFUL_BYTES,
        )
        needed = least.nanousd if error.measure == Measure.NANOUSD else tokens_of(least)
        later = error.refusal.delay is None and _left_to_wait()
        if needed > (error.limit if later else error.limit - error.spent - error.held):
            return None
        self._counting = Count(request=request)
        return self._counting


def _take(
    decision: Decision,
    outgoing: Outgoing,
    charge: Charge,
    *,
    cache_checked: bool,
    ledger: Ledger,
    at: datetime,
) -> OpenAttempt:
    """Take what was decided from all limits at once."""
    call = current_call()
    attempt, counts = _attempt_of(
        outgoing,
        charge,
        decision.rules,
        {**decision.body, "model": decision.requested_model},
        model=decision.choice.model,
        notes=decision.notes,
        rates=decision.rates.reference,
        cache_checked=cache_checked,
        at=at,
    )
    helps = attempt.kind in HELPERS
    amounts = Amounts(
        nanousd=decision.bound.nanousd,
        calls=0 if helps else int(counts),
        tokens=tokens_of(decision.bound),
        calls_to_come=int(counts) if helps else 0,
    )
    reservation = ledger.reserve(decision.limits, amounts, attempt)
    create_if_new(decision.rules.feature)
    if call is not None:
        _note_attempt(call, attempt, counts=counts and not helps)
    downgraded = attempt.model != attempt.requested_model
    followed = ladder_limits(decision.rules, decision.limits) if downgraded else ()
    return OpenAttempt(
        ledger=ledger,
        reservation=reservation,
        rates=decision.rates,
        bound=decision.bound,
        body=decision.body,
        call=call,
        region=outgoing.region,
        marking=decision.marking,
        percent=decision.choice.percent,
        window_end=min((limit.window.end for limit in followed), default=None),
    )


def _attempt_of(
    outgoing: Outgoing,
    charge: Charge,
    rules: Rules,
    body: Mapping[str, Any],
    *,
    model: str,
    notes: Iterable[str],
    cache_checked: bool,
    at: datetime,
    rates: str = "",
) -> tuple[Attempt, bool]:
    """Return what the journal records of an attempt, and whether it is the first of its call."""
    call = current_call()
    call_id, number, counts = _identity(outgoing, call)
    attempt = Attempt(
        call_id=call_id,
        number=number,
        charge=charge,
        category=rules.category_name,
        kind=call.kind if call else (Kind.STREAM if outgoing.stream else Kind.ASK),
        requested_model=str(body["model"]),
        model=model,
        provider=outgoing.provider,
        max_tokens=body["max_tokens"],
        speed=str(body.get("speed") or ""),
        inference_geo=str(body.get("inference_geo") or ""),
        decision="; ".join((*(call.notes if call else ()), *notes)),
        rates=rates,
        reserved_at=at,
        day=_day(at),
        deadline=at + _patience(outgoing),
        cache_checked=cache_checked,
    )
    return attempt, counts


def _note_attempt(call: OpenCall, attempt: Attempt, *, counts: bool) -> None:
    call.attempts += 1
    call.counted = call.counted or counts
    call.model, call.requested_model = attempt.model, attempt.requested_model


def _pause(error: LimitReached) -> Pause | None:
    """Return how long to wait, if the caller waits and it may help before the wait is over."""
    delay, left = error.refusal.delay, _left_to_wait()
    if delay is None or not left or delay > left:
        return None
    apart = random.uniform(0, APART_SECONDS)  # noqa: S311 - it protects nothing
    return Pause(seconds=min(left, delay + apart))


def _left_to_wait() -> float:
    """Return how many seconds the caller will still wait; 0 for one who does not."""
    call = current_call()
    return 0.0 if call is None else call.patience()


def _text_bytes(value: Any) -> int:
    """Return the bytes of all texts in a request; files say by their bytes nothing of tokens."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        file = value.get("type") == "base64"
        return sum(_text_bytes(part) for name, part in value.items() if name != "data" or not file)
    if isinstance(value, (list, tuple)):
        return sum(map(_text_bytes, value))
    return 0


def _identity(outgoing: Outgoing, call: OpenCall | None) -> tuple[uuid.UUID, int, bool]:
    """Return the call that an attempt belongs to, its number in it, and whether it counts.

    Repeats of the SDK carry the same idempotency key, so a call is counted once.
    """
    if call is not None:
        return call.call_id, call.attempts, not call.counted
    if not outgoing.key:
        return uuid.uuid4(), outgoing.retries, True
    call_id = uuid.uuid5(uuid.NAMESPACE_OID, outgoing.key)
    if not outgoing.retries:
        return call_id, 0, True
    alias = conf.LEDGER_DATABASE
    earlier = CallLog.objects.using(alias).filter(call_id=call_id, counted=1)
    counting = earlier.exclude(status=Status.RELEASED)
    return call_id, outgoing.retries, not retry(connections[alias], counting.exists)


def _patience(outgoing: Outgoing) -> timedelta:
    """Return how long the attempt can be on its way, with room for slow workers."""
    seconds = 600 if outgoing.timeout is None else min(outgoing.timeout, LONGEST_WAIT)
    return timedelta(seconds=seconds) * 2 + (
        timedelta(minutes=1) + (LONGEST_STREAM if outgoing.stream else timedelta())
    )


def _day(at: datetime) -> date:
    return periods.day(at, conf.TIME_ZONE).first_day
