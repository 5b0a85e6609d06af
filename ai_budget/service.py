"""The verbs: ask, stream, estimate, usage, forget_answers, and async twins of those that call.

Each twin shares every rule with the other; only the awaiting differs. All decisions are made
by the guard inside the client, which these verbs use as anybody would.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from decimal import Decimal
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.views.decorators.debug import sensitive_variables

from ai_budget import money
from ai_budget.arguments import checked_caller
from ai_budget.conf import conf
from ai_budget.exceptions import AIBudgetError
from ai_budget.guard.answers import owner_of
from ai_budget.guard.charge import OpenCall, Payer, charge, current_payer, user_id_of
from ai_budget.guard.clients import async_client, client
from ai_budget.guard.deciding import Outgoing, decide
from ai_budget.guard.history import usual_output
from ai_budget.guard.marks import dearest
from ai_budget.guard.routing import (
    Classification,
    Routed,
    Router,
    ensure_router,
    follow,
    may_be_routed,
    plan_route,
)
from ai_budget.guard.rules import forget_feature, read_rules
from ai_budget.guard.standing import (
    Standing,
    standing_of_caller,
    standing_of_feature,
    standing_of_site,
)
from ai_budget.ledger import base as ledgers
from ai_budget.pricing.cost import cost
from ai_budget.savings import response_cache
from ai_budget.values import BYTES_A_TOKEN, SITE, Answer, Estimate, Kind, Usage

if TYPE_CHECKING:
    from anthropic.types import Message

Prompt = str | Iterable[Mapping[str, Any]]
"""Text, or a list of messages."""


@sensitive_variables()
def ask(
    prompt: Prompt,
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Iterable[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    ttl: float | None = None,
    route: Router | None = None,
    wait: float | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,
    **params: Any,
) -> Answer:
    """Ask Claude inside the budget of ``feature`` and return the answer with its cost.

    ``model`` and ``max_tokens`` (in tokens) default to the feature's, then to the settings';
    the feature's ``max_tokens`` is also a cap. ``timeout`` is in seconds. ``wait`` is for how
    many seconds a limit that refuses may be waited for, where waiting can help before they are
    over: calls in flight that may give back, a rate per minute that refills. All other keywords
    pass to the SDK's ``messages.create``.

    ``cache`` is "private" (an answer is found again by the same user and subject), "shared" (by
    everybody) or "off", and ``ttl`` how many seconds old such an answer may be. They default to
    the feature's; what a feature keeps private no call shares. ``route`` is "length",
    "classifier", "off", or a callable that is handed a ``policy.routing.Question`` and returns
    one of its ``choices``. It defaults to the feature's, where no ``model`` is named.

    Raises ``BudgetExceeded`` and the other errors of ``ai_budget.exceptions`` before anything is
    sent, and the SDK's own errors after.
    """
    call = _call(Kind.ASK, model, max_tokens, wait, cache, ttl, route)
    request = _request(prompt, system, model, max_tokens, timeout, params)
    with charge(feature=feature, user=user, subject=subject, tags=tags), call:
        _take_route(call, request, route)
        message = client().messages.create(**request)
    return _answer(call, message)


@sensitive_variables()
async def aask(
    prompt: Prompt,
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Iterable[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    ttl: float | None = None,
    route: Router | None = None,
    wait: float | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - the SDK's own, for one attempt
    **params: Any,
) -> Answer:
    """Ask Claude without blocking the event loop, not even to wait. See ``ask``."""
    call = _call(Kind.ASK, model, max_tokens, wait, cache, ttl, route)
    request = _request(prompt, system, model, max_tokens, timeout, params)
    with charge(feature=feature, user=user, subject=subject, tags=tags), call:
        await _take_route_async(call, request, route)
        message = await async_client().messages.create(**request)
    return _answer(call, message)


@sensitive_variables()
def stream(
    prompt: Prompt,
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Iterable[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    ttl: float | None = None,
    route: Router | None = None,
    wait: float | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,
    **params: Any,
) -> StreamedText:
    """Stream an answer: ``with ai_budget.stream(...) as answer: for text in answer: ...``.

    Entering reserves and sends, and so raises what ``ask`` raises; leaving closes the stream
    wherever it is and books what was used.
    """
    call = _call(Kind.STREAM, model, max_tokens, wait, cache, ttl, route)
    paying = charge(feature=feature, user=user, subject=subject, tags=tags)
    request = _request(prompt, system, model, max_tokens, timeout, params)
    return StreamedText(call, paying, request, route)


@sensitive_variables()
def astream(
    prompt: Prompt,
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Iterable[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    ttl: float | None = None,
    route: Router | None = None,
    wait: float | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,
    **params: Any,
) -> AsyncStreamedText:
    """Stream an answer: ``async with ai_budget.astream(...) as answer: async for text in answer``.

    See ``stream``.
    """
    call = _call(Kind.STREAM, model, max_tokens, wait, cache, ttl, route)
    paying = charge(feature=feature, user=user, subject=subject, tags=tags)
    request = _request(prompt, system, model, max_tokens, timeout, params)
    return AsyncStreamedText(call, paying, request, route)


@sensitive_variables()
def estimate(
    prompt: Prompt,
    *,
    feature: str | None = None,
    user: Any = None,
    subject: str | None = None,
    system: str | Iterable[Mapping[str, Any]] | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    ttl: float | None = None,
    route: Router | None = None,
    wait: float | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float | None = None,
    **params: Any,
) -> Estimate:
    """Return what ``ask`` with the same arguments would cost now; spend and write nothing.

    ``most`` is the most that would be reserved. ``expected`` takes four bytes of text for a
    token and the feature's own recent answers for the length of this one. No cache is looked
    into, and no classifier asked: the model is the one that answers without it. Raises what
    ``ask`` raises for requests without a price or a bound.
    """
    call = _call(Kind.ASK, model, max_tokens, wait, cache, ttl, route)
    request = _request(prompt, system, model, max_tokens, None, params)
    ledger = ledgers.current()
    at = ledger.now()
    with charge(feature=feature, user=user, subject=subject, tags=tags), call:
        paying = current_payer().charge()
        routed = plan_route(call, request, route)
        if isinstance(routed, Routed):
            follow(call, request, routed)
        outgoing = Outgoing(
            body=_body(request),
            stream=False,
            retries=0,
            key="",
            timeout=timeout,
            provider="anthropic",
            region="",
        )
        rules = read_rules(paying, at=at)
        mark = partial(dearest, mode=rules.feature.prompt_cache, feature=paying.feature, at=at)
        decision = decide(outgoing, paying, rules, ledger=ledger, at=at, mark=mark)
    usual = Usage(
        input_tokens=max(1, decision.bound.input_tokens // BYTES_A_TOKEN),
        output_tokens=usual_output(paying.feature, decision.body["max_tokens"]),
        speed=str(decision.body.get("speed") or ""),
        inference_geo=str(decision.body.get("inference_geo") or conf.INFERENCE_GEO or ""),
    )
    most = decision.bound.nanousd
    return Estimate(
        expected_nanousd=min(cost(decision.rates, usual, at=at), most),
        most_nanousd=most,
        model=decision.choice.model,
    )


def usage(user: Any = None, *, feature: str | None = None, subject: str | None = None) -> Standing:
    """Return what a user, a subject or a feature has spent, and what is left: to show in a product.

    ``usage(user)`` is about all features together, ``usage(user, feature="chat")`` about what the
    user does in that one, ``usage(feature="chat")`` about what everybody does in it, and "*" is
    the whole site. Each has its own limits as they are in force now, overrides included; a wider
    one may be tighter still.
    Shadow mode shows the limits that it does not enforce. Spends nothing and writes nothing, so
    a feature that nobody has used yet is not created. Raises ``TypeError`` where nobody is named:
    a visitor without an account needs a ``subject``.
    """
    paying = Payer(user=user, feature=feature, subject=subject).charge()
    callers = [paying.user_id is not None, bool(paying.subject)]
    if all(callers):
        raise TypeError("usage() is about a user or a subject, not both.")
    if any(callers):
        return standing_of_caller(paying, in_feature=feature is not None)
    if feature is None or user is not None:
        raise TypeError("Say whose usage: a user with an account, a subject or a feature.")
    return standing_of_site() if feature == SITE else standing_of_feature(paying)


def forget_answers(
    feature: str | None = None, *, user: Any = None, subject: str | None = None
) -> None:
    """Forget answers in the response cache: of a feature, of a user or subject, or all of them.

    A category's are those of its features, and "*" names all. A user's or subject's are the
    private ones, in every feature; what is shared is nobody's. Answers that are on their way are
    forgotten, too. Raises ``LookupError`` for a feature that does not exist, and ``AIBudgetError``
    where the cache does not take it: try again.
    """
    owner = owner_of(user_id_of(user), checked_caller(subject or "", "subject"))
    if feature is not None and (owner or user is not None):
        raise TypeError("Forget the answers of a feature, or those of a user or subject.")
    if user is not None and not owner:
        raise TypeError("A visitor without an account has no answers of their own.")
    if not owner:
        forget_feature(feature or SITE)
    elif not response_cache.forget_owner(owner):
        raise AIBudgetError("The cache did not answer, and may still find what it keeps.")


class _Streaming:
    """What both kinds of streamed text know: the text so far, and at the end the cost."""

    _snapshot: Any = None

    def __init__(
        self, call: OpenCall, paying: charge, request: dict[str, Any], route: Router | None
    ) -> None:
        self._call = call
        self._paying = paying
        self._request = request
        self._route = route
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What has been read so far."""
        return "".join(self._pieces)

    @property
    def call_id(self) -> uuid.UUID:
        return self._call.call_id

    @property
    def cost(self) -> Decimal:
        """Exact dollars, known once the stream is closed; until then what is booked so far."""
        return money.to_usd(self._call.cost_nanousd)

    @property
    def model(self) -> str:
        """What answers."""
        return self._call.model

    @property
    def requested_model(self) -> str:
        return self._call.requested_model

    @property
    def downgraded(self) -> bool:
        """Whether a cheaper model answers because the budget ran low."""
        return self.model != self.requested_model

    @property
    def usage(self) -> Usage:
        """The tokens that were booked, known once the stream is closed."""
        return self._call.usage

    @property
    def cached(self) -> bool:
        """Whether it comes from the response cache, and costs nothing."""
        return self._call.cached

    @property
    def message(self) -> Message:
        """The SDK's message, as far as it has come."""
        message: Message = self._snapshot.current_message_snapshot
        return message


