"""The API's own message batches, as the settings' key sees them.

Nothing here is guarded: what is sent was reserved before, and reading costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured

from ai_budget.guard.clients import bare

if TYPE_CHECKING:
    from anthropic import APIError
    from anthropic.types import Message

CREATE_SECONDS = 120.0
"""How long the API may take to accept a submission; it has to read it whole."""

READ_SECONDS = 60.0
"""How long the API may be silent while something is read from it."""

_PAGE = 100

_NOT_ACCEPTED = frozenset({503, 529})
"""Errors of the server that say that it took nothing on; others may come after it did."""

_LATER = frozenset({401, 403, 404, 408, 409, 429})
"""Refusals that may pass: a key that is mended, a rate that refills."""

_LONGEST_WAIT = 3_600.0
"""Seconds that the API's word counts at most for when to try again."""

_UNREADABLE = "unreadable answer"
_NO_KEY = "no key"


class Rejected(Exception):
    """The API did not take a submission. ``later`` says that it may take it another time."""

    def __init__(self, reason: str, *, later: bool, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.later = later
        self.retry_after = retry_after


class Unheard(Exception):
    """Nobody heard whether the API took a submission."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unavailable(Exception):
    """The API cannot say what was asked of it now. ``gone`` says that it never can."""

    def __init__(self, reason: str, *, gone: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.gone = gone


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiBatch:
    """A batch as the API tells of it."""

    id: str
    status: str
    total: int
    created_at: datetime

    @property
    def ended(self) -> bool:
        return self.status == "ended"


def create(body: bytes) -> str:
    """Send the JSON of a submission once, and return its id.

    Raises ``Rejected`` where the API does not have it, and ``Unheard`` where it may.
    """
    import anthropic
    from anthropic.types.messages import MessageBatch

    try:
        client = bare().with_options(max_retries=0, timeout=CREATE_SECONDS)
    except ImproperlyConfigured:
        raise Rejected(_NO_KEY, later=True) from None
    try:
        created = client.post(
            "/v1/messages/batches",
            cast_to=MessageBatch,
            content=body,
            options={"headers": {"Content-Type": "application/json"}},
        )
    except anthropic.APIError as error:
        raise failure(error) from None
    except Exception as error:
        # It may be of the answer, too: whatever cannot be read.
        raise Unheard(type(error).__name__) from None
    if not isinstance(getattr(created, "id", None), str):
        raise Unheard(_UNREADABLE)
    return created.id


def may_have_taken(status: int) -> bool:
    """Say whether the API may have made a batch, though it answered with an error."""
    return status >= 500 and status not in _NOT_ACCEPTED


def failure(error: APIError) -> Rejected | Unheard:
    """Return what an error of the SDK says of a submission: not taken, or not known."""
    import anthropic

    from ai_budget.guard.middleware import NEVER_LEFT

    name = type(error).__name__
    if isinstance(error, anthropic.APIStatusError):
        status = error.status_code
        if may_have_taken(status):
            return Unheard(f"HTTP {status}")
        later = status in _LATER or status in _NOT_ACCEPTED
        wait = error.response.headers.get("retry-after", "")
        return Rejected(f"HTTP {status}", later=later, retry_after=_seconds(wait))
    if isinstance(error, anthropic.APIConnectionError) and isinstance(error.__cause__, NEVER_LEFT):
        return Rejected(name, later=True)
    return Unheard(name)


def _seconds(text: str) -> float:
    try:
        return min(max(0.0, float(text)), _LONGEST_WAIT)
    except ValueError:
        return 0.0


def retrieve(api_id: str) -> ApiBatch:
    """Return how a batch stands. Raises ``Unavailable``."""
    with _reading() as batches:
        return _told(batches.retrieve(api_id))


def cancel(api_id: str) -> None:
    """Ask for the end of a batch; one that has ended stays as it is. Raises ``Unavailable``."""
    import anthropic

    with _reading() as batches, suppress(anthropic.BadRequestError):
        batches.cancel(api_id)


def created_since(since: datetime) -> list[ApiBatch]:
    """Return the batches that were created since, the newest first. Raises ``Unavailable``."""
    with _reading() as batches:
        told = map(_told, batches.list(limit=_PAGE))
        return list(takewhile(lambda batch: batch.created_at >= since, told))


def results(api_id: str) -> Iterator[dict[str, Any]]:
    """Yield the results of a batch that has ended, in the API's order, as they come in.

    What is no result, such as half a line, is left out. Raises ``Unavailable`` where there are
    none, or where they break off.
    """
    with (
        _reading() as batches,
        batches.with_streaming_response.results(api_id) as response,
    ):
        for line in _lines(response.iter_bytes()):
            found = parsed(line)
            if found is not None:
                yield found


def results_in_chunks(api_id: str, size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the results in lists of at most so many; those before they break off, too.

    Raises ``Unavailable`` as ``results`` does.
    """
    some: list[dict[str, Any]] = []
    broken = None
    try:
        for line in results(api_id):
            some.append(line)
            if len(some) == size:
                yield some
                some = []
    except Unavailable as error:
        broken = error
    if some:
        yield some
    if broken is not None:
        raise broken


def _lines(data: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines as JSONL has them: a text may hold what others take for the end of a line."""
    rest = b""
    for some in data:
        *lines, rest = (rest + some).split(b"\n")
        yield from lines
    yield rest


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return one result of a batch; None for what is none, such as half a line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def as_message(found: Mapping[str, Any]) -> Message:
    """Return the JSON of a message as the SDK's own, however new what is in it may be."""
    from anthropic.types import Message

    return Message.construct(**found)


@contextmanager
def _reading() -> Iterator[Any]:
    """Yield the SDK's batches; whatever goes wrong with them is ``Unavailable``.

    Nothing is tried again at once: whoever asks comes back.
    """
    import anthropic
    import httpx2

    try:
        yield bare().with_options(max_retries=0, timeout=READ_SECONDS).messages.batches
    except ImproperlyConfigured:
        raise Unavailable(_NO_KEY) from None
    except anthropic.APIStatusError as error:
        status = error.status_code
        raise Unavailable(f"HTTP {status}", gone=status == 404) from None
    except anthropic.APIError as error:
        raise Unavailable(type(error).__name__) from None
    except anthropic.AnthropicError as error:
        # There is no address to read results from.
        raise Unavailable(type(error).__name__, gone=True) from None
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise Unavailable(type(error).__name__) from None
    except (AttributeError, TypeError, ValueError):
        raise Unavailable(_UNREADABLE) from None


def _told(batch: Any) -> ApiBatch:
    counts = batch.request_counts
    total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
    return ApiBatch(
        id=batch.id, status=batch.processing_status, total=total, created_at=batch.created_at
    )
