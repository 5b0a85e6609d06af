"""Message Batches of the simulated API: created, paced, ended, billed and read."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain, count, islice, repeat
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from ai_budget import periods
from ai_budget.testing.answers import Answer, compose, to_json
from ai_budget.testing.prompt_cache_model import CacheUse, PromptCache
from ai_budget.testing.request_checks import ApiError, status_of
from ai_budget.testing.steps import (
    BatchStep,
    BatchStepSource,
    Canceled,
    CutBeforeResponse,
    CutStream,
    Errored,
    Expired,
    Fail,
    Hang,
    Outcome,
    OutcomeSource,
    Reply,
    Results,
    TruncateCleanly,
)

if TYPE_CHECKING:
    from ai_budget.testing.simulator import AnthropicSimulator, Call, _Books

MOST_REQUESTS = 100_000
LARGEST_BODY = 256 * 1024 * 1024  # bytes
LIFETIME = 24 * 3_600.0  # seconds until what is unanswered expires
RESULTS_KEPT = 29 * 24 * 3_600.0  # seconds since the creation

Endpoint: TypeAlias = Literal["create", "list", "retrieve", "cancel", "delete", "results"]

_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_POLL_EVERY = {"retry-after": "10"}  # seconds
_CHUNK = 65_536  # bytes
_CANCELED: Mapping[str, Any] = {"type": "canceled"}
_EXPIRED: Mapping[str, Any] = {"type": "expired"}
_STATES = ("succeeded", "errored", "canceled", "expired")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long a batch takes, by the simulator's clock.

    seconds: from its creation to its end; 0 ends it before anyone can look, `math.inf` never.
        Its items are done evenly over that time, in the order they were sent.
    canceling: from its cancellation to its end.
    done: the share of its items, from 0 to 1, that is done when it is canceled or expires before
        its time; None: as many as the time that has passed allows.
    """

    seconds: float = 0.0
    canceling: float = 0.0
    done: float | None = None

    @classmethod
    def never(cls) -> Pace:
        """Ends by hand (`SimulatedBatches.end`), by cancellation, or by expiry."""
        return cls(seconds=math.inf)


# A message still to be made, as its prompt is billed; or a result as it is sent.
_Settled: TypeAlias = CacheUse | Mapping[str, Any]


class _Response(NamedTuple):
    payload: Mapping[str, Any]
    headers: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class _Ending:
    at: float
    counts: Mapping[str, int]
    settled: Sequence[_Settled]


@dataclass(slots=True)
class _Batch:
    """One batch. `requests` and `outcomes` stand in the order sent; times are of the clock.

    marked: whether any prompt may have a cache mark.
    lock: held by who cancels or ends it.
    """

    stem: str
    tenant: str
    version: str
    marked: bool
    requests: Sequence[Mapping[str, Any]]
    outcomes: Sequence[Outcome]
    pace: Pace
    created_at: float
    created_on: datetime
    books: _Books
    canceled_at: float | None = None
    ending: _Ending | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def id(self) -> str:
        return f"msgbatch_{self.stem}"

    @property
    def expires_at(self) -> float:
        return self.created_at + LIFETIME

    @property
    def archived_at(self) -> float:
        return self.created_at + RESULTS_KEPT

    @property
    def ends_at(self) -> float:
        if self.canceled_at is not None:
            return min(self.canceled_at + self.pace.canceling, self.expires_at)
        return min(self.created_at + self.pace.seconds, self.expires_at)

    def done_by(self, at: float) -> int:
        """How many items are done, counted from the first; a cancellation stops the rest."""
        at = at if self.canceled_at is None else self.canceled_at
        if at >= self.created_at + self.pace.seconds:
            return len(self.requests)
        share = self.pace.done
        if share is None:
            share = (at - self.created_at) / self.pace.seconds
        return int(len(self.requests) * share)

    def date(self, at: float | None) -> str | None:
        """The date of a reading of the clock, as the API writes it."""
        if at is None:
            return None
        on = self.created_on + timedelta(seconds=at - self.created_at)
        return on.isoformat(timespec="microseconds")

    def item_stem(self, index: int) -> str:
        return f"{self.stem}{index:06d}"