class StreamedText(_Streaming):
    """An answer that arrives piece by piece; iterating yields its text."""

    def __enter__(self) -> StreamedText:
        with self._paying, self._call, ExitStack() as stack:
            _take_route(self._call, self._request, self._route)
            self._snapshot = stack.enter_context(client().messages.stream(**self._request))
            self._stack = stack.pop_all()
        return self

    def __iter__(self) -> Iterator[str]:
        for piece in self._snapshot.text_stream:
            self._pieces.append(piece)
            yield piece

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


class AsyncStreamedText(_Streaming):
    """An answer that arrives piece by piece, for ``async with`` and ``async for``."""

    async def __aenter__(self) -> AsyncStreamedText:
        with self._paying, self._call:
            async with AsyncExitStack() as stack:
                await _take_route_async(self._call, self._request, self._route)
                self._snapshot = await stack.enter_async_context(
                    async_client().messages.stream(**self._request)
                )
                self._stack = stack.pop_all()
        return self

    async def __aiter__(self) -> AsyncIterator[str]:
        async for piece in self._snapshot.text_stream:
            self._pieces.append(piece)
            yield piece

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)


def _take_route(call: OpenCall, request: dict[str, Any], route: Router | None) -> None:
    """Ask the model that does the job, after asking a classifier which it is."""
    plan = plan_route(call, request, route)
    if isinstance(plan, Classification):
        try:
            with plan.call:
                once = client().with_options(max_retries=0)
                routed = plan.answered(once.messages.create(**plan.request))
        except Exception as error:
            routed = plan.failed(error)
        follow(call, request, routed)
    elif plan is not None:
        follow(call, request, plan)


