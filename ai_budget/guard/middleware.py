"""The guard inside the SDK: runs once for every HTTP attempt, sync and async alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import anthropic
import httpx2
from anthropic import AsyncCallNext, CallNext, Middleware
from asgiref.sync import sync_to_async

from ai_budget.exceptions import AIBudgetError, UnboundedCall, UnpricedEndpoint
from ai_budget.guard import endpoints
from ai_budget.guard.attempt import OpenAttempt, Outgoing, open_attempt
from ai_budget.guard.charge import Payer, current_payer
from ai_budget.guard.rules import read_rules
from ai_budget.guard.stream import (
    BodyReader,
    EventReader,
    FrameReader,
    Reader,
    StreamedAnswer,
    decoded,
    tap_classes,
)
from ai_budget.ledger import base as ledgers
from ai_budget.policy.limits import ensure_enabled

Result = TypeVar("Result")

_RAW_RESPONSE_HEADER = "X-Stainless-Raw-Response"
"""How ``with_streaming_response`` tells the SDK, with "stream", to leave a body unread."""

_NEVER_LEFT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
    httpx2.LocalProtocolError,
    httpx2.InvalidURL,
)
"""Failures of the HTTP library before anything of the request reached the server."""


class BudgetGuard(Middleware):
    """Bounds, reserves and settles every paid request of a client; refuses what has no price."""

    def __init__(self, payer: Payer, *, provider: str, region: str) -> None:
        self.payer = payer
        self.provider = provider
        self.region = region

    def __repr__(self) -> str:
        return f"<BudgetGuard provider={self.provider!r}>"

    def handle(self, request: anthropic.APIRequest, call_next: CallNext) -> Any:
        kind = endpoints.classify(request.method, request.url)
        if kind != endpoints.PRICED:
            if kind != endpoints.FREE:
                self._ensure_allowed(request)
            return call_next(request)
        attempt = open_attempt(self._outgoing(request), self.payer)
        try:
            response = call_next(_prepared(request, attempt))
        except BaseException as error:
            _book_failure(attempt, error)
            raise
        finish = _receive(attempt, response.http_response)
        if finish is not None:
            finish()
        else:
            _tap(attempt, response.http_response)
        return response

    async def handle_async(self, request: anthropic.APIRequest, call_next: AsyncCallNext) -> Any:
        kind = endpoints.classify(request.method, request.url)
        if kind != endpoints.PRICED:
            if kind != endpoints.FREE:
                await _in_thread(lambda: self._ensure_allowed(request))
            return await call_next(request)
        attempt = await _open_async(self._outgoing(request), self.payer)
        try:
            response = await call_next(_prepared(request, attempt))
        except BaseException as error:
            # The name ``error`` is gone before the thread may look.
            failure = error
            await _in_thread(lambda: _book_failure(attempt, failure))
            raise
        finish = _receive(attempt, response.http_response)
        if finish is not None:
            await _in_thread(finish)
        else:
            _tap_async(attempt, response.http_response)
        return response

    def _ensure_allowed(self, request: anthropic.APIRequest) -> None:
        """Raise ``UnpricedEndpoint`` unless the feature may make calls without a bound."""
        charge = self.payer.over(current_payer()).charge()
        rules = read_rules(charge, at=ledgers.current().now())
        ensure_enabled(rules)
        if rules.feature.allow_unbounded:
            return
        raise UnpricedEndpoint(
            f"A guarded client does not {request.method.upper()} to "
            f"{endpoints.normalize(request.url)}: what it costs cannot be told. Use an unguarded "
            "client for it, or allow unbounded calls for the feature."
        ) from None

    def _outgoing(self, request: anthropic.APIRequest) -> Outgoing:
        body = request.json
        if not isinstance(body, dict) or request.options.extra_json or request.options.content:
            raise UnboundedCall(
                "The request's body is not JSON that the guard can read: pass it as parameters."
            ) from None
        return Outgoing(
            body=body,
            stream=request.stream,
            retries=request.retries_taken,
            key=request.options.idempotency_key or "",
            timeout=_seconds(request.timeout),
            provider=self.provider,
            region=self.region,
        )


def _prepared(request: anthropic.APIRequest, attempt: OpenAttempt) -> anthropic.APIRequest:
    """Return the request with the decided body, and readable if it is not read at once."""
    options = request.options.model_copy()
    options.json_data = attempt.body
    headers = dict(request.headers)
    if request.stream or headers.get(_RAW_RESPONSE_HEADER) == "stream":
        # The tap sits below the SDK's decompression.
        headers["Accept-Encoding"] = "identity"
        options.headers = headers
    return anthropic.APIRequest(
        options=options,
        cast_to=request.cast_to,
        stream=request.stream,
        stream_cls=request.stream_cls,
        retries_taken=request.retries_taken,
    )


def _receive(attempt: OpenAttempt, response: httpx2.Response) -> Callable[[], None] | None:
    """Return the booking of an answer that is known already; None if it is yet to be read."""
    request_id = response.headers.get("request-id", "")
    if not response.is_success:
        return lambda: attempt.book_rejected(response.status_code, request_id)
    if response.is_closed:
        return lambda: attempt.book_message(_json(response), request_id)
    return None


def _json(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except (ValueError, httpx2.HTTPError, httpx2.StreamError):
        return None


def _book_failure(attempt: OpenAttempt, error: BaseException) -> None:
    """Book a request without an answer: nothing if it never left, else its bound."""
    if isinstance(error, anthropic.APIConnectionError):
        unsent = isinstance(error.__cause__, _NEVER_LEFT)
    else:
        # The SDK wraps whatever sending raises; what is not wrapped was raised before it, such
        # as a missing key. A cancellation is no Exception, and may come at any time.
        unsent = isinstance(error, Exception)
    if unsent:
        attempt.book_unsent(error)
    else:
        attempt.book_lost(error)


def _tap(attempt: OpenAttempt, response: httpx2.Response) -> None:
    reader, finish = _listen(attempt, response)
    tapped, _ = tap_classes()
    response.stream = tapped(response.stream, reader, finish)


def _tap_async(attempt: OpenAttempt, response: httpx2.Response) -> None:
    reader, finish = _listen(attempt, response)
    _, tapped = tap_classes()

    async def finish_async(ended: bool, failure: str) -> None:
        await _in_thread(lambda: finish(ended, failure))

    response.stream = tapped(response.stream, reader, finish_async)


def _listen(
    attempt: OpenAttempt, response: httpx2.Response
) -> tuple[Reader, Callable[[bool, str], None]]:
    """Return what reads a body as it passes, and what books it once it is closed.

    Neither may refer to the response: a cycle would keep a dropped stream open.
    """
    request_id = response.headers.get("request-id", "")
    encoding = response.headers.get("content-encoding", "")
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    if kind in ("text/event-stream", "application/vnd.amazon.eventstream"):
        answer = StreamedAnswer()
        events = EventReader(answer) if kind == "text/event-stream" else FrameReader(answer)

        def finish_stream(ended: bool, failure: str) -> None:
            attempt.book_stream(answer, ended=ended, failure=failure, request_id=request_id)

        return decoded(events, encoding), finish_stream
    body = BodyReader()

    def finish_body(ended: bool, failure: str) -> None:
        attempt.book_message(_parse(bytes(body.body)), request_id)

    return decoded(body, encoding), finish_body


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _seconds(timeout: Any) -> float | None:
    """Return the longest that a request may wait for its answer; None where nothing says."""
    if isinstance(timeout, (int, float)):
        return float(timeout)
    read = getattr(timeout, "read", None)
    return float(read) if isinstance(read, (int, float)) else None


async def _in_thread(step: Callable[[], Result]) -> Result:
    """Run a step on the database to its end, even if the task is cancelled meanwhile."""
    task: asyncio.Future[Result] = asyncio.ensure_future(sync_to_async(step)())
    return await asyncio.shield(task)


async def _open_async(outgoing: Outgoing, payer: Payer) -> OpenAttempt:
    """Reserve; if the caller is cancelled meanwhile, give back what was taken."""
    task: asyncio.Future[OpenAttempt] = asyncio.ensure_future(
        sync_to_async(open_attempt)(outgoing, payer)
    )
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError as error:
        cancelled = error

        async def give_back() -> None:
            try:
                attempt = await task
            except AIBudgetError:
                return
            await sync_to_async(attempt.book_unsent)(cancelled)

        _keep(asyncio.ensure_future(give_back()))
        raise


_running: set[asyncio.Future[Any]] = set()


def _keep(task: asyncio.Future[Any]) -> None:
    """Hold a reference until it is done: the loop itself keeps only a weak one."""
    _running.add(task)
    task.add_done_callback(_running.discard)
