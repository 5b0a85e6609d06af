"""One attempt's life: decided, bounded, reserved, then booked by whatever became of it.

Nothing here waits for the network and nothing knows sync from async: the middleware calls
``open_attempt`` before it sends and one of the ``book_...`` methods after.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.db import connections

from ai_budget import money, periods, signals
from ai_budget.conf import conf
from ai_budget.exceptions import (
    AIBudgetError,
    UnboundedCall,
    UnclassifiedUsage,
    UnpricedModel,
)
from ai_budget.guard import turns
from ai_budget.guard.charge import OpenCall, Payer, current_call, current_payer, outside_calls
from ai_budget.guard.rules import read_rules
from ai_budget.guard.stream import ALLOWANCE_TOKENS, StreamedAnswer
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.base import Ledger
from ai_budget.ledger.database import retry
from ai_budget.models import CallLog
from ai_budget.policy.ladder import Choice, choose_model, percent_used
from ai_budget.policy.limits import Rules, dollar_limits, ensure_enabled, limits_in_force
from ai_budget.pricing.bound import bound, json_bytes
from ai_budget.pricing.cost import cost
from ai_budget.pricing.rates import ModelRates, is_before_4_6, resolve
from ai_budget.pricing.usage import read_usage
from ai_budget.values import (
    Amounts,
    Attempt,
    Bound,
    Charge,
    Kind,
    Limit,
    Reservation,
    Settlement,
    Status,
    Usage,
)

log = logging.getLogger("ai_budget")

LONGEST_STREAM = timedelta(hours=1)
"""How long a stream may run before its reservation counts as abandoned."""

LONGEST_WAIT = 86_400.0
"""Seconds of a timeout that count; some set it to infinity."""

_WINDOW_BYTES = 3
"""Bytes a token from which on a prompt is not expected to fit into a window."""

_MODERN_THINKING = frozenset({"adaptive", "between_tools"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """A request that is about to be sent, as the guard sees it."""

    body: Mapping[str, Any] = field(repr=False)
    stream: bool
    retries: int
    key: str
    timeout: float | None
    provider: str
    region: str
    workspace_named: bool = False


@dataclass(slots=True, kw_only=True)
class OpenAttempt:
    """A reservation whose request is on its way, and all that booking it needs."""

    ledger: Ledger
    reservation: Reservation
    rates: ModelRates
    bound: Bound
    body: dict[str, Any] = field(repr=False)
    call: OpenCall | None
    region: str
    started: float = field(default_factory=periods.monotonic)
    booked: bool = False
    lock: Any = field(default_factory=threading.Lock)

    @property
    def attempt(self) -> Attempt:
        return self.reservation.attempt

    def book_unsent(self, reason: str) -> None:
        """Give everything back: the request never left."""
        self._book(
            Settlement(status=Status.RELEASED, cost_nanousd=0, error=reason, keep_call=False)
        )

    def book_lost(self, reason: str) -> None:
        """Book the bound: the request may have been answered, and nobody will know."""
        self._book(self._at_bound(reason))

    def book_rejected(self, status: int, request_id: str) -> None:
        """Book nothing: an answer that is no success costs nothing."""
        self._book(
            Settlement(
                status=Status.SETTLED,
                cost_nanousd=0,
                request_id=request_id,
                latency_ms=self._elapsed(),
                error=f"HTTP {status}",
            )
        )

    def book_message(self, message: Any, request_id: str) -> None:
        """Book an answer that was read whole."""
        usage = message.get("usage") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(usage, Mapping):
            self._book(self._at_bound("unreadable answer", request_id=request_id))
            return
        stop_reason = str(message.get("stop_reason") or "")
        content = message.get("content") or []
        turns.remember(self.attempt, _tool_use_ids(content))
        refused = stop_reason == "refusal" and not content
        self._book(
            self._of_usage(
                usage,
                answered=str(message.get("model") or ""),
                free=refused,
                stop_reason=stop_reason,
                request_id=request_id,
            )
        )

    def book_stream(
        self, answer: StreamedAnswer, *, ended: bool, failure: str, request_id: str
    ) -> None:
        """Book a stream, whole or not."""
        turns.remember(self.attempt, answer.tool_use_ids)
        seen: dict[str, Any] = {
            "stop_reason": answer.stop_reason,
            "request_id": request_id,
            "first_token_ms": None
            if answer.first_token_at is None
            else self._elapsed(answer.first_token_at),
        }
        if answer.complete:
            refused = answer.stop_reason == "refusal" and not answer.blocks
            self._book(self._of_usage(answer.usage, answered=answer.model, free=refused, **seen))
            return
        error = answer.error or failure or ("incomplete" if ended else "closed early")
        self._book(self._of_part(answer, error=error, seen=seen))

    def _of_part(self, answer: StreamedAnswer, *, error: str, seen: dict[str, Any]) -> Settlement:
        """Book a stream that nobody read to its end: what is known, and what may be on its way.

        Bytes are at least as many as tokens. Where tokens may be hidden the bound is booked.
        """
        if not answer.begun or self._may_hide(answer):
            return self._at_bound(error, **seen)
        usage = dict(answer.usage)
        if not answer.final_usage:
            most = answer.shown_tokens + ALLOWANCE_TOKENS
            usage["output_tokens"] = min(most, self.bound.output_tokens)
        settlement = self._of_usage(usage, answered=answer.model, **seen)
        return Settlement(
            status=Status.ESTIMATED,
            cost_nanousd=min(settlement.cost_nanousd, self.reservation.amounts.nanousd),
            usage=settlement.usage,
            stop_reason=settlement.stop_reason,
            request_id=settlement.request_id,
            latency_ms=settlement.latency_ms,
            first_token_ms=settlement.first_token_ms,
            error=error,
        )

    def _may_hide(self, answer: StreamedAnswer) -> bool:
        """Say whether tokens may have been made that the stream has not shown."""
        thinking = self.body.get("thinking")
        kind = thinking.get("type") if isinstance(thinking, Mapping) else None
        if kind == "disabled":
            thinks = False
        elif kind is None:
            # Some models think unasked; a first block that is not thinking says this did not.
            thinks = answer.thinking or not answer.blocks
        else:
            thinks = True
        hidden = thinks or self.bound.hidden or answer.unreadable or "iterations" in answer.usage
        return hidden and not answer.final_usage

    def _of_usage(
        self, raw: Mapping[str, Any], *, answered: str, free: bool = False, **seen: Any
    ) -> Settlement:
        usage = Usage()
        try:
            usage = read_usage(raw)
            spent = (
                0
                if free
                else cost(
                    self._rates_of(answered),
                    usage,
                    at=self.attempt.reserved_at,
                    region=self.region,
                )
            )
        except (UnclassifiedUsage, UnpricedModel) as error:
            log.warning("A call to %s is booked at its bound: %s", self.attempt.model, error)
            return self._at_bound(type(error).__name__, usage=usage, **seen)
        if usage.unclassified:
            log.warning("Usage has fields without a price rule: %s", ", ".join(usage.unclassified))
        return Settlement(
            status=Status.SETTLED,
            cost_nanousd=spent,
            usage=usage,
            latency_ms=self._elapsed(),
            **seen,
        )

    def _rates_of(self, answered: str) -> ModelRates:
        """Return the prices of the model that answered: a fallback, where there are any.

        Elsewhere an answer names the model by another of its names, and never by its region.
        """
        if not self.body.get("fallbacks") or answered in ("", self.attempt.model):
            return self.rates
        return resolve(
            answered,
            at=self.attempt.reserved_at,
            provider=self.attempt.provider,
            region=self.region,
        )

    def _at_bound(self, error: str, **seen: Any) -> Settlement:
        return Settlement(
            status=Status.ESTIMATED,
            cost_nanousd=self.reservation.amounts.nanousd,
            latency_ms=self._elapsed(),
            error=error,
            **seen,
        )

    @property
    def downgraded(self) -> bool:
        """Whether another model answers than the one asked for."""
        return self.attempt.model != self.attempt.requested_model

    def _elapsed(self, until: float | None = None) -> int:
        return max(0, round(((until or periods.monotonic()) - self.started) * 1000))

    def _book(self, settlement: Settlement) -> None:
        """Settle once. What fails here is settled by the tick: the answer is not lost for it."""
        with self.lock:
            if self.booked:
                return
            self.booked = True
        if self.call is not None:
            self.call.settled.append((self.reservation, settlement))
            if not settlement.keep_call and self.reservation.amounts.calls:
                self.call.counted = False
        held = self.reservation.amounts.nanousd
        if settlement.cost_nanousd > held:
            log.error(
                "The bound of call %s was too low: %s were reserved and %s were spent.",
                self.reservation.id,
                money.format_usd(held, decimals=6),
                money.format_usd(settlement.cost_nanousd, decimals=6),
            )
        try:
            self.ledger.settle(self.reservation, settlement)
        except Exception as error:
            log.error(
                "Call %s could not be settled (%s); ai_budget_tick will book it.",
                self.reservation.id,
                type(error).__name__,
            )
            return
        _send(signals.call_settled, reservation=self.reservation, settlement=settlement)


def open_attempt(outgoing: Outgoing, fixed: Payer) -> OpenAttempt:
    """Decide and reserve; return the attempt with the body that is to be sent.

    ``fixed`` is what the guarded client itself says about who pays. Raises the errors of
    ``ai_budget.exceptions``, and then nothing was reserved.
    """
    charge = fixed.over(current_payer()).charge()
    try:
        return _open(outgoing, charge)
    except AIBudgetError as error:
        _send(signals.call_refused, charge=charge, error=error)
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What would be sent, by which limits, and the most it can cost: before anything is taken."""

    rules: Rules
    limits: list[Limit]
    body: dict[str, Any] = field(repr=False)
    requested_model: str
    choice: Choice
    rates: ModelRates
    bound: Bound
    notes: tuple[str, ...]