async def _take_route_async(call: OpenCall, request: dict[str, Any], route: Router | None) -> None:
    """See ``_take_route``."""
    if not may_be_routed(call, route):
        return
    plan = await sync_to_async(plan_route)(call, request, route)
    if isinstance(plan, Classification):
        try:
            with plan.call:
                once = async_client().with_options(max_retries=0)
                routed = plan.answered(await once.messages.create(**plan.request))
        except Exception as error:
            routed = plan.failed(error)
        follow(call, request, routed)
    elif plan is not None:
        follow(call, request, plan)


def _call(
    kind: Kind,
    model: str | None,
    max_tokens: int | None,
    wait: float | None,
    cache: str | None,
    ttl: float | None,
    route: Router | None,
) -> OpenCall:
    if cache not in (None, "private", "shared", "off"):
        raise ValueError('cache is "private", "shared" or "off".')
    ensure_router(route)
    given = {"model": model, "max_tokens": max_tokens}
    return OpenCall(
        kind=kind,
        left_open=frozenset(name for name, value in given.items() if value is None),
        wait=0.0 if wait is None else _seconds(wait, "wait"),
        cache=cache,
        ttl=None if ttl is None else _seconds(ttl, "ttl"),
    )


def _seconds(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}.")
    if not value >= 0:  # not a number is no time either
        raise ValueError(f"{name} is a number of seconds from 0 on.")
    return float(value)


def _request(
    prompt: Prompt,
    system: str | Iterable[Mapping[str, Any]] | None,
    model: str | None,
    max_tokens: int | None,
    timeout: float | None,
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keywords for the SDK. What is left open is filled in by the guard."""
    if "stream" in params:
        raise TypeError("stream is no parameter of an answer: use stream() or astream().")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    request: dict[str, Any] = {
        **params,
        "messages": messages,
        "model": conf.DEFAULT_MODEL if model is None else model,
        "max_tokens": 1 if max_tokens is None else max_tokens,
    }
    if system is not None:
        request["system"] = system
    if timeout is not None:
        # Or an object of the HTTP library's.
        plain = isinstance(timeout, (int, float, str, bytes))
        request["timeout"] = _seconds(timeout, "timeout") if plain else timeout
    return request


def _body(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON that the SDK makes of its keywords."""
    body = {name: value for name, value in request.items() if not name.startswith("extra_")}
    return {**body, **(request.get("extra_body") or {})}


def _answer(call: OpenCall, message: Message) -> Answer:
    text = "".join(block.text for block in message.content if block.type == "text")
    return Answer(
        text=text,
        cost_nanousd=call.cost_nanousd,
        model=call.model,
        requested_model=call.requested_model,
        usage=call.usage,
        message=message,
        call_id=call.call_id,
        cached=call.cached,
    )
