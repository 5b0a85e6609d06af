"""The guard inside the SDK: runs once for every HTTP attempt, sync and async alike."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import anthropic
import httpx2
from anthropic import AsyncCallNext, CallNext, Middleware
from asgiref.sync import sync_to_async
from django.views.decorators.debug import sensitive_variables

from ai_budget.exceptions import UnboundedCall, UnpricedEndpoint
from ai_budget.guard import endpoints
from ai_budget.guard.answers import Surroundings
from ai_budget.guard.attempt import OpenAttempt
from ai_budget.guard.batch.through_client import ClientBatch, ResultsReader, results_of
from ai_budget.guard.charge import Payer, current_payer
from ai_budget.guard.deciding import Outgoing
from ai_budget.guard.events import Assembly
from ai_budget.guard.opening import Count, Found, Opening, Pause, Step
from ai_budget.guard.replay import replay, replay_async
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

log = logging.getLogger("ai_budget")

Result = TypeVar("Result")

_RAW_RESPONSE_HEADER = "X-Stainless-Raw-Response"
"""How ``with_streaming_response`` tells the SDK, with "stream", to leave a body unread."""

_WORKSPACE_HEADER = "anthropic-workspace-id"
"""Sends a request to another workspace than the key's own, with another default geography."""

COUNT_SECONDS = 5.0
"""How long the API may take to count a prompt, which it does in a fraction of one."""