def decide(outgoing: Outgoing, charge: Charge, *, ledger: Ledger, at: datetime) -> Decision:
    """Return the decision on a request, from the rules and balances of the moment."""
    rules = read_rules(charge, at=at)
    ensure_enabled(rules)
    limits = limits_in_force(charge, rules, at=at, zone=conf.TIME_ZONE)
    body, notes = _completed(outgoing.body, rules)
    requested = str(body["model"])
    choice = _choose(body, rules, limits, ledger, outgoing, at)
    body["model"] = choice.model
    if choice.reason:
        notes.append(choice.reason)
    rates = resolve(choice.model, at=at, provider=outgoing.provider, region=outgoing.region)
    most = bound(
        body,
        rates,
        # The declaration is about the key's own workspace.
        declared_geo=None if outgoing.workspace_named else conf.INFERENCE_GEO,
        region=outgoing.region,
        allow_unbounded=rules.feature.allow_unbounded,
        at=at,
    )
    notes += [f"bound: {reason}" for reason in most.reasons]
    return Decision(
        rules=rules,
        limits=limits,
        body=body,
        requested_model=requested,
        choice=choice,
        rates=rates,
        bound=most,
        notes=tuple(notes),
    )


def _open(outgoing: Outgoing, charge: Charge) -> OpenAttempt:
    _ensure_readable(outgoing)
    ledger = ledgers.current()
    ledger.ensure_durable()
    at = ledger.now()
    decision = decide(outgoing, charge, ledger=ledger, at=at)
    call = current_call()
    call_id, number, counts = _identity(outgoing, call)
    attempt = Attempt(
        call_id=call_id,
        number=number,
        charge=charge,
        category=decision.rules.category_name,
        kind=call.kind if call else (Kind.STREAM if outgoing.stream else Kind.ASK),
        requested_model=decision.requested_model,
        model=decision.choice.model,
        provider=outgoing.provider,
        max_tokens=decision.body["max_tokens"],
        speed=str(decision.body.get("speed") or ""),
        inference_geo=str(decision.body.get("inference_geo") or ""),
        decision="; ".join(decision.notes),
        rates=decision.rates.reference,
        reserved_at=at,
        day=decision.limits[0].window.first_day,
        deadline=at + _patience(outgoing),
    )
    amounts = Amounts(nanousd=decision.bound.nanousd, calls=int(counts))
    reservation = ledger.reserve(decision.limits, amounts, attempt)
    if call is not None:
        call.attempts += 1
        call.counted = call.counted or counts
        call.model, call.requested_model = attempt.model, attempt.requested_model
    opened = OpenAttempt(
        ledger=ledger,
        reservation=reservation,
        rates=decision.rates,
        bound=decision.bound,
        body=decision.body,
        call=call,
        region=outgoing.region,
    )
    if opened.downgraded:
        _send(
            signals.call_downgraded,
            charge=charge,
            requested_model=attempt.requested_model,
            model=attempt.model,
            percent=decision.choice.percent,
        )
    return opened


