"""How an attempt comes to be reserved: decided, bounded, taken from every limit at once.

Nothing here waits and nothing knows sync from async: ``Opening.reserve`` returns the attempt, or
what to do before it is asked again. It raises once nothing can help any more.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any

from django.db import connections

from ai_budget import periods, signals
from ai_budget.conf import conf
from ai_budget.exceptions import (
    AIBudgetError,
    FeatureDisabled,
    LedgerUnavailable,
    LimitReached,
    UnboundedCall,
    UnpricedModel,
)
from ai_budget.guard import turns
from ai_budget.guard.attempt import OpenAttempt
from ai_budget.guard.charge import OpenCall, Payer, current_call, current_payer
from ai_budget.guard.rules import read_rules
from ai_budget.guard.telling import tell
from ai_budget.ledger import base as ledgers
from ai_budget.ledger.base import Ledger
from ai_budget.ledger.connection import retry
from ai_budget.models import CallLog
from ai_budget.policy.ladder import Choice, choose_model, percent_used
from ai_budget.policy.limits import (
    Rules,
    ensure_enabled,
    ladder_limits,
    limits_in_force,
    refused_keys,
)
from ai_budget.pricing.bound import bound, count_request, is_expected_to_fit
from ai_budget.pricing.rates import ModelRates, is_before_4_6, resolve
from ai_budget.values import (
    Amounts,
    Attempt,
    Bound,
    Bucket,
    Charge,
    Kind,
    Limit,
    Measure,
    Status,
)

LONGEST_STREAM = timedelta(hours=1)
"""How long a stream may run before its reservation counts as abandoned."""

LONGEST_WAIT = 86_400.0
"""Seconds of a timeout that count; some set it to infinity."""

APART_SECONDS = 0.1
"""How much longer than it must a call may wait, so that those that wait do not meet."""

HOPEFUL_BYTES = 10
"""Bytes of text that a token may have at best. Prose has three to five; so a count that would
not even help at ten is hopeless, and asking for it is for nothing."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What the API counted for a prompt, in tokens, and what it was asked with."""

    request: Mapping[str, Any] = field(repr=False)
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What would be sent, by which limits, and the most it can cost: before anything is taken."""

    rules: Rules
    limits: list[Limit | Bucket]
    body: dict[str, Any] = field(repr=False)
    requested_model: str
    choice: Choice
    rates: ModelRates
    bound: Bound
    notes: tuple[str, ...]


def decide(
    outgoing: Outgoing,
    charge: Charge,
    rules: Rules,
    *,
    ledger: Ledger,
    at: datetime,
    counted: Counted | None = None,
) -> Decision:
    """Return the decision on a request, from the rules and the balances of the moment.

    Raises ``FeatureDisabled`` where a budget is paused.
    """
    ensure_enabled(rules)
    limits = limits_in_force(charge, rules, at=at, zone=conf.TIME_ZONE)
    body, notes = _completed(outgoing.body, rules)
    requested = str(body["model"])
    choice = _choose(body, rules, limits, ledger, outgoing, at)
    body["model"] = choice.model
    if choice.reason:
        notes.append(choice.reason)
    rates = resolve(choice.model, at=at, provider=outgoing.provider, region=outgoing.region)
    tokens = None
    # Another model would count another number.
    if counted is not None and counted.request == count_request(body):
        tokens = counted.tokens
        notes.append(f"counted {tokens} input tokens")
    most = _bound(body, rates, outgoing, rules, at=at, counted=tokens)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """Wait so many seconds, then try again."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Let the API count this prompt, tell the result to ``Opening.learn``, then try again."""

    request: dict[str, Any] = field(repr=False)


class Opening:
    """One attempt that is to be reserved, and what has been tried for it so far.

    ``fixed`` is what the guarded client itself says about who pays.
    """

    def __init__(self, outgoing: Outgoing, fixed: Payer) -> None:
        self._outgoing = outgoing
        self._fixed = fixed
        self._counting: Count | None = None
        self._counted: Counted | None = None

    def reserve(self) -> OpenAttempt | Pause | Count:
        """Decide anew and reserve; return the attempt with the body that is to be sent.

        Where a limit says no and something may help, return that. Raises the errors of
        ``ai_budget.exceptions`` otherwise, and then nothing is reserved, and a refusal by a
        limit or by a paused budget is counted.
        """
        charge = self._fixed.over(current_payer()).charge()
        try:
            return self._reserve(charge)
        except AIBudgetError as error:
            tell(signals.call_refused, sender=Opening, charge=charge, error=error)
            raise

    def learn(self, tokens: int | None) -> None:
        """Take what the API counted; None where it did not."""
        if self._counting is not None and tokens is not None:
            self._counted = Counted(request=self._counting.request, tokens=tokens)

    def _reserve(self, charge: Charge) -> OpenAttempt | Pause | Count:
        outgoing = self._outgoing
        _ensure_readable(outgoing)
        ledger = ledgers.current()
        ledger.ensure_durable()
        at = ledger.now()
        rules = read_rules(charge, at=at)
        try:
            decision = decide(outgoing, charge, rules, ledger=ledger, at=at, counted=self._counted)
        except FeatureDisabled:
            _count_refusal(ledger, charge, at)
            raise
        try:
            return _take(decision, outgoing, charge, ledger=ledger, at=at)
        except LimitReached as error:
            remedy = self._count(error, decision, at) or _pause(error)
            if remedy is not None:
                return remedy
            _count_refusal(ledger, charge, at, scope=error.scope)
            raise

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
        least = _bound(
            decision.body,
            decision.rates,
            self._outgoing,
            decision.rules,
            at=at,
            counted=_text_bytes(request) // HOPEFUL_BYTES,
        )
        needed = least.nanousd if error.measure == Measure.NANOUSD else _tokens(least)
        later = error.refusal.delay is None and _left_to_wait()
        if needed > (error.limit if later else error.limit - error.spent - error.held):
            return None
        self._counting = Count(request=request)
        return self._counting


