"""A real HTTP server that answers as the Anthropic API does, for tests, demos and benchmarks."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs

from ai_budget.testing.answers import Answer, Event, compose, to_json
from ai_budget.testing.batches import Shelf, SimulatedBatches
from ai_budget.testing.catalogue import LISTED_MODELS, describe, is_claude
from ai_budget.testing.prompt_cache_model import CacheUse, InvalidMark, PromptCache
from ai_budget.testing.request_checks import (
    ApiError,
    check_countable,
    check_fits,
    check_message_request,
    check_prompt,
    check_version,
    default_message,
    status_of,
)
from ai_budget.testing.steps import (
    CutBeforeResponse,
    CutStream,
    Fail,
    Hang,
    Reply,
    Step,
    StepSource,
    StreamError,
    TruncateCleanly,
)
from ai_budget.testing.tokens import prompt_blocks, prompt_tokens
from ai_budget.testing.wire import ClientGone, Exchange, LoopbackServer, loopback_address

logger = logging.getLogger(__name__)

_LARGEST_BODY = 32 * 1024 * 1024  # bytes
_SECRET_HEADERS = ("x-api-key", "authorization")
_RATE_LIMITS = {
    "requests": 4_000,
    "tokens": 4_800_000,
    "input-tokens": 4_000_000,
    "output-tokens": 800_000,
}
_OBJECTS_PER_PAGE = 20
_MOST_OBJECTS_PER_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request that arrived.

    headers: names in lower case, the API key redacted.
    body: the JSON object that was sent, if it was one.
    at: the simulator's clock, in seconds.
    query: what followed the "?" of the path.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any] | None
    at: float
    query: str = ""


@dataclass(frozen=True, slots=True)
class Billed:
    """One message that the provider charges for, read to its end or not.

    usage: as it was sent; for a stream that was cut, with the output made until then.
    """

    model: str
    usage: dict[str, Any]
    request_id: str
    batch: bool = False


class _Books:
    """What was asked and what is owed since the last reset."""

    def __init__(self, history: int | None) -> None:
        self._lock = threading.Lock()
        self._requests: deque[RecordedRequest] = deque(maxlen=history)
        self._billed: deque[Billed] = deque(maxlen=history)
        self._script: deque[StepSource] = deque()
        self.shelf = Shelf(history)

    def record(self, request: RecordedRequest) -> None:
        with self._lock:
            self._requests.append(request)

    def bill(self, bill: Billed) -> None:
        with self._lock:
            self._billed.append(bill)

    def bill_items(self, items: Iterable[tuple[str, dict[str, Any], str]]) -> None:
        """Bills the items of a batch: a model, its usage and a request id each."""
        bills = [Billed(*item, batch=True) for item in items]
        with self._lock:
            self._billed.extend(bills)

    def enqueue(self, steps: Iterable[StepSource]) -> None:
        with self._lock:
            self._script.extend(steps)

    def next_step(self) -> StepSource | None:
        with self._lock:
            return self._script.popleft() if self._script else None

    @property
    def requests(self) -> list[RecordedRequest]:
        with self._lock:
            return list(self._requests)

    @property
    def billed(self) -> list[Billed]:
        with self._lock:
            return list(self._billed)


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request on its way through a route.

    body: the JSON object, or None. raw: the bytes it was sent as.
    tenant: whose prompt cache it sees; a digest, never the key itself.
    at: the simulator's clock when it arrived. names: the groups of the route's pattern.
    """

    exchange: Exchange
    body: dict[str, Any] | None
    names: Mapping[str, str]
    query: Mapping[str, str]
    tenant: str
    request_id: str
    at: float
    books: _Books

    @property
    def raw(self) -> bytes:
        return self.exchange.request.body

    @property
    def api_version(self) -> str:
        return self.exchange.request.headers.get("anthropic-version", "")

    def send(self, payload: object, headers: Mapping[str, str] | None = None) -> None:
        """Answers 200 with JSON."""
        self.exchange.send(200, self.headers(headers), to_json(payload))

    def fail(self, step: Fail) -> None:
        """Answers with the error that `step` says."""
        self.exchange.pause(step.delay)
        error = ApiError(
            step.status,
            step.message,
            error_type=step.error_type,
            retry_after=step.retry_after,
            details=step.details,
        )
        _send_error(self.exchange, error, self.request_id, headers=step.headers)

    def page(self, ids: Sequence[str]) -> tuple[Sequence[str], bool]:
        """The part of `ids` that the query asks for, and whether there is more. Raises ApiError."""
        try:
            size = int(self.query.get("limit", _OBJECTS_PER_PAGE))
        except ValueError:
            raise ApiError(400, "limit: Input should be a valid integer") from None
        if not 1 <= size <= _MOST_OBJECTS_PER_PAGE:
            raise ApiError(400, f"limit: must be between 1 and {_MOST_OBJECTS_PER_PAGE}")
        if self.query.get("after_id") in ids:
            ids = ids[ids.index(self.query["after_id"]) + 1 :]
        elif self.query.get("before_id") in ids:
            ids = ids[: ids.index(self.query["before_id"])]
            return ids[-size:], len(ids) > size
        return ids[:size], len(ids) > size

    def headers(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The headers of a JSON response."""
        return {
            **_common_headers(self.request_id),
            "content-type": "application/json",
            **(more or {}),
        }


Room = Callable[[Call], None]
"""Answers the calls of one route; may raise ApiError and ClientGone."""


class AnthropicSimulator:
    """Answers on loopback in the wire shapes of the Anthropic API.

        with AnthropicSimulator() as api:
            client = anthropic.Anthropic(base_url=api.base_url, api_key="any")

    host: a loopback address; any other raises ValueError, for its answers are made up.
    port: 0 takes a free one.
    default: what happens to a message request when nothing is enqueued.
    count_failure: what token counting answers in place of a count; None counts.
    compress: whether bodies are gzipped for the clients that accept it.
    clock: seconds; what the prompt cache's lifetimes, the pace of batches and
        `RecordedRequest.at` are counted in.
    history: how many requests, bills and batches to remember; None remembers all.

    `batches` scripts Message Batches. Thread-safe. Importing it needs neither Django nor the SDK.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        default: StepSource | None = None,
        count_failure: Fail | None = None,
        compress: bool = False,
        clock: Callable[[], float] = time.monotonic,
        history: int | None = None,
    ) -> None:
        self.default: StepSource = default if default is not None else Reply()
        self._initial_default = self.default
        self.count_failure = self._initial_count_failure = count_failure
        self._address = loopback_address(host)
        self._port = port
        self._compress = compress
        self._clock = clock
        self._history = history
        self._server: LoopbackServer | None = None
        self._lock = threading.Lock()
        self._books = _Books(history)
        self._prompt_cache = PromptCache()
        self._serial = itertools.count(1)
        self._run = secrets.token_hex(4)
        self._rooms: list[tuple[str, re.Pattern[str], Room]] = []
        self.add_room("POST", r"/v1/messages", self._create_message)
        self.add_room("POST", r"/v1/messages/count_tokens", self._count_tokens)
        self.add_room("GET", r"/v1/models", self._list_models)
        self.add_room("GET", r"/v1/models/(?P<model>[^/]+)", self._retrieve_model)
        self.batches = SimulatedBatches(
            self, clock=clock, prompt_cache=self._prompt_cache, books=lambda: self._books
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Opens the port and returns at once. Raises OSError if it is taken."""
        if self._server is None:
            self._server = LoopbackServer(
                self._address, self._port, self._answer, compress=self._compress
            )
        return self

    def stop(self) -> None:
        """Closes the port and every connection; what was recorded stays."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def base_url(self) -> str:
        """What to give the SDK. Raises RuntimeError before `start`."""
        if self._server is None:
            raise RuntimeError("the simulator is not running: call start(), or use it in a with")
        host = f"[{self._address}]" if self._address.version == 6 else str(self._address)
        return f"http://{host}:{self._server.port}"

    @property
    def requests(self) -> list[RecordedRequest]:
        """Every request that arrived, in order, refused ones too."""
        return self._books.requests

    @property
    def billed(self) -> list[Billed]:
        """Every message that costs money, in order.

        A whole message is here before its last byte is sent; a stream that its reader leaves
        follows when the server notices (see `wait_until_idle`). The items of a batch are here as
        soon as it has ended.
        """
        self.batches.catch_up()
        return self._books.billed

    def enqueue(self, *steps: StepSource) -> None:
        """Scripts the next message requests, one step each, in order of arrival."""
        self._books.enqueue(steps)

    def reset(self) -> None:
        """Forgets requests, bills, scripts, batches and prompt cache.

        What still runs stays unseen.
        """
        with self._lock:
            self._books = _Books(self._history)
            self.default = self._initial_default
            self.count_failure = self._initial_count_failure
            self._prompt_cache.clear()
            self.batches.restore_defaults()

    def wait_until_idle(self, timeout: float = 5.0) -> None:
        """Returns once no request is being handled. Raises TimeoutError after `timeout` seconds."""
        if self._server is not None and not self._server.wait_until_idle(timeout):
            raise TimeoutError("the simulator is still handling a request")

    def add_room(self, method: str, pattern: str, room: Room) -> None:
        """Routes `method` on paths that match `pattern` in full to `room`; the first match wins."""
        self._rooms.append((method, re.compile(pattern), room))

    def bill(
        self, call: Call, model: str, usage: Mapping[str, Any], *, batch: bool = False
    ) -> None:
        """Records that `call` made a message that costs `usage`."""
        call.books.bill(Billed(model, dict(usage), call.request_id, batch))

    def read_prompt(
        self,
        body: Mapping[str, Any] | None,
        *,
        tenant: str,
        version: str,
        marked: bool,
        at: float,
    ) -> CacheUse:
        """How the prompt of a message request is billed at `at`. Changes nothing.

        marked: False if the prompt has no mark of the prompt cache. Raises ApiError.
        """
        checked = check_message_request(body)
        check_version(checked, version)
        blocks = prompt_blocks(checked)
        total = prompt_tokens(blocks)
        check_fits(total, checked["model"])
        if not marked:
            return CacheUse(uncached=total, read=0, written_5m=0, written_1h=0)
        try:
            return self._prompt_cache.plan(tenant=tenant, body=checked, blocks=blocks, at=at)
        except InvalidMark as error:
            raise ApiError(400, str(error)) from None

    # One request, from the wire to a room.

    def _answer(self, exchange: Exchange) -> None:
        with self._lock:
            books, at, serial = self._books, self._clock(), next(self._serial)
        request_id = f"req_{self._run}{serial:012d}"
        body = _json_object(exchange.request.body)
        books.record(_recorded(exchange, body, at))
        try:
            room, names = self._find_room(exchange.request.method, exchange.request.path)
            call = Call(
                exchange=exchange,
                body=body,
                names=names,
                query=_first_values(exchange.request.query),
                tenant=_tenant(exchange.request.headers),
                request_id=request_id,
                at=at,
                books=books,
            )
            room(call)
        except ApiError as error:
            _send_error(exchange, error, request_id)
        except ClientGone:
            raise
        except Exception as error:
            logger.exception("the simulated API failed to answer")
            _send_error(exchange, ApiError(500, f"the simulator failed: {error!r}"), request_id)

    def _find_room(self, method: str, path: str) -> tuple[Room, Mapping[str, str]]:
        known_path = False
        for allowed, pattern, room in self._rooms:
            found = pattern.fullmatch(path)
            if found and allowed == method:
                return room, found.groupdict()
            known_path = known_path or found is not None
        if known_path:
            raise ApiError(405, "Method Not Allowed")
        raise ApiError(404, "Not Found")

    # POST /v1/messages

    def _create_message(self, call: Call) -> None:
        if len(call.raw) > _LARGEST_BODY:
            raise ApiError(413, "Request exceeds the maximum allowed number of bytes.")
        step = self._next_step(call)
        match step:
            case Fail():
                call.fail(step)
            case Hang():
                if step.billed:
                    self._bill_unread(call)
                call.exchange.pause(step.seconds)
                call.exchange.hang_up()
            case CutBeforeResponse():
                if step.billed:
                    self._bill_unread(call)
                call.exchange.hang_up()
            case Reply():
                self._reply(call, step, step)
            case _:
                self._reply(call, step.reply, step)

    def _next_step(self, call: Call) -> Step:
        source = call.books.next_step() or self.default
        return source(call.body or {}) if callable(source) else source

    def _reply(self, call: Call, reply: Reply, step: Step) -> None:
        answer, cache = self._compose(call, reply)
        if call.body and call.body.get("stream"):
            self._stream(call, reply, step, answer, cache)
        elif isinstance(step, StreamError):
            raise ApiError(status_of(step.error_type), step.message, error_type=step.error_type)
        else:
            self._send_whole(call, reply, step, answer, cache)

    def _compose(self, call: Call, reply: Reply) -> tuple[Answer, CacheUse]:
        body = call.body or {}
        cache = self.read_prompt(
            call.body,
            tenant=call.tenant,
            version=call.api_version,
            # Most prompts carry no mark, and hashing them would be the dearest part of an answer.
            marked=b"cache_control" in call.raw,
            at=call.at,
        )
        message_id = "msg_" + call.request_id.removeprefix("req_")
        return compose(reply, body=body, cache=cache, message_id=message_id), cache

    def _bill_unread(self, call: Call) -> None:
        answer, cache = self._compose(call, Reply())
        self._prompt_cache.commit(cache)
        self.bill(call, answer.message["model"], answer.usage)

    def _send_whole(
        self, call: Call, reply: Reply, step: Step, answer: Answer, cache: CacheUse
    ) -> None:
        try:
            call.exchange.pause(reply.delay)
        finally:
            # A client that gives up does not stop the model.
            self.bill(call, answer.message["model"], answer.usage)
        self._prompt_cache.commit(cache)
        headers = call.headers({**_rate_limit_headers(answer.usage), **(reply.headers or {})})
        payload = to_json(answer.message)
        if isinstance(step, CutStream):
            call.exchange.send_half(200, headers, payload)
        else:
            call.exchange.send(200, headers, payload)

    def _stream(
        self, call: Call, reply: Reply, step: Step, answer: Answer, cache: CacheUse
    ) -> None:
        events = _events_to_send(answer, step)
        generated = 0
        billed = False
        try:
            call.exchange.pause(reply.delay)
            self._prompt_cache.commit(cache)
            headers = {**_stream_headers(call.request_id, answer.usage), **(reply.headers or {})}
            call.exchange.start_stream(200, headers)
            for number, event in enumerate(events, start=1):
                if event.name == "content_block_delta":
                    call.exchange.pause(reply.chunk_delay)
                generated = event.generated
                if number == len(events):
                    # Before the last byte, so that a reader who is done finds the bill.
                    billed = True
                    self.bill(call, answer.message["model"], answer.usage_when_cut(generated))
                call.exchange.send_chunk(event.encoded())
            _finish_stream(call, step)
        finally:
            if not billed:
                self.bill(call, answer.message["model"], answer.usage_when_cut(generated))

    # The free endpoints.

    def _count_tokens(self, call: Call) -> None:
        if self.count_failure is not None:
            call.fail(self.count_failure)
            return
        body = check_prompt(call.body)
        check_version(body, call.api_version)
        check_countable(body)
        call.send({"input_tokens": prompt_tokens(prompt_blocks(body))})

    def _list_models(self, call: Call) -> None:
        page, has_more = call.page(LISTED_MODELS)
        call.send(
            {
                "data": [describe(model) for model in page],
                "has_more": has_more,
                "first_id": page[0] if page else None,
                "last_id": page[-1] if page else None,
            }
        )

    def _retrieve_model(self, call: Call) -> None:
        model = call.names["model"]
        if not is_claude(model):
            raise ApiError(404, f"model: {model}")
        call.send(describe(model))


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw) if raw else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _recorded(exchange: Exchange, body: dict[str, Any] | None, at: float) -> RecordedRequest:
    request = exchange.request
    headers = {
        name: "redacted" if name in _SECRET_HEADERS else value
        for name, value in request.headers.items()
    }
    return RecordedRequest(request.method, request.path, headers, body, at, request.query)