def _ensure_readable(outgoing: Outgoing) -> None:
    if bool(outgoing.body.get("stream")) != outgoing.stream:
        raise UnboundedCall(
            "Ask for a stream with stream=True or messages.stream(): one that is asked for in "
            "extra_body cannot be followed."
        )


def _completed(body: Mapping[str, Any], rules: Rules) -> tuple[dict[str, Any], list[str]]:
    """Return the body with what the caller left to the feature, and within its cap.

    The notes say what was lowered.
    """
    call = current_call()
    left_open = call.left_open if call is not None else frozenset()
    feature = rules.feature
    completed, notes = dict(body), []
    if "model" in left_open or not body.get("model"):
        completed["model"] = feature.model or conf.DEFAULT_MODEL
    asked = None if "max_tokens" in left_open else body.get("max_tokens")
    cap = feature.max_tokens
    if asked is None:
        completed["max_tokens"] = cap or conf.DEFAULT_MAX_TOKENS
    elif cap is not None and isinstance(asked, int) and asked > cap:
        completed["max_tokens"] = cap
        notes.append(f"max_tokens {asked} to {cap}")
    fallbacks = body.get("fallbacks")
    if cap is not None and isinstance(fallbacks, list):
        completed["fallbacks"] = [
            {**entry, "max_tokens": cap}
            if isinstance(entry, dict) and (entry.get("max_tokens") or 0) > cap
            else entry
            for entry in fallbacks
        ]
    return completed, notes