def _take(
    decision: Decision, outgoing: Outgoing, charge: Charge, *, ledger: Ledger, at: datetime
) -> OpenAttempt:
    """Take what was decided from all limits at once."""
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
        day=_day(at),
        deadline=at + _patience(outgoing),
    )
    amounts = Amounts(
        nanousd=decision.bound.nanousd, calls=int(counts), tokens=_tokens(decision.bound)
    )
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
        tell(
            signals.call_downgraded,
            sender=Opening,
            charge=charge,
            requested_model=attempt.requested_model,
            model=attempt.model,
            percent=decision.choice.percent,
        )
    return opened


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


def _count_refusal(ledger: Ledger, charge: Charge, at: datetime, *, scope: str = "") -> None:
    # One that cannot be counted is a refusal all the same.
    with suppress(LedgerUnavailable):
        ledger.count_refusal(refused_keys(charge, _day(at), scope=scope))


def _bound(
    body: Mapping[str, Any],
    rates: ModelRates,
    outgoing: Outgoing,
    rules: Rules,
    *,
    at: datetime,
    counted: int | None,
) -> Bound:
    return bound(
        body,
        rates,
        # The declaration is about the key's own workspace.
        declared_geo=None if outgoing.workspace_named else conf.INFERENCE_GEO,
        region=outgoing.region,
        allow_unbounded=rules.feature.allow_unbounded,
        counted=counted,
        at=at,
    )


def _tokens(most: Bound) -> int:
    return most.input_tokens + most.output_tokens


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
    elif cap is not None and _is_over(asked, cap):
        completed["max_tokens"] = cap
        notes.append(f"max_tokens {asked} to {cap}")
    fallbacks = body.get("fallbacks")
    if cap is not None and isinstance(fallbacks, list):
        completed["fallbacks"] = [
            {**entry, "max_tokens": cap}
            if isinstance(entry, dict) and _is_over(entry.get("max_tokens"), cap)
            else entry
            for entry in fallbacks
        ]
    return completed, notes


def _is_over(asked: Any, cap: int) -> bool:
    # What is no number is refused with the bound, which says why.
    return isinstance(asked, int) and asked > cap


def _choose(
    body: Mapping[str, Any],
    rules: Rules,
    limits: list[Limit | Bucket],
    ledger: Ledger,
    outgoing: Outgoing,
    at: datetime,
) -> Choice:
    requested = str(body["model"])
    if rules.ladder is None:
        return Choice(model=requested)
    kept = turns.model_of(body)
    if kept is not None:
        # Between a tool's call and its result the model stays the one that made the call.
        return Choice(model=kept, reason="" if kept == requested else "same turn")
    followed = ladder_limits(rules, limits)
    try:
        balances = ledger.balances(limit.key for limit in followed)
    except LedgerUnavailable:
        if conf.ON_LEDGER_FAILURE != "allow":
            raise
        return Choice(model=requested, reason="ladder not read")
    choice = choose_model(
        requested,
        rules.rungs,
        percent_used(followed, balances),
        takes=lambda model: _takes(model, body, outgoing, at),
    )
    if rules.ladder.enforce or choice.model == requested:
        return choice
    reason = f"would downgrade to {choice.model} ({choice.reason})"
    return Choice(model=requested, percent=choice.percent, reason=reason)


def _takes(model: str, body: Mapping[str, Any], outgoing: Outgoing, at: datetime) -> bool:
    """Say whether a model has a price, is no dearer, and accepts the request's parameters."""
    where: dict[str, Any] = {"at": at, "provider": outgoing.provider, "region": outgoing.region}
    try:
        rates = resolve(model, **where)
        rates.bands(str(body.get("speed") or ""))
        asked = resolve(str(body["model"]), **where)
    except UnpricedModel:
        return False
    here, there = asked.at(0, ""), rates.at(0, "")
    if there.input > here.input or there.output > here.output:
        return False
    if rates.context_window < asked.context_window and not is_expected_to_fit(body, rates):
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


def _day(at: datetime) -> date:
    return periods.day(at, conf.TIME_ZONE).first_day