def _first_values(query: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(query).items()} if query else {}


def _tenant(headers: Mapping[str, str]) -> str:
    secret = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    if not secret:
        raise ApiError(401, "x-api-key header is required")
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _send_error(
    exchange: Exchange,
    error: ApiError,
    request_id: str,
    *,
    headers: Mapping[str, str] | None = None,
) -> None:
    own = {
        **_common_headers(request_id),
        "content-type": "application/json",
        "x-should-retry": "true" if error.retryable else "false",
    }
    if error.retry_after is not None:
        own["retry-after"] = f"{error.retry_after:g}"
    exchange.send(error.status, {**own, **(headers or {})}, to_json(error.payload(request_id)))


def _common_headers(request_id: str) -> dict[str, str]:
    return {
        "request-id": request_id,
        "anthropic-organization-id": "00000000-0000-4000-8000-000000000000",
        "anthropic-workspace-id": "wrkspc_simulated",
    }


def _stream_headers(request_id: str, usage: Mapping[str, Any]) -> dict[str, str]:
    return {
        **_common_headers(request_id),
        **_rate_limit_headers(usage),
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
    }


def _rate_limit_headers(usage: Mapping[str, Any]) -> dict[str, str]:
    """Limits that never run out: each response sees those of a quiet organisation."""
    read = (usage["input_tokens"] or 0) + (usage["cache_creation_input_tokens"] or 0)
    written = usage["output_tokens"] or 0
    used = {"requests": 1, "tokens": read + written, "input-tokens": read, "output-tokens": written}
    reset = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    headers: dict[str, str] = {}
    for name, limit in _RATE_LIMITS.items():
        headers[f"anthropic-ratelimit-{name}-limit"] = str(limit)
        headers[f"anthropic-ratelimit-{name}-remaining"] = str(max(0, limit - used[name]))
        headers[f"anthropic-ratelimit-{name}-reset"] = reset
    return headers


def _events_to_send(answer: Answer, step: Step) -> list[Event]:
    events = answer.events()
    match step:
        case CutStream(after_events=count) | StreamError(after_events=count):
            return events[:count]
        case TruncateCleanly(after_events=count):
            return events[:-2][:count]
        case _:
            return events


def _finish_stream(call: Call, step: Step) -> None:
    if isinstance(step, CutStream):
        call.exchange.hang_up()
        return
    if isinstance(step, StreamError):
        message = step.message or default_message(step.error_type)
        error = {"type": step.error_type, "message": message}
        payload = {"type": "error", "error": error, "request_id": call.request_id}
        call.exchange.send_chunk(Event("error", payload, 0).encoded())
    call.exchange.end_stream()
