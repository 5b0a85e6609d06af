"""Puts a call on the way to the model that does the job, before it is made.

``policy.routing`` decides; here is what it decides from, and what follows from it. The request
that a classifier needs is sent by the verb.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ai_budget import periods
from ai_budget.conf import conf
from ai_budget.guard import turns
from ai_budget.guard.charge import OpenCall, current_payer
from ai_budget.guard.deciding import Outgoing, takes
from ai_budget.guard.history import classified, usual_output
from ai_budget.guard.rules import Routing, read_routing
from ai_budget.policy import routing
from ai_budget.policy.routing import Question, Route
from ai_budget.pricing.bound import json_bytes
from ai_budget.pricing.cost import cost
from ai_budget.pricing.rates import resolve
from ai_budget.values import BYTES_A_TOKEN, Kind, Usage

log = logging.getLogger("ai_budget")

Router = str | Callable[[Question], str | int | None]
"""What ``route=`` takes: "off", "length", "classifier", or a callable that is asked."""

CLASSIFIER_SECONDS = 5.0
"""How long a classifier may take; then the feature's own model answers."""

KEPT_SECONDS = 86_400.0
"""How long a classifier's answer is good for the same question."""

_WAYS = ("off", "length", "classifier")
_NOT_OF_THE_BODY = frozenset({"extra_body", "extra_headers", "extra_query", "timeout"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """The route of a call, and the model that it would have asked without one."""

    asked: str
    route: Route


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """The request of a classifier, to be sent within ``call``, on the bill of the one it helps."""

    helped: OpenCall
    call: OpenCall
    request: dict[str, Any] = field(repr=False)
    choices: tuple[str, ...]

    def answered(self, message: Any) -> Routed:
        """Return what follows from its message."""
        self.helped.attempts = self.call.attempts
        level = routing.read_level(message.model_dump(mode="json"))
        return Routed(asked=self.choices[-1], route=routing.by_level(level, self.choices))

    def failed(self, error: Exception) -> Routed:
        """Return what follows where it gave none: the call is not lost for it."""
        self.helped.attempts = self.call.attempts
        return _failed(error, self.choices)


def ensure_router(route: Any) -> None:
    """Raise ``ValueError`` or ``TypeError`` for what is no way to route."""
    if inspect.iscoroutinefunction(route):
        raise TypeError("route is no coroutine function: it is called, and not awaited.")
    if route is not None and not callable(route) and route not in _WAYS:
        raise ValueError('route is "off", "length", "classifier" or a callable.')


def may_be_routed(call: OpenCall, route: Router | None) -> bool:
    """Say whether a route is to be planned: not where a model is named and nothing else said."""
    return route != "off" and (route is not None or "model" in call.left_open)


def plan_route(
    call: OpenCall, request: Mapping[str, Any], route: Router | None
) -> Routed | Classification | None:
    """Return the model for a call, or the request that tells it; None leaves it as it is.

    ``request`` is the keywords for the SDK. May query the database.
    """
    if not may_be_routed(call, route):
        return None
    named = "model" not in call.left_open
    feature = current_payer().feature_or_default()
    own = read_routing(feature)
    how = own.how if route is None else route
    if how == "off":
        return None
    asked = str(request["model"]) if named else own.model or conf.DEFAULT_MODEL
    body = {
        name: value
        for name, value in {**request, **(request.get("extra_body") or {})}.items()
        if name not in _NOT_OF_THE_BODY
    }
    body["model"] = asked
    # Between a tool's call and its result the model stays the one that made the call.
    kept = turns.model_of(body)
    if kept is not None:
        return Routed(asked=asked, route=Route(model=kept, reason="same turn"))
    question = _question(feature, body)
    if len(question.choices) < 2 or not routing.may_route(question.messages, question.params):
        return None
    if how == "length":
        by_length = routing.by_length(
            question.tokens, question.choices, tiers=conf.TIERS, lengths=conf.ROUTING_LENGTHS
        )
        return Routed(asked=asked, route=by_length)
    if how == "classifier":
        return _classify(call, question, body, own)
    try:
        chosen = routing.by_callable(how(question), question.choices)  # type: ignore[operator]
    except Exception as error:
        return _failed(error, question.choices)
    return Routed(asked=asked, route=chosen)


def follow(call: OpenCall, request: dict[str, Any], routed: Routed) -> None:
    """Ask the model of a route, and leave word why."""
    model, reason = routed.route.model, routed.route.reason
    request["model"] = model
    call.left_open -= {"model"}
    call.routed_from = routed.asked
    instead = "" if model == routed.asked else f", not {routed.asked}"
    call.notes = (*call.notes, f"{reason}{instead}")


def _question(feature: str, body: Mapping[str, Any]) -> Question:
    outgoing = Outgoing(
        body=body, stream=False, retries=0, key="", timeout=None, provider="anthropic", region=""
    )
    at = periods.now()
    asked = str(body["model"])
    return Question(
        feature=feature,
        choices=routing.candidates(
            asked, conf.TIERS, takes=lambda model: takes(model, body, outgoing, at)
        ),
        messages=body["messages"],
        system=body.get("system"),
        params={name: value for name, value in body.items() if name not in ("messages", "system")},
    )


def _classify(
    call: OpenCall, question: Question, body: Mapping[str, Any], own: Routing
) -> Routed | Classification:
    """Return the classifier's request, unless it costs what it could save."""
    choices = question.choices
    request = routing.classification(question, model=choices[0])
    left_open = "max_tokens" in call.left_open
    most = conf.DEFAULT_MAX_TOKENS if left_open else int(body["max_tokens"])
    prompt, output = json_bytes(body) // BYTES_A_TOKEN, usual_output(question.feature, most)
    cheaper, of = classified(question.feature)
    if not routing.is_worth_asking(
        _expected(choices[0], json_bytes(request) // BYTES_A_TOKEN, request["max_tokens"]),
        asked_nanousd=_expected(question.asked, prompt, output),
        cheapest_nanousd=_expected(choices[0], prompt, output),
        cheaper=cheaper,
        of=of,
    ):
        return Routed(asked=question.asked, route=routing.not_worth_asking(choices))
    helper = call.helper(Kind.ROUTER)
    helper.cache = "shared" if own.cache_scope == "shared" else "private"
    helper.ttl = KEPT_SECONDS
    request["timeout"] = CLASSIFIER_SECONDS
    return Classification(helped=call, call=helper, request=request, choices=choices)


def _expected(model: str, prompt: int, output: int) -> int:
    return cost(resolve(model), Usage(input_tokens=max(1, prompt), output_tokens=output))


def _failed(error: Exception, choices: tuple[str, ...]) -> Routed:
    log.warning("A router failed (%s); %s answers.", type(error).__name__, choices[-1])
    return Routed(asked=choices[-1], route=routing.failed(error, choices))