class Shelf:
    """The batches since the last reset, and what is scripted for those to come.

    history: how many batches to remember; None remembers all.
    """

    def __init__(self, history: int | None) -> None:
        self._history = history
        self._lock = threading.Lock()
        self._batches: dict[str, _Batch] = {}
        self._outcomes: deque[OutcomeSource] = deque()
        self._steps: dict[str, deque[BatchStepSource]] = {
            endpoint: deque() for endpoint in get_args(Endpoint)
        }
        self._reads = count(1)

    def put(self, batch: _Batch) -> None:
        with self._lock:
            self._batches[batch.id] = batch
            if self._history is not None and len(self._batches) > self._history:
                del self._batches[next(iter(self._batches))]

    def take_away(self, batch: _Batch) -> None:
        with self._lock:
            self._batches.pop(batch.id, None)

    def find(self, batch_id: str) -> _Batch | None:
        return self._batches.get(batch_id)

    def batches(self) -> list[_Batch]:
        """In order of creation."""
        with self._lock:
            return list(self._batches.values())

    def enqueue(self, outcomes: Sequence[OutcomeSource]) -> None:
        with self._lock:
            self._outcomes.extend(outcomes)

    def next_outcomes(self, most: int) -> list[OutcomeSource]:
        with self._lock:
            return [self._outcomes.popleft() for _ in range(min(most, len(self._outcomes)))]

    def script(self, endpoint: Endpoint, steps: Sequence[BatchStepSource]) -> None:
        with self._lock:
            self._steps[endpoint].extend(steps)

    def next_step(self, endpoint: Endpoint) -> BatchStepSource | None:
        with self._lock:
            return self._steps[endpoint].popleft() if self._steps[endpoint] else None

    def next_read(self) -> int:
        return next(self._reads)