NEVER_LEFT = (
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

    @sensitive_variables()
    def handle(self, request: anthropic.APIRequest, call_next: CallNext) -> Any:
        kind = self._classify(request)
        attempt: OpenAttempt | Found | ClientBatch
        if kind == endpoints.BATCH:
            attempt = self._open_batch(request)
        elif kind == endpoints.PRICED:
            sender = _sender(call_next)
            outgoing = self._outgoing(request, sender)
            opening = Opening(outgoing, self.payer, asker=threading.get_ident())
            attempt = _open(opening, request, call_next)
            if isinstance(attempt, Found):
                return replay(request, attempt.message, client=sender)
        else:
            if kind != endpoints.FREE:
                self._ensure_allowed(request)
            response = call_next(request)
            _follow_results(request, _http_response(response))
            return response
        try:
            response = call_next(_prepared(request, attempt))
        except BaseException as error:
            _book(_failure(attempt, error, alone=_is_last(call_next)))
            raise
        received = _http_response(response)
        finish = _receive(attempt, received)
        if finish is not None:
            _book(finish)
        else:
            _tap(attempt, received)
        return response

    @sensitive_variables()
    async def handle_async(self, request: anthropic.APIRequest, call_next: AsyncCallNext) -> Any:
        kind = self._classify(request)
        attempt: OpenAttempt | Found | ClientBatch
        if kind == endpoints.BATCH:
            attempt = await _taken(partial(self._open_batch, request))
        elif kind == endpoints.PRICED:
            sender = _sender(call_next)
            outgoing = self._outgoing(request, sender)
            opening = Opening(outgoing, self.payer, asker=id(asyncio.current_task()))
            attempt = await _open_async(opening, request, call_next)
            if isinstance(attempt, Found):
                return replay_async(request, attempt.message, client=sender)
        else:
            if kind != endpoints.FREE:
                await _in_thread(lambda: self._ensure_allowed(request))
            response = await call_next(request)
            await _follow_results_async(request, _http_response(response))
            return response
        try:
            response = await call_next(_prepared(request, attempt))
        except GeneratorExit as error:
            # A coroutine that is thrown away must not wait any more.
            _later(_book_async, _failure(attempt, error, alone=_is_last(call_next)))
            raise
        except BaseException as error:
            await _book_async(_failure(attempt, error, alone=_is_last(call_next)))
            raise
        received = _http_response(response)
        finish = _receive(attempt, received)
        if finish is not None:
            await _book_async(finish)
        else:
            _tap_async(attempt, received)
        return response

    def _classify(self, request: anthropic.APIRequest) -> str | None:
        kind = endpoints.classify(request.method, request.url)
        # Elsewhere than at Anthropic's own API batches are made in other ways.
        if kind == endpoints.BATCH and self.provider != "anthropic":
            return endpoints.UNPRICED
        return kind

    def _open_batch(self, request: anthropic.APIRequest) -> ClientBatch:
        charge = self.payer.over(current_payer()).charge()
        named = _names_workspace(request)
        return ClientBatch.open(_body_of(request), charge, workspace_named=named)

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

    def _outgoing(self, request: anthropic.APIRequest, sender: Any) -> Outgoing:
        return Outgoing(
            body=_body_of(request),
            stream=request.stream,
            retries=request.retries_taken,
            key=request.options.idempotency_key or "",
            timeout=_seconds(request.timeout),
            provider=self.provider,
            region=self.region,
            workspace_named=_names_workspace(request),
            around=None if sender is None else lambda: self._around(request, sender),
        )

    def _around(self, request: anthropic.APIRequest, sender: Any) -> Surroundings:
        return Surroundings(
            url=request.url,
            base_url=str(sender.base_url),
            provider=self.provider,
            region=self.region,
            headers=request.headers,
            client_headers=sender.default_headers,
            query={**sender.default_query, **request.query_params},
        )


def _body_of(request: anthropic.APIRequest) -> dict[str, Any]:
    """Return the JSON that is sent. Raises ``UnboundedCall`` for what is none."""
    body = request.json
    if not isinstance(body, dict) or request.options.extra_json or request.options.content:
        raise UnboundedCall(
            "The request's body is not JSON that the guard can read: pass it as parameters."
        ) from None
    return body


def _names_workspace(request: anthropic.APIRequest) -> bool:
    return any(name.lower() == _WORKSPACE_HEADER for name in request.headers)


def _prepared(
    request: anthropic.APIRequest, attempt: OpenAttempt | ClientBatch
) -> anthropic.APIRequest:
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


def _http_response(response: Any) -> Any:
    """Return the HTTP response: the SDK wraps it, unless the caller asked for it bare."""
    return getattr(response, "http_response", response)


def _receive(attempt: OpenAttempt | ClientBatch, response: Any) -> Callable[[], None] | None:
    """Return the booking of an answer that is known already; None if it is yet to be read."""
    if not isinstance(response, httpx2.Response):
        # Middleware inside the guard gave an answer of its own, whatever it asked for.
        return lambda: attempt.book_lost("replaced")
    request_id = response.headers.get("request-id", "")
    attempt.hear(response.headers)
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


def _is_last(call_next: Any) -> bool:
    """Say whether the SDK sends next, and no other middleware comes between.

    Known by the SDK's own name for it: under another one more would be booked at the bound.
    """
    return getattr(call_next, "__name__", "") == "base_handler"


def _sender(call_next: Any) -> Any:
    """Return the client that sends next, whose headers and address are not in the request.

    None where another middleware comes between, which may change what is asked; a copy of a
    guarded client sends by its own. It is what the SDK's handler closes over.
    """
    if not _is_last(call_next):
        return None
    held = (cell.cell_contents for cell in getattr(call_next, "__closure__", None) or ())
    return next((it for it in held if hasattr(it, "default_headers")), None)


def _failure(
    attempt: OpenAttempt | ClientBatch, error: BaseException, *, alone: bool
) -> Callable[[], None]:
    """Return the booking of a request without an answer: nothing if it never left, else its bound.

    ``alone`` says that no middleware inside the guard can have raised the error.
    """
    reason = type(error).__name__
    if not alone:
        unsent = False
    elif isinstance(error, anthropic.APIConnectionError):
        unsent = isinstance(error.__cause__, NEVER_LEFT)
    else:
        # The SDK wraps whatever sending raises; what is not wrapped was raised before it, such
        # as a missing key. A cancellation is no Exception, and may come at any time.
        unsent = isinstance(error, Exception)
    book = attempt.book_unsent if unsent else attempt.book_lost
    return lambda: book(reason)


def _tap(attempt: OpenAttempt | ClientBatch, response: httpx2.Response) -> None:
    reader, finish = _listen(attempt, response)
    tapped, _ = tap_classes()

    def finish_sync(ended: bool, failure: str) -> None:
        _book(lambda: finish(ended, failure))

    response.stream = tapped(response.stream, reader, finish_sync)


def _tap_async(attempt: OpenAttempt | ClientBatch, response: httpx2.Response) -> None:
    reader, finish = _listen(attempt, response)
    _, tapped = tap_classes()

    async def finish_async(ended: bool, failure: str) -> None:
        await _book_async(lambda: finish(ended, failure))

    response.stream = tapped(response.stream, reader, finish_async)


def _listen(
    attempt: OpenAttempt | ClientBatch, response: httpx2.Response
) -> tuple[Reader, Callable[[bool, str], None]]:
    """Return what reads a body as it passes, and what books it once it is closed.

    Neither may refer to the response: a cycle would keep a dropped stream open.
    """
    request_id = response.headers.get("request-id", "")
    encoding = response.headers.get("content-encoding", "")
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    streams = kind in ("text/event-stream", "application/vnd.amazon.eventstream")
    if streams and isinstance(attempt, OpenAttempt):
        waited_for = attempt.asking is not None and attempt.asking.claimed
        answer = StreamedAnswer(assembly=Assembly() if waited_for else None)
        events = EventReader(answer) if kind == "text/event-stream" else FrameReader(answer)

        def finish_stream(ended: bool, failure: str) -> None:
            attempt.book_stream(answer, ended=ended, failure=failure, request_id=request_id)

        return decoded(events, encoding), finish_stream
    body = BodyReader()

    def finish_body(ended: bool, failure: str) -> None:
        attempt.book_message(_parse(bytes(body.body)), request_id)

    return decoded(body, encoding), finish_body


def _follow_results(request: anthropic.APIRequest, response: Any) -> None:
    """Book the results of a batch as somebody reads them."""
    results = _results_of(request, response)
    if results is None:
        return
    if response.is_closed:
        _book(lambda: _settle_whole(results, response))
        return
    reader = decoded(results, response.headers.get("content-encoding", ""))
    tapped, _ = tap_classes()
    response.stream = tapped(response.stream, reader, lambda *_: _book(results.settle))


async def _follow_results_async(request: anthropic.APIRequest, response: Any) -> None:
    """See ``_follow_results``."""
    results = _results_of(request, response)
    if results is None:
        return
    if response.is_closed:
        await _book_async(lambda: _settle_whole(results, response))
        return
    reader = decoded(results, response.headers.get("content-encoding", ""))
    _, tapped = tap_classes()
    response.stream = tapped(response.stream, reader, lambda *_: _book_async(results.settle))


def _results_of(request: anthropic.APIRequest, response: Any) -> ResultsReader | None:
    """Return what reads the results of a batch as they pass; None for any other answer."""
    api_id = results_of(request.method, endpoints.normalize(request.url))
    if api_id is None or not isinstance(response, httpx2.Response) or not response.is_success:
        return None
    return ResultsReader(api_id)


def _settle_whole(results: ResultsReader, response: httpx2.Response) -> None:
    """Book results that were read before anyone could follow."""
    results.feed(response.content)
    results.settle()


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


class _Collector(threading.local):
    """Whether this thread is collecting garbage, and may be in the middle of anything."""

    runs = False


_collector = _Collector()


def _watch(phase: str, info: Any) -> None:
    _collector.runs = phase == "start"


getattr(gc, "callbacks", []).append(_watch)

_put_off: deque[Callable[[], None]] = deque()
"""Bookings of streams that were closed by the collector of garbage.

It may have interrupted a statement of this thread's own, whose connection takes no other one
until it is done. The next call books them, or the tick.
"""


def _open(
    opening: Opening, request: anthropic.APIRequest, call_next: CallNext
) -> OpenAttempt | Found:
    """Reserve; wait or let the prompt be counted where that may help."""
    try:
        while True:
            step = _reserve(opening)
            if isinstance(step, (OpenAttempt, Found)):
                return step
            if isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                opening.learn(_ask_count(request, step, call_next))
    except BaseException:
        opening.give_up()
        raise


def _reserve(opening: Opening) -> Step:
    """Reserve, after the bookings that were put off."""
    while _put_off:
        with suppress(IndexError):  # another thread was faster
            _book(_put_off.popleft())
    return opening.reserve()


def _ask_count(request: anthropic.APIRequest, count: Count, call_next: CallNext) -> int | None:
    """Return the API's count of a prompt; None where it gives none, for whatever reason."""
    try:
        return _counted(call_next(_count_request(request, count)))
    except Exception as error:
        _uncounted(error)
        return None


async def _ask_count_async(
    request: anthropic.APIRequest, count: Count, call_next: AsyncCallNext
) -> int | None:
    """See ``_ask_count``."""
    try:
        return _counted(await call_next(_count_request(request, count)))
    except Exception as error:
        _uncounted(error)
        return None


def _count_request(request: anthropic.APIRequest, count: Count) -> anthropic.APIRequest:
    """Return a request for a count that goes where the message would, with the same headers."""
    address = urlsplit(request.url)
    options = request.options.model_copy()
    options.url = urlunsplit(address._replace(path=f"{address.path.rstrip('/')}/count_tokens"))
    options.json_data = count.request
    options.idempotency_key = None
    options.timeout = min(COUNT_SECONDS, _seconds(request.timeout) or COUNT_SECONDS)
    options.headers = {
        name: value for name, value in request.headers.items() if name != _RAW_RESPONSE_HEADER
    }
    return anthropic.APIRequest(
        options=options, cast_to=anthropic.types.MessageTokensCount, retries_taken=0
    )


def _counted(response: Any) -> int | None:
    received = _http_response(response)
    if not isinstance(received, httpx2.Response) or not received.is_success:
        return None
    answer = _json(received)
    tokens = answer.get("input_tokens") if isinstance(answer, dict) else None
    return tokens if isinstance(tokens, int) and tokens >= 0 else None


def _uncounted(error: Exception) -> None:
    log.info("A prompt was not counted (%s); its first bound stands.", type(error).__name__)


def _book(step: Callable[[], None]) -> None:
    """Run a booking. What goes wrong in it does not take from the caller what was paid for."""
    if _collector.runs:
        _put_off.append(step)
        return
    try:
        step()
    except Exception as error:
        _left_to_the_tick(error)


async def _book_async(step: Callable[[], None]) -> None:
    """Run a booking in the thread of the database. See ``_book``."""
    try:
        await _in_thread(step)
    except Exception as error:
        _left_to_the_tick(error)


def _left_to_the_tick(error: Exception) -> None:
    log.error("A call could not be booked (%s); ai_budget_tick will book it.", type(error).__name__)


async def _in_thread(step: Callable[[], Result]) -> Result:
    """Run a step on the database to its end, even if the task is cancelled meanwhile."""
    task = asyncio.get_running_loop().create_task(sync_to_async(step)())
    _keep(task)
    return await asyncio.shield(task)


async def _open_async(
    opening: Opening, request: anthropic.APIRequest, call_next: AsyncCallNext
) -> OpenAttempt | Found:
    """Reserve without holding a thread meanwhile. See ``_open``."""
    try:
        while True:
            step = await _taken(partial(_reserve, opening))
            if isinstance(step, (OpenAttempt, Found)):
                return step
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            else:
                opening.learn(await _ask_count_async(request, step, call_next))
    except (asyncio.CancelledError, GeneratorExit):
        _later(_in_thread, opening.give_up)
        raise


async def _taken(take: Callable[[], Result]) -> Result:
    """Run what reserves; if the caller is cancelled meanwhile, give back what was taken."""
    task = asyncio.get_running_loop().create_task(sync_to_async(take)())
    _keep(task)
    try:
        return await asyncio.shield(task)
    except (asyncio.CancelledError, GeneratorExit) as error:
        _later(_give_back, task, type(error).__name__)
        raise


async def _give_back(task: asyncio.Future[Any], reason: str) -> None:
    """Release what was reserved for a caller who is gone."""
    try:
        taken = await task
    except Exception:
        return
    if isinstance(taken, (OpenAttempt, ClientBatch)):
        await _book_async(lambda: taken.book_unsent(reason))


def _later(work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    """Let the loop do it; where none runs any more, the tick will."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    _keep(loop.create_task(work(*args)))


_running: set[asyncio.Future[Any]] = set()


def _keep(task: asyncio.Future[Any]) -> None:
    """Hold a reference until it is done: the loop itself keeps only a weak one."""
    _running.add(task)
    task.add_done_callback(_running.discard)