def _choose(
    body: Mapping[str, Any],
    rules: Rules,
    limits: list[Limit],
    ledger: Ledger,
    outgoing: Outgoing,
    at: datetime,
) -> Choice:
    requested = str(body["model"])
    if not rules.rungs:
        return Choice(model=requested)
    kept = turns.model_of(body)
    if kept is not None:
        # Between a tool's call and its result the model stays the one that made the call.
        return Choice(model=kept, reason="" if kept == requested else "same turn")
    money_limits = dollar_limits(limits)
    balances = ledger.balances(limit.key for limit in money_limits)
    return choose_model(
        requested,
        rules.rungs,
        percent_used(money_limits, balances),
        takes=lambda model: _takes(model, body, outgoing, at),
    )


def _takes(model: str, body: Mapping[str, Any], outgoing: Outgoing, at: datetime) -> bool:
    """Say whether a model has a price, is no dearer, and accepts the request's parameters."""
    where: dict[str, Any] = {"at": at, "provider": outgoing.provider, "region": outgoing.region}
    try:
        rates = resolve(model, **where)
        rates.bands(str(body.get("speed") or ""))
        asked = resolve(str(body["model"]), **where).at(0, "")
    except UnpricedModel:
        return False
    offered = rates.at(0, "")
    if offered.input > asked.input or offered.output > asked.output:
        return False
    if json_bytes(body) > _WINDOW_BYTES * rates.context_window:
        return False
    thinking = body.get("thinking")
    output = body.get("output_config")
    modern = (isinstance(thinking, Mapping) and thinking.get("type") in _MODERN_THINKING) or (
        isinstance(output, Mapping) and output.get("effort")
    )
    return not (modern and is_before_4_6(model))


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


def _tool_use_ids(content: Any) -> list[str]:
    return [
        str(block["id"])
        for block in content
        if isinstance(block, Mapping) and block.get("type") == "tool_use" and block.get("id")
    ]


def _send(signal: Any, **values: Any) -> None:
    """Tell who listens; a listener's mistake is logged and changes nothing."""
    with outside_calls():
        results = signal.send_robust(sender=OpenAttempt, **values)
    for receiver, result in results:
        if isinstance(result, Exception):
            log.error("The receiver %r failed: %s", receiver, type(result).__name__)