class SimulatedBatches:
    """Message Batches of one simulated API: `AnthropicSimulator.batches`.

    pace: how long the batches take that are created from now on.
    default: what becomes of an item for which nothing is enqueued: an outcome, or a function of
        its custom id and its params that chooses one.

    A batch is dated by the budget's clock when it is created, which a test may have frozen; its
    other dates follow by the seconds that pass on the simulator's clock. It ends when its pace
    says, when it is canceled, after 24 hours, or by hand; what succeeded is billed then, read or
    not, and appears to whoever looks next. Thread-safe.
    """

    def __init__(
        self,
        api: AnthropicSimulator,
        *,
        clock: Callable[[], float],
        prompt_cache: PromptCache,
        books: Callable[[], _Books],
    ) -> None:
        self._api = api
        self._clock = clock
        self._prompt_cache = prompt_cache
        self._books = books
        self.restore_defaults()
        path = r"/v1/messages/batches"
        one = path + r"/(?P<batch>[^/]+)"
        api.add_room("POST", path, self._create)
        api.add_room("GET", path, self._list)
        api.add_room("GET", one, self._retrieve)
        api.add_room("DELETE", one, self._delete)
        api.add_room("POST", one + "/cancel", self._cancel)
        api.add_room("GET", one + "/results", self._results)

    @property
    def ids(self) -> list[str]:
        """Every batch that was accepted and not deleted, oldest first."""
        return [batch.id for batch in self._books().shelf.batches()]

    def enqueue(self, *outcomes: OutcomeSource) -> None:
        """Scripts the next items, one outcome each, in the order they are sent."""
        self._books().shelf.enqueue(outcomes)

    def script(self, endpoint: Endpoint, *steps: BatchStepSource) -> None:
        """Scripts the next requests to one endpoint of batches, one step each.

        `Reply()` answers as usual. What is cut or hangs has no effect, unless it says `billed`:
        then the batch was created, canceled or deleted all the same. `CutStream` and
        `TruncateCleanly` count the lines of results as their events.
        """
        self._books().shelf.script(endpoint, steps)

    def end(self, batch_id: str | None = None) -> None:
        """Ends one batch now, or all, with every item done that was not canceled before.

        Raises LookupError.
        """
        for batch in self._chosen(batch_id):
            with batch.lock:
                now = self._clock()
                self._catch_up_with(batch, now)
                canceled = batch.canceled_at is not None
                done = batch.done_by(now) if canceled else len(batch.requests)
                self._end(batch, at=now, done=done)

    def expire(self, batch_id: str | None = None) -> None:
        """Ends one batch now, or all, as if its 24 hours were over. Raises LookupError."""
        for batch in self._chosen(batch_id):
            with batch.lock:
                now = self._clock()
                self._catch_up_with(batch, now)
                self._end(batch, at=now, done=batch.done_by(now))

    def catch_up(self) -> None:
        """Ends and bills whatever is due by the clock."""
        now = self._clock()
        for batch in self._books().shelf.batches():
            self._look(batch, now)

    def restore_defaults(self) -> None:
        """Takes back what was assigned to `pace` and `default`."""
        self.pace = Pace()
        self.default: OutcomeSource = Reply()

    # The endpoints.

    def _create(self, call: Call) -> None:
        if len(call.raw) > LARGEST_BODY:
            raise ApiError(413, "Request exceeds the maximum allowed number of bytes.")
        self._perform(call, "create", self._accept)

    def _list(self, call: Call) -> None:
        self._perform(call, "list", self._show_page)

    def _retrieve(self, call: Call) -> None:
        self._perform(call, "retrieve", self._show)

    def _cancel(self, call: Call) -> None:
        self._perform(call, "cancel", self._begin_to_cancel)

    def _delete(self, call: Call) -> None:
        self._perform(call, "delete", self._take_away)

    def _results(self, call: Call) -> None:
        step = self._next_step(call, "results")
        if self._interrupt(call, step, self._readable):
            return
        batch, ending = self._readable(call)
        script = step if isinstance(step, Results) else Results()
        random = Random(call.books.shelf.next_read())  # noqa: S311 - it protects nothing
        order = _order(batch.requests, script, random)
        headers = {
            "content-type": "application/x-jsonl",
            "content-disposition": f"attachment; filename*=utf-8''{batch.id}_results.jsonl",
        }
        most = None
        if isinstance(step, Reply):
            call.exchange.pause(step.delay)
            headers |= step.headers or {}
        elif isinstance(step, CutStream | TruncateCleanly):
            most = step.after_events
        call.exchange.start_stream(200, call.headers(headers))
        lines = (_line(batch, ending, index) for index in order)
        for chunk in _chunks(islice(lines, most), script.line_delay):
            call.exchange.pause(script.line_delay)
            call.exchange.send_chunk(chunk)
        if isinstance(step, CutStream):
            unfinished = next(lines, b"")
            if unfinished:
                call.exchange.send_chunk(unfinished[: len(unfinished) // 2])
            call.exchange.hang_up()
            return
        call.exchange.end_stream()

    def _perform(self, call: Call, endpoint: Endpoint, act: Callable[[Call], _Response]) -> None:
        step = self._next_step(call, endpoint)
        if self._interrupt(call, step, act):
            return
        response = act(call)
        headers = call.headers(response.headers)
        if isinstance(step, Reply):
            call.exchange.pause(step.delay)
            headers |= step.headers or {}
        payload = to_json(response.payload)
        if isinstance(step, CutStream):
            call.exchange.send_half(200, headers, payload)
        else:
            call.exchange.send(200, headers, payload)

    def _interrupt(self, call: Call, step: BatchStep, act: Callable[[Call], object]) -> bool:
        """Whether `step` left the request without its answer."""
        match step:
            case Fail():
                call.fail(step)
            case Hang() | CutBeforeResponse():
                if step.billed:
                    act(call)
                if isinstance(step, Hang):
                    call.exchange.pause(step.seconds)
                call.exchange.hang_up()
            case _:
                return False
        return True

    def _next_step(self, call: Call, endpoint: Endpoint) -> BatchStep:
        source = call.books.shelf.next_step(endpoint) or Reply()
        return source(call.body or {}) if callable(source) else source

    # What they do.

    def _accept(self, call: Call) -> _Response:
        requests = _checked_requests(call.body)
        batch = _Batch(
            stem=call.request_id.removeprefix("req_"),
            tenant=call.tenant,
            version=call.api_version,
            marked=b"cache_control" in call.raw,
            requests=requests,
            outcomes=self._choose_outcomes(call.books.shelf, requests),
            pace=self.pace,
            created_at=call.at,
            created_on=periods.now(),
            books=call.books,
        )
        call.books.shelf.put(batch)
        return _Response(self._describe(batch, None, call))

    def _choose_outcomes(
        self, shelf: Shelf, requests: Sequence[Mapping[str, Any]]
    ) -> list[Outcome]:
        sources = chain(shelf.next_outcomes(len(requests)), repeat(self.default))
        return [
            source(request["custom_id"], request["params"]) if callable(source) else source
            for request, source in zip(requests, sources, strict=False)
        ]

    def _show_page(self, call: Call) -> _Response:
        newest_first = {
            batch.id: batch
            for batch in reversed(call.books.shelf.batches())
            if batch.tenant == call.tenant
        }
        page, has_more = call.page(list(newest_first))
        return _Response(
            {
                "data": [
                    self._describe(batch, self._look(batch, call.at), call)
                    for batch in map(newest_first.__getitem__, page)
                ],
                "has_more": has_more,
                "first_id": page[0] if page else None,
                "last_id": page[-1] if page else None,
            }
        )

    def _show(self, call: Call) -> _Response:
        batch = self._find(call)
        ending = self._look(batch, call.at)
        headers = _POLL_EVERY if ending is None else {}
        return _Response(self._describe(batch, ending, call), headers)

    def _begin_to_cancel(self, call: Call) -> _Response:
        batch = self._find(call)
        with batch.lock:
            if self._catch_up_with(batch, call.at) is not None:
                raise ApiError(400, f"Message Batch {batch.id} has ended: it cannot be canceled.")
            if batch.canceled_at is None:
                batch.canceled_at = call.at
        return _Response(self._describe(batch, None, call))

    def _take_away(self, call: Call) -> _Response:
        batch = self._find(call)
        if self._look(batch, call.at) is None:
            raise ApiError(
                400, f"Message Batch {batch.id} is still processing: cancel it to delete it."
            )
        call.books.shelf.take_away(batch)
        return _Response({"id": batch.id, "type": "message_batch_deleted"})

    def _readable(self, call: Call) -> tuple[_Batch, _Ending]:
        batch = self._find(call)
        ending = self._look(batch, call.at)
        if ending is None:
            raise ApiError(404, f"Message Batch {batch.id} has no results yet.")
        if call.at >= batch.archived_at:
            raise ApiError(404, f"The results of Message Batch {batch.id} are no longer available.")
        return batch, ending

    def _find(self, call: Call) -> _Batch:
        batch = call.books.shelf.find(call.names["batch"])
        if batch is None or batch.tenant != call.tenant:
            raise ApiError(404, f"Message Batch {call.names['batch']} not found.")
        return batch

    def _chosen(self, batch_id: str | None) -> list[_Batch]:
        shelf = self._books().shelf
        if batch_id is None:
            return shelf.batches()
        batch = shelf.find(batch_id)
        if batch is None:
            raise LookupError(f"there is no batch {batch_id}")
        return [batch]

    def _describe(self, batch: _Batch, ending: _Ending | None, call: Call) -> dict[str, Any]:
        """The batch as `call` sees it: what ends meanwhile is for the next to see."""
        status = "in_progress" if batch.canceled_at is None else "canceling"
        counts: dict[str, int] = {"processing": len(batch.requests), **dict.fromkeys(_STATES, 0)}
        results_url = None
        archived = call.at >= batch.archived_at
        if ending is not None:
            status = "ended"
            counts = {"processing": 0, **{state: ending.counts[state] for state in _STATES}}
            if not archived:
                # By the address that was called, so that a proxy in between stays in between.
                host = call.exchange.request.headers.get("host", "")
                results_url = f"http://{host}/v1/messages/batches/{batch.id}/results"
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": status,
            "request_counts": counts,
            "ended_at": batch.date(ending.at if ending else None),
            "created_at": batch.date(batch.created_at),
            "expires_at": batch.date(batch.expires_at),
            "archived_at": batch.date(batch.archived_at if archived else None),
            "cancel_initiated_at": batch.date(batch.canceled_at),
            "results_url": results_url,
        }

    # The end of a batch.

    def _look(self, batch: _Batch, at: float) -> _Ending | None:
        if batch.ending is not None:
            return batch.ending
        with batch.lock:
            return self._catch_up_with(batch, at)

    def _catch_up_with(self, batch: _Batch, at: float) -> _Ending | None:
        if batch.ending is None and batch.ends_at <= at:
            self._end(batch, at=batch.ends_at, done=batch.done_by(batch.ends_at))
        return batch.ending

    def _end(self, batch: _Batch, *, at: float, done: int) -> None:
        """Ends `batch` with its first `done` items done, and bills them. Its lock is held."""
        if batch.ending is not None:
            return
        unanswered = _EXPIRED if batch.canceled_at is None else _CANCELED
        settled: list[_Settled] = [
            self._settle(batch, index, at) if index < done else unanswered
            for index in range(len(batch.requests))
        ]
        counts = Counter(
            "succeeded" if isinstance(item, CacheUse) else item["type"] for item in settled
        )
        batch.books.bill_items(
            (answer.message["model"], answer.usage, f"req_{batch.item_stem(index)}")
            for index, item in enumerate(settled)
            if isinstance(item, CacheUse)
            for answer in [_answer(batch, index, item)]
        )
        batch.ending = _Ending(at, counts, settled)

    def _settle(self, batch: _Batch, index: int, at: float) -> _Settled:
        outcome = batch.outcomes[index]
        match outcome:
            case Canceled():
                return _CANCELED
            case Expired():
                return _EXPIRED
            case Errored():
                error = ApiError(
                    status_of(outcome.error_type), outcome.message, error_type=outcome.error_type
                )
                return _errored(batch, index, error)
        params = batch.requests[index]["params"]
        try:
            _check_params(params)
            use = self._api.read_prompt(
                params, tenant=batch.tenant, version=batch.version, marked=batch.marked, at=at
            )
        except ApiError as error:
            return _errored(batch, index, error)
        self._prompt_cache.commit(use)
        return use


def _checked_requests(body: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    """The items of a batch that can be created. Raises ApiError.

    Their params are checked when they are processed, as the API does.
    """
    if body is None:
        raise ApiError(400, "The request body is not a valid JSON object.")
    requests = body.get("requests")
    if requests is None:
        raise ApiError(400, "requests: Field required")
    if not isinstance(requests, list):
        raise ApiError(400, "requests: Input should be a valid list")
    if not requests:
        raise ApiError(400, "requests: List should have at least 1 item after validation, not 0")
    if len(requests) > MOST_REQUESTS:
        raise ApiError(
            400,
            f"requests: List should have at most {MOST_REQUESTS} items after validation, "
            f"not {len(requests)}",
        )
    seen: set[str] = set()
    for index, request in enumerate(requests):
        if not isinstance(request, dict):
            raise ApiError(400, f"requests.{index}: Input should be a valid dictionary")
        seen.add(_checked_id(request.get("custom_id"), f"requests.{index}.custom_id", seen))
        params = request.get("params")
        if params is None:
            raise ApiError(400, f"requests.{index}.params: Field required")
        if not isinstance(params, dict):
            raise ApiError(400, f"requests.{index}.params: Input should be a valid dictionary")
    return requests


def _checked_id(custom_id: object, path: str, seen: Set[str]) -> str:
    if custom_id is None:
        raise ApiError(400, f"{path}: Field required")
    if not isinstance(custom_id, str):
        raise ApiError(400, f"{path}: Input should be a valid string")
    if _CUSTOM_ID.fullmatch(custom_id) is None:
        raise ApiError(400, f"{path}: String should match pattern '^{_CUSTOM_ID.pattern}$'")
    if custom_id in seen:
        raise ApiError(400, f"{path}: must be unique in the batch")
    return custom_id


def _check_params(params: Mapping[str, Any]) -> None:
    """Refuses what a message may ask and an item of a batch may not. Raises ApiError."""
    if params.get("stream"):
        raise ApiError(400, "stream: streaming is not supported in a batch")
    if params.get("speed") == "fast":
        raise ApiError(400, "speed: fast mode is not supported in a batch")
    if params.get("max_tokens") == 0:
        raise ApiError(400, "max_tokens: Input should be greater than or equal to 1")


def _errored(batch: _Batch, index: int, error: ApiError) -> _Settled:
    return {"type": "errored", "error": error.payload(f"req_{batch.item_stem(index)}")}


def _answer(batch: _Batch, index: int, use: CacheUse) -> Answer:
    """The message of an item that succeeded; the same one whenever it is asked for."""
    reply = batch.outcomes[index]
    assert isinstance(reply, Reply)  # noqa: S101 - nothing else is billed
    params = batch.requests[index]["params"]
    answer = compose(reply, body=params, cache=use, message_id=f"msg_{batch.item_stem(index)}")
    answer.usage["service_tier"] = (reply.usage or {}).get("service_tier", "batch")
    return answer


def _line(batch: _Batch, ending: _Ending, index: int) -> bytes:
    result = ending.settled[index]
    if isinstance(result, CacheUse):
        result = {"type": "succeeded", "message": _answer(batch, index, result).message}
    return to_json({"custom_id": batch.requests[index]["custom_id"], "result": result}) + b"\n"


def _order(requests: Sequence[Mapping[str, Any]], script: Results, random: Random) -> list[int]:
    """Which items the lines of a results file are, by their places in the batch."""
    sent = [
        index
        for index, request in enumerate(requests)
        if request["custom_id"] not in script.omit
        for _ in range(script.times)
    ]
    if not script.shuffled:
        return sent
    order = random.sample(sent, len(sent))
    # A reader that counts on the order must not be lucky.
    return order if order != sent else sent[::-1]


def _chunks(lines: Iterator[bytes], line_delay: float) -> Iterator[bytes]:
    """The lines as they go on the wire: many at once where none has to wait."""
    if line_delay > 0:
        yield from lines
        return
    chunk = bytearray()
    for line in lines:
        chunk += line
        if len(chunk) >= _CHUNK:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)
