"""What would be sent for a request, by which limits, and the most it can cost.

A decision reads balances, takes nothing and sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from ai_budget.arguments import LONGEST_MODEL, checked_text
from ai_budget.conf import conf
from ai_budget.exceptions import LedgerUnavailable, UnboundedCall, UnpricedModel
from ai_budget.guard import turns
from ai_budget.guard.answers import Surroundings
from ai_budget.guard.body import ensure_text
from ai_budget.guard.charge import current_call
from ai_budget.ledger.connection import lets_pass
from ai_budget.policy.ladder import Choice, choose_model, percent_used
from ai_budget.policy.limits import Rules, ensure_enabled, ladder_limits, limits_in_force
from ai_budget.pricing.bound import bound, count_request, is_expected_to_fit
from ai_budget.pricing.rates import ModelRates, is_before_4_6, resolve
from ai_budget.savings.prompt_cache import Marking
from ai_budget.values import BalanceKey, Balances, Bound, Bucket, Charge, Limit

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
    batch: bool = False
    around: Callable[[], Surroundings] | None = field(default=None, repr=False)


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
    marking: Marking | None = None


class Books(Protocol):
    """Where balances are read: the ledger, or what was read of it before."""

    def balances(self, keys: Iterable[BalanceKey], /) -> Mapping[BalanceKey, Balances]: ...


Marker = Callable[[Mapping[str, Any], ModelRates], Marking | None]
"""Puts marks for the API's prompt cache on the body that a model of these rates will get."""


def decide(
    outgoing: Outgoing,
    charge: Charge,
    rules: Rules,
    *,
    ledger: Books,
    at: datetime,
    limits: list[Limit | Bucket] | None = None,
    counted: Counted | None = None,
    mark: Marker | None = None,
) -> Decision:
    """Return the decision on a request, from the rules and the balances of the moment.

    ``limits`` are those in force, where somebody has looked already. Raises ``FeatureDisabled``
    where a budget is paused.
    """
    ensure_enabled(rules)
    if limits is None:
        limits = limits_in_force(charge, rules, at=at, zone=conf.TIME_ZONE)
    body, notes = completed(outgoing.body, rules)
    requested = str(body["model"])
    choice = _choose(body, rules, limits, ledger, outgoing, at)
    body["model"] = choice.model
    if choice.reason:
        notes.append(choice.reason)
    rates = resolve(choice.model, at=at, provider=outgoing.provider, region=outgoing.region)
    marking = None if mark is None else mark(body, rates)
    if marking is not None:
        body = marking.body
        notes += [marking.note] if marking.note else []
    tokens = None
    # Another model would count another number.
    if counted is not None and counted.request == count_request(body):
        tokens = counted.tokens
        notes.append(f"counted {tokens} input tokens")
    most = bound_of(body, rates, outgoing, rules, at=at, counted=tokens)
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
        marking=marking,
    )


def bound_of(
    body: Mapping[str, Any],
    rates: ModelRates,
    outgoing: Outgoing,
    rules: Rules,
    *,
    at: datetime,
    counted: int | None,
) -> Bound:
    """Return the most that a body can cost, by what the settings declare of the workspace."""
    return bound(
        body,
        rates,
        # The declaration is about the key's own workspace.
        declared_geo=None if outgoing.workspace_named else conf.INFERENCE_GEO,
        batch=outgoing.batch,
        region=outgoing.region,
        allow_unbounded=rules.feature.allow_unbounded,
        counted=counted,
        at=at,
    )


def tokens_of(most: Bound) -> int:
    """Return the tokens that count against a rate per minute."""
    return most.input_tokens + most.output_tokens


def ensure_readable(outgoing: Outgoing) -> None:
    """Raise ``UnboundedCall`` for a stream that cannot be followed, and for what is no text
    ``InvalidArgument``."""
    ensure_text(outgoing.body)
    if bool(outgoing.body.get("stream")) != outgoing.stream:
        raise UnboundedCall(
            "Ask for a stream with stream=True or messages.stream(): one that is asked for in "
            "extra_body cannot be followed."
        )


def completed(body: Mapping[str, Any], rules: Rules) -> tuple[dict[str, Any], list[str]]:
    """Return the body with what the caller left to the feature, and within its cap.

    The notes say what was lowered. Raises ``InvalidArgument`` for a parameter that the journal
    keeps and could not.
    """
    call = current_call()
    left_open = call.left_open if call is not None else frozenset()
    feature = rules.feature
    completed, notes = dict(body), []
    if "model" in left_open or not body.get("model"):
        completed["model"] = feature.model or conf.DEFAULT_MODEL
    for name, most in _KEPT_PARAMETERS.items():
        if completed.get(name):
            checked_text(completed[name], name, most=most)
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


_KEPT_PARAMETERS = {"model": LONGEST_MODEL, "speed": 16, "inference_geo": 32}
"""Parameters that the journal keeps, and the characters that it has for each."""


def _is_over(asked: Any, cap: int) -> bool:
    # What is no number is refused with the bound, which says why.
    return isinstance(asked, int) and asked > cap


def _choose(
    body: Mapping[str, Any],
    rules: Rules,
    limits: list[Limit | Bucket],
    ledger: Books,
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
    except LedgerUnavailable as error:
        if not lets_pass(error):
            raise
        return Choice(model=requested, reason="ladder not read")
    choice = choose_model(
        requested,
        rules.rungs,
        percent_used(followed, balances),
        takes=lambda model: takes(model, body, outgoing, at),
    )
    if rules.ladder.enforce or choice.model == requested:
        return choice
    reason = f"would downgrade to {choice.model} ({choice.reason})"
    return Choice(model=requested, percent=choice.percent, reason=reason)


def takes(model: str, body: Mapping[str, Any], outgoing: Outgoing, at: datetime) -> bool:
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
